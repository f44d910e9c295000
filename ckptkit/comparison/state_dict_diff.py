"""``StateDictDiff``: the differences between two state_dicts, and which keys a load would fill."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from ckptkit.comparison.gates import Gate
from ckptkit.comparison.hints import Hint, find_hints
from ckptkit.comparison.parts import PartedTensor, find_parted
from ckptkit.comparison.quantized import QuantizedKey
from ckptkit.comparison.values import ValueDiff
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.coverage import measure_coverage
from ckptkit.core.coverage.requirements import Requirements, Unmet, find_unmet
from ckptkit.core.result import Result
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.ties import tied_keys
from ckptkit.quantized.view import DequantizedWeight

__all__ = [
    "KeyPair",
    "StateDictDiff",
    "extra_state_key",
    "find_unmet_in",
    "loaded_keys",
    "missing_ties",
    "reasons_not_loaded",
]

_EXTRA_STATE = "_extra_state"
_EXTRA_STATE_KEY = re.compile(r"(?:.*?\.)?_extra_state(?=\.|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A key that both sides have; ``found.key`` is the key in the file, before any rename."""

    expected: TensorInfo
    found: TensorInfo

    @property
    def key(self) -> str:
        """The expected key."""
        return self.expected.key

    @property
    def is_old_scalar(self) -> bool:
        """Whether the tensor is a scalar that torch before 0.4 saved with shape (1,), which torch reshapes."""
        return self.expected.shape == () and self.found.shape == (1,)

    @property
    def loads(self) -> bool:
        """Whether ``load_state_dict`` accepts the found shape."""
        # Extra state may have any shape.
        return self.is_old_scalar or self.expected.shape == self.found.shape or extra_state_key(self.key) is not None


@dataclass(frozen=True, repr=False)
class StateDictDiff(Result):
    """The differences between two state_dicts, in torch's words.

    Attributes:
        expected: The expected tensors, by key.
        found: The found tensors, by the key that they have in their file.
        names: The new name of each found key that no rule drops.
        matched: Keys with the same shape on both sides. ``dtype_mismatched`` and ``uncopyable`` keys are matched too.
        missing: Expected tensors that were not found.
        unexpected: Found tensors that are not expected.
        shape_mismatched: The same key with another shape.
        dtype_mismatched: The same key and shape with another dtype; torch casts it.
        blocked: Expected keys that were found with a value that is not a tensor.
        uncopyable: Keys with a found tensor that torch cannot copy: sparse, quantized, without data, or of a dtype
            without casts.
        foreign: Found keys that are not expected and hold no tensor.
        extra_state: Keys of extra state that only one side has.
        filled: Missing keys that torch fills in for checkpoints from before version 0.4.1, or the model's own code.
        notes: Remarks of the rules.
        unseen: Unexpected keys that torch ignores: those below a submodule that is None, and those that the model's own
            code removes.
        quantized: Weights that only one side has quantised, or in another way. Their codes are not ``matched`` with
            numbers, although ``load_state_dict`` copies the codes where shapes are equal.
        unmet: What does not hold: requirements of ``require`` and ``min_coverage``, and gates on values. Printed, each
            names the arguments of Python.
        moved: Expected keys that the model's own code loads from a tensor of another name, each with that name. It is
            the name after the rules.
        computed: Expected keys that the model's own code makes of found tensors, each with their names after the rules.
        excused: Missing keys that keep their value, and that the model's own code does not report as missing.
        reported: Further keys that the model's own code reports as missing or unexpected. Where this code could not be
            tried, the keys of values that it saves, and that were not found.
        refusals: What the model's own code says where it refuses the found tensors, even with ``strict=False``.
        has_own_code: Whether the expected side is a live model with own code for loading: hooks or methods.
        undecided: Why this code could not be tried, or an empty string. Names alone decide then, also about ``loads``
            and ``loads_strict``, and ``load_state_dict`` can decide otherwise.
        expected_checkpoint: Path, format and size of the expected side.
        found_checkpoint: Path, format and size of the found side.
        same_ranges: Matched keys whose bytes on both sides are known to be one range of one file, so that their values
            are equal: of a file and itself, or of two directories with links to the same shards.
        values: How the values of the matched tensors differ; None where they were not compared.
        gates: The gates on values, each with its judgement; ``unmet`` has the broken ones too.
        left_out: Missing keys that the found side has, but that ``keep`` or ``drop`` of the rules leave out.
        expected_numbers: The quantised weights of the expected side that were compared as numbers.
        found_numbers: Those of the found side.

    Example:
        >>> result = ckptkit.diff("py:fixtures.lenet:build", "fixtures/lenet_10class.pth")
        >>> result
        <StateDictDiff: 8 matched, 0 missing, 0 unexpected, 2 shape-mismatched, 0 dtype-mismatched>
        >>> [(pair.key, pair.expected.shape, pair.found.shape) for pair in result.shape_mismatched]
        [('fc3.weight', (4, 84), (10, 84)), ('fc3.bias', (4,), (10,))]
    """

    _truth: ClassVar[str] = "ask for .ok, .different, .loads or .loads_strict"

    expected: Mapping[str, TensorInfo]
    found: Mapping[str, TensorInfo]
    names: Mapping[str, str]
    matched: tuple[KeyPair, ...]
    missing: tuple[TensorInfo, ...]
    unexpected: tuple[TensorInfo, ...]
    shape_mismatched: tuple[KeyPair, ...]
    dtype_mismatched: tuple[KeyPair, ...]
    blocked: tuple[str, ...] = ()
    uncopyable: tuple[KeyPair, ...] = ()
    foreign: tuple[str, ...] = ()
    extra_state: tuple[str, ...] = ()
    filled: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    unseen: frozenset[str] = frozenset()
    quantized: tuple[QuantizedKey, ...] = ()
    unmet: tuple[Unmet, ...] = ()
    moved: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    excused: frozenset[str] = frozenset()
    reported: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    has_own_code: bool = False
    undecided: str = ""
    expected_checkpoint: CheckpointSummary = NO_CHECKPOINT
    found_checkpoint: CheckpointSummary = NO_CHECKPOINT
    same_ranges: frozenset[str] = frozenset()
    values: ValueDiff | None = None
    gates: tuple[Gate, ...] = ()
    left_out: frozenset[str] = frozenset()
    expected_numbers: tuple[DequantizedWeight, ...] = ()
    found_numbers: tuple[DequantizedWeight, ...] = ()

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        values = f", {self.values.in_short}" if self.values is not None else ""
        return (
            f"{len(self.matched)} matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.shape_mismatched)} shape-mismatched, {len(self.dtype_mismatched)} dtype-mismatched{values}"
        )

    @property
    def loads(self) -> bool:
        """Whether ``load_state_dict(strict=False)`` accepts the found tensors."""
        refused = self.blocked or self.uncopyable or self.refusals
        return not refused and all(pair.loads for pair in self.shape_mismatched)

    @property
    def loads_strict(self) -> bool:
        """Whether ``load_state_dict(strict=True)`` accepts the found tensors."""
        missing = any(info.key not in self.filled | self.excused for info in self.missing)
        unexpected = any(info.key not in self.unseen for info in self.unexpected)
        others = self.foreign or self.extra_state or self.reported
        return self.loads and not missing and not unexpected and not others

    @property
    def different(self) -> bool:
        """Whether the two sides differ in any key, shape or dtype, or in a value where values were compared.

        With tolerances, values differ where ``torch.allclose`` would be false.
        """
        return bool(
            self.missing or self.unexpected or self.shape_mismatched or self.dtype_mismatched
            or self.quantized or self.uncopyable or self.blocked or self.foreign or self.extra_state
            or self.reported or self.refusals
            or (self.values is not None and (self.values.different or self.values.skipped))
        )  # fmt: skip

    @property
    def ok(self) -> bool:
        """Whether all that was required holds; without gates on values, also whether nothing is different.

        It is what the exit code of ``ckpt diff`` says.
        """
        return not self.unmet and (bool(self.gates) or not self.different)

    @property
    def coverage(self) -> float:
        """The share of the expected elements that would get a value, between 0 and 1; 1 if nothing is expected."""
        return measure_coverage(self.expected, loaded_keys(self)).share

    @cached_property
    def parted(self) -> tuple[PartedTensor, ...]:
        """Tensors that one side has whole and the other in parts, such as stacked experts and fused projections."""
        if not self.missing or not self.unexpected:
            return ()
        keys = {info.key for info in self.unexpected}
        unexpected = {new: self.found[old] for old, new in self.names.items() if old in keys}
        return find_parted({info.key: info for info in self.missing}, unexpected)

    @cached_property
    def hints(self) -> tuple[Hint, ...]:
        """What explains the differences, and the way out, such as renames; printed, a hint is for Python."""
        return find_hints(self)


def loaded_keys(result: StateDictDiff, refused: AbstractSet[str] = frozenset()) -> frozenset[str]:
    """Return the expected keys that a load fills: the matched ones that torch can copy, and what is tied to them.

    The model's own code fills the computed ones.

    ``refused`` names further keys that cannot be copied.
    """
    refused = {*refused, *(pair.key for pair in result.uncopyable)}
    scalars = (pair.key for pair in result.shape_mismatched if pair.is_old_scalar)
    loaded = {pair.key for pair in result.matched}.union(scalars, result.computed) - refused
    return frozenset(loaded | _tied_to(result, loaded).keys())


def missing_ties(result: StateDictDiff) -> dict[str, str]:
    """Return each missing key that a load fills through a matched key, with that key: they are one tensor."""
    through = _tied_to(result, {pair.key for pair in result.matched} - {pair.key for pair in result.uncopyable})
    return {info.key: through[info.key] for info in result.missing if info.key in through}


def _tied_to(result: StateDictDiff, loaded: AbstractSet[str]) -> dict[str, str]:
    """Return each expected key that is one tensor with a key of ``loaded``, and not one itself, with that key."""
    tied: dict[str, str] = {}
    for keys in tied_keys(result.expected.values()):
        first = next((key for key in keys if key in loaded), None)
        if first is not None:
            tied |= {key: first for key in keys if key not in loaded}
    return tied


def find_unmet_in(
    result: StateDictDiff,
    requirements: Requirements,
    refused: AbstractSet[str] = frozenset(),
    *,
    of: str,
    source: str,
) -> list[Unmet]:
    """Return the requirements that a load of what ``result`` compares would not meet, as ``find_unmet`` does."""
    reasons = reasons_not_loaded(result)
    return find_unmet(requirements, result.expected, loaded_keys(result, refused), reasons, of=of, source=source)


def reasons_not_loaded(result: StateDictDiff) -> dict[str, str]:
    """Return why keys are not loaded, although the checkpoint has a value for them."""
    return {
        **dict.fromkeys(result.blocked, "not a tensor"),
        **{pair.key: f"torch does not copy {pair.found}" for pair in result.uncopyable},
        **{
            pair.key: f"its shape is {list(pair.found.shape)}, not {list(pair.expected.shape)}"
            for pair in result.shape_mismatched
        },
        **{part: weight.remark for weight in result.quantized for part in (weight.key, *weight.parts)},
    }


def extra_state_key(key: str, side: Checkpoint | None = None) -> str | None:
    """Return the key of the extra state that ``key`` is or is a part of; None if it is neither."""
    match = _EXTRA_STATE_KEY.match(key) if _EXTRA_STATE in key else None
    # A file lists the parts of a nested extra state under their own keys; a live model has only the exact key.
    if match is None or (side is not None and not side.files and match.end() < len(key)):
        return None
    return match[0]
