"""The policies of a merge: what happens to keys that are missing, unexpected or of another shape, by pattern."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar, get_args

from ckptkit.core.arguments import one_of, refuse, require_choice, require_type
from ckptkit.core.patterns import Pattern, parse_pattern, suggest_pattern
from ckptkit.core.text import plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.mismatch import MISMATCH_NAMES, MismatchName

__all__ = [
    "ALL_OTHERS",
    "MISMATCH_ACTIONS",
    "MISSING_ACTIONS",
    "UNEXPECTED_ACTIONS",
    "MismatchAction",
    "MissingAction",
    "OnMismatch",
    "OnMissing",
    "OnUnexpected",
    "Policy",
    "UnexpectedAction",
    "parse_policy",
]

MissingAction: TypeAlias = Literal["keep", "error"]
UnexpectedAction: TypeAlias = Literal["skip", "add", "error"]
MismatchAction: TypeAlias = Literal["error", "skip"] | MismatchName
MISSING_ACTIONS: tuple[MissingAction, ...] = get_args(MissingAction)
UNEXPECTED_ACTIONS: tuple[UnexpectedAction, ...] = get_args(UnexpectedAction)
MISMATCH_ACTIONS: tuple[MismatchAction, ...] = ("error", "skip", *MISMATCH_NAMES)

# One action for every key, or an action for each pattern of keys. Public, to annotate a policy in a variable.
OnMissing: TypeAlias = MissingAction | Mapping[str, MissingAction]
OnUnexpected: TypeAlias = UnexpectedAction | Mapping[str, UnexpectedAction]
OnMismatch: TypeAlias = MismatchAction | Mapping[str, MismatchAction]

ALL_OTHERS = "*"  # the key of a mapping with the action for every key that no other pattern matches
_ERROR = "error"
_Action = TypeVar("_Action", bound=str)


@dataclass(frozen=True, slots=True)
class Policy(Generic[_Action]):
    """The action for each key, by patterns: the first pattern that matches a key decides.

    ``other`` is the action for every key that no pattern matches. ``name`` is the name of the argument.

    Example:
        >>> policy = parse_policy("on_mismatch", {"conv1.*": "conv_in_channels", "fc.*": "skip"}, MISMATCH_ACTIONS)
        >>> policy.action("fc.weight"), policy.action("layer1.weight")
        ('skip', 'error')
    """

    name: str
    by_pattern: tuple[tuple[Pattern, _Action], ...]
    other: _Action

    @property
    def actions(self) -> frozenset[_Action]:
        """Every action that the policy can choose."""
        return frozenset((self.other, *(action for _, action in self.by_pattern)))

    @property
    def option(self) -> str:
        """The name of the option on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def action(self, key: str) -> _Action:
        """Return the action for ``key``."""
        return next((action for pattern, action in self.by_pattern if pattern.match(key)), self.other)

    def has_pattern(self, key: str) -> bool:
        """Return whether a pattern decides about ``key``, and not the action for every other key."""
        return any(pattern.match(key) for pattern, _ in self.by_pattern)

    def rule(self, key: str) -> str:
        """Return the option that decides about ``key``, as it is written on the command line."""
        for pattern, action in self.by_pattern:
            if pattern.match(key):
                return f"{self.option} {shell_word(f'{pattern.text}={action}')}"
        return f"{self.option} {self.other}"

    def unused(self, keys: Collection[str], owner: str, *, allow_unused: bool) -> list[str]:
        """Return a note for each pattern that decides about none of ``keys``, the keys of ``owner``.

        Raises ``RuleError`` for the first such pattern, unless ``allow_unused``.
        """
        notes = []
        for number, (pattern, _) in enumerate(self.by_pattern):
            matching = [key for key in keys if pattern.match(key)]
            earlier = [other for other, _ in self.by_pattern[:number]]
            if any(not any(other.match(key) for other in earlier) for key in matching):
                continue
            where = f"{self.option} {shell_word(pattern.text)}"
            if matching:
                first = next(other.text for other in earlier if other.match(matching[0]))
                reason = f"{where} is shadowed: the earlier {quoted(first)} matches {quoted(matching[0])}"
                hint = "write the narrower pattern first"
            else:
                reason = f"{where} matches none of {plural(len(keys), 'key')} of {owner}"
                hint = suggest_pattern(pattern, keys, owner) if keys else "leave it out"
            if not allow_unused:
                hint += "" if hint.endswith("?") else ";"
                call = f"{hint} or allow unused rules with parse_rules(..., allow_unused=True)"
                raise RuleError(reason, hint=f"{hint} or allow unused rules with --allow-unused", call=call)
            notes.append(reason)
        return notes


def parse_policy(name: str, given: object, actions: Sequence[_Action]) -> Policy[_Action]:
    """Return the policy that the argument ``name`` describes: one of ``actions``, or a mapping of patterns to them.

    In a mapping, the action of ``"*"`` is for every key that no other pattern matches; without it, such a key is an
    error. Raises ``ArgumentError`` for any other action, and ``RuleError`` for a pattern that is not valid.
    """
    if not isinstance(given, Mapping):
        if not isinstance(given, str) or given not in actions:
            example = next(action for action in actions if action != _ERROR)
            refuse(given, name, f'{one_of(actions)}, or a dict of patterns, such as {{"fc.*": "{example}"}}')
        return Policy(name, (), _action(name, given, actions))
    for text in given:
        require_type(text, str, f"a pattern of {name}", 'a str, such as "fc.*"')
    other = _action(f'{name}["{ALL_OTHERS}"]', given.get(ALL_OTHERS, _ERROR), actions)
    by_pattern = tuple(
        (parse_pattern(text), _action(f"{name}[{quoted(text)}]", action, actions))
        for text, action in given.items()
        if text != ALL_OTHERS
    )
    return Policy(name, by_pattern, other)


def _action(what: str, given: object, actions: Sequence[_Action]) -> _Action:
    require_choice(given, actions, what)
    return next(action for action in actions if action == given)
