"""The classes of rules: stages of rules, and the new keys that rules give to a set of keys."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from ckptkit.core.checkpoint import Checkpoint, Configuration, TensorInfo
from ckptkit.core.frozen import slot_setters
from ckptkit.core.patterns import Pattern, Template
from ckptkit.core.text import quoted, shell_word
from ckptkit.errors import RuleError

if TYPE_CHECKING:  # commands that only rename or list keys need no operations
    from ckptkit.tensor_ops.operation import Operation
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = [
    "Derivation",
    "KeyMap",
    "MakesStages",
    "OnCollision",
    "Rule",
    "Rules",
    "RulesLike",
    "Stage",
    "describe_output",
    "with_rule",
]

_MOST_SHOWN = 6  # names of a rule, in messages
OnCollision: TypeAlias = Literal["error", "first", "last", "equal"]
_MOST_COUNTERS = 8  # before a list of numbered tensors


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: keys that match a pattern of ``sources`` are dropped, renamed, or combined by operations.

    ``templates`` holds the new names for each pattern. A rule without new names drops the keys. Several new names are
    copies of the tensor, or the outputs of ``operations``.

    ``on_collision`` chooses between two keys that get the same new name. ``"first"`` and ``"last"`` follow the order of
    the keys, and ``"error"`` raises. ``"equal"`` requires the same bytes, which are compared before the output is
    written. ``optional`` allows that no key matches. ``where`` is the place of the rule in its file.
    """

    sources: tuple[Pattern, ...]
    templates: tuple[tuple[Template, ...], ...] = ()
    operations: tuple[Operation, ...] = ()
    optional: bool = False
    on_collision: OnCollision = "error"
    where: str = ""

    @property
    def drops(self) -> bool:
        """Whether the keys that match are left out."""
        return not any(self.templates)

    @property
    def new_name(self) -> str | None:
        """The right side of a rule with one pattern and one new name, or None."""
        names = self.templates[0] if len(self.sources) == len(self.templates) == 1 else ()
        return names[0].text if len(names) == 1 else None

    @property
    def gathered(self) -> tuple[str, ...]:
        """The captures that no new name uses: the tensors that differ in them go into one operation."""
        used = {value for names in self.templates for name in names for kind, value, _ in name.parts if kind == "group"}
        return tuple(dict.fromkeys(name for source in self.sources for name in source.captures if name not in used))

    def __str__(self) -> str:
        """Return the rule as an option of the command line, or with its place in its file."""
        old = _few([source.text for source in self.sources])
        new = "" if self.drops else _few([name.text for name in self.templates[0]])
        if self.where:
            return f"{'drop' if self.drops else 'rule'} {quoted(old if self.drops else f'{old}={new}')} ({self.where})"
        return f"--drop {shell_word(old)}" if self.drops else f"--rename {shell_word(f'{old}={new}')}"


def _few(texts: Sequence[str]) -> str:
    """Return texts in one line; of many, such as the names of 128 experts, the first and the last."""
    return ", ".join(texts if len(texts) <= _MOST_SHOWN else [texts[0], "...", texts[-1]])


class MakesStages(Protocol):
    """A description of stages that depend on the keys, such as the conversions of a library."""

    def stages(
        self, infos: Mapping[str, TensorInfo | None], live: Configuration | None, checkpoint: Checkpoint | None
    ) -> tuple[list[Stage], list[str]]:
        """Return the stages for these keys, and notes for the user.

        A key has None where only its name is known. ``live`` describes the live model that is on one side.
        ``checkpoint`` has the keys before all stages; it is None where only names are known.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass over the keys: a filter, then prefixes to remove, then the first rule that matches each key.

    An empty ``keep`` keeps every key. ``strip`` holds prefixes, or ``"auto"`` for the prefixes of known wrappers.
    ``made`` makes further stages in place of this one, when the keys are known.
    """

    keep: tuple[Pattern, ...] = ()
    rules: tuple[Rule, ...] = ()
    strip: tuple[str, ...] = ()
    made: MakesStages | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """Stages in order; each stage sees the names that the stage before it gave.

    ``allow_unused`` allows that a rule or a ``keep`` pattern matches no key.

    Example:
        >>> rules = ckptkit.parse_rules(rename=["module.*=*"])
        >>> [rule.sources[0].text for stage in rules.stages for rule in stage.rules]
        ['module.*']
    """

    stages: tuple[Stage, ...] = ()
    allow_unused: bool = False


# Renames OLD=NEW, the content of a rule file, or the path of one.
RulesLike: TypeAlias = Rules | Iterable[str] | Mapping[str, object] | str | os.PathLike[str]


@dataclass(frozen=True, slots=True, init=False)
class Derivation:
    """How one key of the output is made: its source keys, the recipe (None: renamed only) and the rules.

    ``equals`` names keys that must have the same bytes as the source, by ``on_collision = "equal"``.
    """

    sources: tuple[str, ...]
    recipe: Recipe | None = None
    rule: str = ""
    equals: tuple[str, ...] = ()

    def __init__(
        self, sources: tuple[str, ...], recipe: Recipe | None = None, rule: str = "", equals: tuple[str, ...] = ()
    ) -> None:
        """Set all fields through their slots."""
        _set_sources(self, sources)
        _set_recipe(self, recipe)
        _set_rule(self, rule)
        _set_equals(self, equals)

    def describe(self, key: str, infos: Mapping[str, TensorInfo]) -> TensorInfo:
        """Return the description of the new tensor, under the keys of its sources; ``key`` is its new key.

        Raises ``RuleError`` where an operation does not accept the sources.
        """
        return describe_output(key, [infos[name] for name in self.sources], self.recipe, self.rule)


_set_sources, _set_recipe, _set_rule, _set_equals = slot_setters(Derivation)


def describe_output(key: str, sources: Sequence[TensorInfo], recipe: Recipe | None, rule: str) -> TensorInfo:
    """Return the description of the tensor that a recipe makes (None: the first source), under the sources' keys.

    Raises ``RuleError`` where an operation does not accept the sources; the message has ``key`` (the new key) and
    ``rule``.
    """
    if recipe is None:
        return sources[0]
    from ckptkit.tensor_ops.recipes import dequantized_sources, recipe_dtype, recipe_shape

    try:
        decoded = dequantized_sources(recipe)
        for number, info in enumerate(sources):
            if info.kind != "dense" and number not in decoded:
                hint = ""
                if info.kind == "quantized":
                    hint = (
                        "--dequantize reads it as numbers; or write it with these rules first: ckpt remap PATH -o OUT "
                        "--dequantize"
                    )
                raise RuleError(f"{quoted(info.key)} is a {info.kind} tensor", hint=hint)
        shape = recipe_shape(recipe, [info.shape for info in sources])
        dtype = recipe_dtype(recipe, [info.dtype for info in sources])
    except RuleError as error:
        raise RuleError(f"{rule}: {quoted(key)}: {error.reason}", hint=error.hint) from None
    return TensorInfo(" + ".join(dict.fromkeys(info.key for info in sources)), dtype, shape)


@dataclass(frozen=True, slots=True)
class KeyMap:
    """The result of rules on a set of keys: the new key of each old key, and the keys that are dropped.

    ``renamed`` maps each old key to its first new key. ``copied_or_computed`` holds all other new keys: further copies,
    and outputs of operations. ``order`` then lists all new keys; without such keys it is None. ``rule_of`` maps an old
    key to its rules, and ``dropped`` maps an old key to the reason for dropping it. ``equals`` maps an old key to the
    dropped keys that must have the same bytes. ``made`` has the derivation of each new key, if they were made before.
    """

    renamed: Mapping[str, str]
    copied_or_computed: Mapping[str, Derivation] = field(default_factory=dict)
    rule_of: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    equals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    order: Sequence[str] | None = None
    made: Mapping[str, Derivation] | None = field(default=None, repr=False, compare=False)

    @property
    def has_numbers_only(self) -> bool:
        """Whether the keys can be those of a list of parameters, and of few counters before it."""
        keys = self.renamed.values() if self.order is None else self.order
        return any(key.rpartition(".")[2].isdecimal() for key in islice(keys, _MOST_COUNTERS))

    def sources(self) -> set[str]:
        """Return the old keys of all tensors that the new keys need, or that must be equal to one of them."""
        found = set(self.renamed).union(*self.equals.values())
        return found.union(*((*one.sources, *one.equals) for one in self.copied_or_computed.values()))

    def outputs(self) -> Mapping[str, Derivation]:
        """Return the derivation of each new key, in the order of the new keys."""
        if self.made is not None:
            return self.made
        plain = {
            new: Derivation((old,), None, self.rule_of.get(old, ""), self.equals.get(old, ()))
            for old, new in self.renamed.items()
        }
        if self.order is None:
            return plain
        return {name: plain.get(name) or self.copied_or_computed[name] for name in self.order}

    def describe(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the description of each tensor by its new key; the descriptions have the keys of the sources.

        Raises ``RuleError`` where an operation does not accept its tensors.
        """
        plain = dict(zip(self.renamed.values(), map(infos.__getitem__, self.renamed), strict=True))
        if self.order is None:
            return plain
        copied_or_computed = {
            key: derivation.describe(key, infos) for key, derivation in self.copied_or_computed.items()
        }
        return {key: plain.get(key) or copied_or_computed[key] for key in self.order}

    @classmethod
    def from_derivations(
        cls, state: Mapping[str, Derivation], dropped: Mapping[str, str], notes: Sequence[str]
    ) -> KeyMap:
        """Return the ``KeyMap`` of new keys with these derivations."""
        renamed: dict[str, str] = {}
        copied_or_computed: dict[str, Derivation] = {}
        rule_of: dict[str, str] = {}
        equals: dict[str, tuple[str, ...]] = {}
        for new, derivation in state.items():
            old = derivation.sources[0]
            if derivation.recipe is not None or old in renamed:
                copied_or_computed[new] = derivation
                continue
            renamed[old] = new
            if derivation.rule:
                rule_of[old] = derivation.rule
            if derivation.equals:
                equals[old] = derivation.equals
        order = tuple(state) if copied_or_computed else None
        return cls(renamed, copied_or_computed, rule_of, dropped, equals, tuple(notes), order, state)


def with_rule(derivation: Derivation, rule: str) -> Derivation:
    """Return the derivation with the text of one more rule."""
    rules = f"{derivation.rule}, {rule}" if derivation.rule else rule
    return Derivation(derivation.sources, derivation.recipe, rules, derivation.equals)
