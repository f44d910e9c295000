"""The result of ``suggest_rules``: rules with evidence, and the tensors without a rule."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ckptkit.align.writing.rule_files import rule_file, rule_table
from ckptkit.align.writing.to_rules import Suggestion
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.result import Result
from ckptkit.core.text import plural
from ckptkit.rules.load import as_rules
from ckptkit.rules.model import Rules

__all__ = ["Alignment", "Ambiguity"]


@dataclass(frozen=True, slots=True)
class Ambiguity:
    """Tensors that could be matched in several ways, or in one way that nothing proves.

    Attributes:
        expected: The expected tensors.
        found: The found tensors that could become the expected tensors.
        why: Why no rule was written.
        candidates: The rules that are possible.
    """

    expected: tuple[TensorInfo, ...]
    found: tuple[TensorInfo, ...]
    why: str
    candidates: tuple[Suggestion, ...]


@dataclass(frozen=True, repr=False)
class Alignment(Result):
    """The rules that rename the found keys to the expected keys, and the tensors without a rule.

    Attributes:
        expected: The checkpoint with the expected keys.
        found: The checkpoint with the keys that the rules rename.
        same: Keys that need no rule.
        suggestions: The suggested rules.
        ambiguous: Tensors that could be matched in several ways.
        unequal: Expected and found tensors with the same name and different shapes.
        missing: Expected tensors that no found tensor fits.
        unexpected: Found tensors that fit no expected tensor.
        presets: The names of the presets that fill every expected key.
        note: A sentence about weights that are quantised on one side only, or an empty string.
        equal: With digests, the expected keys that are filled with equal bytes; None without digests.
        different: With digests, the expected keys that are filled with other bytes of the same dtype and shape.
        given: The rules that were applied to the found keys first.
        hints: What decides where tensors are ambiguous, with the options of ``ckpt align``.

    Example:
        >>> alignment = ckptkit.suggest_rules("fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt")
        >>> alignment
        <Alignment: 0 with the same name, 1 rule, 0 ambiguous, 0 missing>
        >>> ckptkit.diff("fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt", alignment.rules).different
        False
    """

    _truth: ClassVar[str] = "ask for .complete"

    expected: Checkpoint
    found: Checkpoint
    same: tuple[str, ...]
    suggestions: tuple[Suggestion, ...]
    ambiguous: tuple[Ambiguity, ...]
    unequal: tuple[tuple[TensorInfo, TensorInfo], ...]
    missing: tuple[TensorInfo, ...]
    unexpected: tuple[TensorInfo, ...]
    presets: tuple[str, ...] = field(default=())
    note: str = ""
    equal: tuple[str, ...] | None = None
    different: tuple[str, ...] = ()
    given: Rules = field(default_factory=Rules)
    hints: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the expected elements that are filled, between 0 and 1; 1 if nothing is expected.

        With digests, a tensor that is known to have other bytes does not count.
        """
        wanted = sum(info.elements for info in self.expected.values())
        filled = sum(self.expected[key].elements for key in self.same)
        filled += sum(suggestion.elements for suggestion in self.suggestions)
        filled -= sum(self.expected[key].elements for key in self.different)
        return filled / wanted if wanted else 1.0

    @property
    def complete(self) -> bool:
        """Whether every expected key keeps its name or is filled by a rule, and no bytes are known to differ."""
        return not self.missing and not self.ambiguous and not self.unequal and not self.different

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        counts = (
            f"{plural(len(self.suggestions), 'rule')}, {len(self.ambiguous)} ambiguous, {len(self.missing)} missing"
        )
        return f"{len(self.same)} with the same name, {counts}"

    @property
    def rules(self) -> Rules:
        """The suggestions as rules, for example for ``load_into(model, found, alignment.rules)``."""
        own = as_rules(rule_table(self.suggestions))
        return replace(self.given, stages=(*self.given.stages, *own.stages)) if self.given.stages else own

    def toml(self) -> str:
        """Return the rules as the text of a rule file, after the given rules.

        Comments have the candidates of ambiguous tensors, and name what no rule fills or uses.
        """
        count = len(self.same) + sum(len(suggestion.keys) for suggestion in self.suggestions)
        title = [
            f"From {self.found.path} to {self.expected.path}.",
            f"{count:,} of {plural(len(self.expected), 'tensor')} found, {len(self.same):,} under the same name.",
        ]
        if self.different:
            title.append(f"{plural(len(self.different), 'tensor')} of these with other values.")
        undecided = [(one.why, one.candidates, one.expected, one.found) for one in self.ambiguous]
        left_out = [
            ("other shapes in found:", [replace(found, key=wanted.key) for wanted, found in self.unequal]),
            ("not filled:", self.missing),
            ("not used:", self.unexpected),
        ]
        return rule_file(title, self.given, self.suggestions, undecided, left_out)
