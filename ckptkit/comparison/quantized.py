"""Find the weights that only one of two checkpoints has quantised: codes on one side, numbers on the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import listed, plural
from ckptkit.quantized import QuantizedWeight, quantized_weights
from ckptkit.quantized.view import DequantizedView, dequantized
from ckptkit.rules.model import KeyMap

__all__ = ["QuantizedKey", "find_quantized_keys", "numbers_of_either", "quantized_messages", "with_dtypes_of_plain"]

_PLAIN = frozenset({"F64", "F32", "BF16", "F16"})

Side = Literal["expected", "found", "both"]
_PLACES: Mapping[Side, str] = {
    "expected": "only in the expected state_dict",
    "found": "only in the found state_dict",
    "both": "in another way than expected",
}


@dataclass(frozen=True, slots=True)
class QuantizedKey:
    """A weight that is quantised on one side only, or in two ways: torch would take codes for numbers, or the reverse.

    Attributes:
        key: The expected name of the weight.
        side: The side with the quantised weight; ``"both"`` if the schemes differ.
        weight: The quantised weight, with the keys of its side; of the found side if the schemes differ.
        parts: The expected names of its parts that are not dropped.
    """

    key: str
    side: Side
    weight: QuantizedWeight
    parts: tuple[str, ...]

    @property
    def remark(self) -> str:
        """Return a short remark for a table."""
        return f"quantised as {self.weight.scheme}, {_PLACES[self.side]}"


def find_quantized_keys(
    expected: Checkpoint, found: Checkpoint, by_new_name: Mapping[str, TensorInfo], names: Mapping[str, str]
) -> tuple[QuantizedKey, ...]:
    """Return the weights that the two sides do not store in the same way; ``names`` are the new names of found keys."""
    in_expected, in_found = quantized_weights(expected), quantized_weights(found)
    by_name = {weight.key: weight for weight in in_expected.weights}
    result: list[QuantizedKey] = []
    for weight in in_found.weights:
        parts = tuple(names[part] for part in weight.parts if part in names)
        coded = names.get(weight.coded, weight.coded)
        name = weight.renamed_key(coded) or coded
        other = by_name.get(name)
        if other is not None:
            if parts and set(parts).isdisjoint(set(other.parts) - {other.coded}) and len(other.parts) > 1:
                result.append(QuantizedKey(name, "both", weight, parts))
        elif parts and name in expected and name not in in_expected.by_key:
            result.append(QuantizedKey(name, "found", weight, parts))
    for weight in in_expected.weights:
        info = by_new_name.get(weight.key)
        if info is not None and info.key not in in_found.by_key:
            result.append(QuantizedKey(weight.key, "expected", weight, weight.parts))
    return tuple(result)


def with_dtypes_of_plain(
    expected: DequantizedView, found: DequantizedView, key_map: KeyMap
) -> tuple[DequantizedView, DequantizedView]:
    """Return both sides with each weight in the dtype of the plain tensor that the other side has of it, else F32."""
    if not (expected.weights or found.weights):
        return expected, found
    names = {source: new for new, one in key_map.outputs().items() for source in one.sources}
    sources = {new: source for source, new in names.items()}
    return _as_plain(expected, found, sources), _as_plain(found, expected, names)


def numbers_of_either(
    expected: DequantizedView, found: DequantizedView, key_map: KeyMap, names: Mapping[str, str]
) -> Iterator[str]:
    """Yield the expected keys of tensors that a side makes of a quantised weight, given their new names in found."""
    outputs = key_map.outputs() if found.weights else {}
    for key, name in names.items():
        if key in expected.weights or (name in outputs and any(one in found.weights for one in outputs[name].sources)):
            yield key


def _as_plain(view: DequantizedView, other: DequantizedView, names: Mapping[str, str]) -> DequantizedView:
    dtypes: dict[str, str] = {}
    for key in view.weights:
        name = names.get(key, "")
        info = other.checkpoint.get(name) if name not in other.weights else None
        if info is not None and info.dtype in _PLAIN:
            dtypes[key] = info.dtype
    if all(dtype == view.checkpoint[key].dtype for key, dtype in dtypes.items()):
        return view
    return dequantized(view.original, "F32", wanted=lambda weight: dtypes.get(weight.key, True))


def quantized_messages(keys: tuple[QuantizedKey, ...]) -> Iterator[str]:
    """Yield a hint for each scheme and side."""
    groups: dict[str, list[QuantizedKey]] = {}
    for key in keys:
        groups.setdefault(key.remark, []).append(key)
    for remark, group in groups.items():
        are = "is" if len(group) == 1 else "are"
        yield (
            f"{plural(len(group), 'weight')} {are} {remark}, so load_state_dict would take codes for numbers or lack "
            f"them: {listed([key.key for key in group], 3)}; {group[0].weight.ways_out}"
        )
