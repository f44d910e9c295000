"""Rules as values: passes of rules, and what they make of a set of keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.patterns import Pattern, Template
from ckptkit.core.text import quoted, shell_word
from ckptkit.errors import RuleError

if TYPE_CHECKING:  # commands that only rename, or list, need no operations
    from ckptkit.tensor_ops.operation import Operation
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["Derivation", "KeyMap", "Rule", "Rules", "Stage", "describe_output"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: keys that fit a pattern of ``sources`` are dropped, renamed, or made into others.

    ``templates`` holds for each pattern the names of what it becomes: none is a drop, several are copies, or the
    outputs of ``operations``. Where two keys want one new name, ``on_collision`` says whose value stays: ``"first"``
    or ``"last"`` in the order of the keys, ``"equal"`` where both have the same bytes (proved before anything is
    written), or ``"error"``. ``where`` is its place in a rule file.
    """

    sources: tuple[Pattern, ...]
    templates: tuple[tuple[Template, ...], ...] = ()
    operations: tuple[Operation, ...] = ()
    optional: bool = False
    on_collision: str = "error"
    where: str = ""

    @property
    def drops(self) -> bool:
        """Whether it leaves out what it fits."""
        return not any(self.templates)

    @property
    def gathered(self) -> tuple[str, ...]:
        """The captures that no new name has: over those, many tensors become one."""
        used = {value for names in self.templates for name in names for kind, value, _ in name.parts if kind == "group"}
        return tuple(dict.fromkeys(name for source in self.sources for name in source.captures if name not in used))

    def __str__(self) -> str:
        """Show the rule as it is written on a command line, or with its place in its file."""
        old = ", ".join(source.text for source in self.sources)
        new = "" if self.drops else ", ".join(name.text for name in self.templates[0])
        if self.where:
            return f"{'drop' if self.drops else 'rule'} {quoted(old if self.drops else f'{old}={new}')} ({self.where})"
        return f"--drop {shell_word(old)}" if self.drops else f"--rename {shell_word(f'{old}={new}')}"


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass: a filter of what is kept (empty: everything), then the first rule that fits each key.

    ``strip`` comes between the two, as passes of its own: prefixes to take off, or ``"auto"``.
    """

    keep: tuple[Pattern, ...] = ()
    rules: tuple[Rule, ...] = ()
    strip: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """Passes in order; each sees the names that the one before it made."""

    stages: tuple[Stage, ...] = ()
    allow_unused: bool = False


@dataclass(frozen=True, slots=True)
class Derivation:
    """How one key of the output comes about: from which keys, by which recipe (None: as it is), by which rules.

    ``equals`` are keys that a rule promises to have the same bytes.
    """

    sources: tuple[str, ...]
    recipe: Recipe | None = None
    rule: str = ""
    equals: tuple[str, ...] = ()

    def describe(self, key: str, infos: Mapping[str, TensorInfo]) -> TensorInfo:
        """Return the tensor as it will be, called by the names of its sources; raises ``RuleError`` where none can be.

        ``key`` is its new name, for the message.
        """
        return describe_output(key, [infos[name] for name in self.sources], self.recipe, self.rule)


def describe_output(key: str, sources: Sequence[TensorInfo], recipe: Recipe | None, rule: str) -> TensorInfo:
    """Return what a recipe makes of these tensors (None: the first as it is), called by their names.

    ``key`` is its new name and ``rule`` who asks for it, for the message of the ``RuleError`` where none can be.
    """
    if recipe is None:
        return sources[0]
    from ckptkit.tensor_ops.recipes import recipe_dtype, recipe_shape

    try:
        for info in sources:
            if info.kind != "dense":
                raise RuleError(f"{quoted(info.key)} is a {info.kind} tensor")
        shape = recipe_shape(recipe, [info.shape for info in sources])
        dtype = recipe_dtype(recipe, [info.dtype for info in sources])
    except RuleError as error:
        raise RuleError(f"{rule}: {quoted(key)}: {error.reason}", hint=error.hint) from None
    return TensorInfo(" + ".join(dict.fromkeys(info.key for info in sources)), dtype, shape)


@dataclass(frozen=True, slots=True)
class KeyMap:
    """What the rules made of a set of keys: old → new, what operations and copies made, and what was dropped."""

    renamed: Mapping[str, str]
    derived: Mapping[str, Derivation] = field(default_factory=dict)  # new key -> how it is made, if not by renaming
    rule_of: Mapping[str, str] = field(default_factory=dict)  # old key -> the rules that spoke, where one did
    dropped: Mapping[str, str] = field(default_factory=dict)  # old key -> the reason
    equals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # old key -> dropped ones that must equal it
    notes: tuple[str, ...] = ()
    order: Sequence[str] | None = None  # the new keys, where ``derived`` stands between the renamed ones

    def outputs(self) -> Mapping[str, Derivation]:
        """Return every new key, in order, with how it comes about."""
        plain = {
            new: Derivation((old,), None, self.rule_of.get(old, ""), self.equals.get(old, ()))
            for old, new in self.renamed.items()
        }
        if self.order is None:
            return plain
        return {name: plain.get(name) or self.derived[name] for name in self.order}

    def describe(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the tensors by their new keys, each still called by the name of its source.

        Raises ``RuleError`` where an operation does not fit the tensors it is given.
        """
        plain = {new: infos[old] for old, new in self.renamed.items()}
        if self.order is None:
            return plain
        made = {key: how.describe(key, infos) for key, how in self.derived.items()}
        return {key: plain.get(key) or made[key] for key in self.order}

    @classmethod
    def of(cls, state: Mapping[str, Derivation], dropped: Mapping[str, str], notes: Sequence[str]) -> KeyMap:
        """Return the map that ends in these new keys."""
        renamed: dict[str, str] = {}
        made: dict[str, Derivation] = {}
        for new, how in state.items():
            if how.recipe is None and how.sources[0] not in renamed:
                renamed[how.sources[0]] = new
            else:
                made[new] = how
        plain = {how.sources[0]: how for new, how in state.items() if new not in made}
        return cls(
            renamed,
            made,
            {old: how.rule for old, how in plain.items() if how.rule},
            dropped,
            {old: how.equals for old, how in plain.items() if how.equals},
            tuple(notes),
            tuple(state) if made else None,
        )


def with_rule(made: Derivation, rule: Rule) -> Derivation:
    """Return the same, with one more rule that spoke."""
    return replace(made, rule=f"{made.rule}, {rule}" if made.rule else str(rule))
