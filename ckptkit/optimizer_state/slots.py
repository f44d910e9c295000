"""What the slots of an optimizer are: one number for each element of the parameter, a few for all, or neither."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import Final, Literal

from ckptkit.core.files import same_bytes
from ckptkit.core.torch_optim import SCHEMAS
from ckptkit.optimizer_state.model import LazyTensor, Slot

__all__ = ["ELEMENTWISE", "Kind", "number_of", "parameter_shape", "same_value", "slot_kind"]

# One number for each element of the parameter, which nothing but that element's gradients went into: of torch.optim,
# and of optimizers that are widely used beside it (Adan, Lookahead, schedule-free ones, Sophia).
ELEMENTWISE: Final = frozenset(
    {slot.name for schema in SCHEMAS.values() for slot in schema.slots if slot.layout == "elementwise"}
    | {"exp_avg_diff", "neg_pre_grad", "slow_buffer", "z", "hessian"}
)
# Sums over rows and columns: torch.optim.Adafactor's, and those of transformers.
_FACTORED: Final = (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False))
_OF_FACTORS: Final = frozenset(name for row, column, _ in _FACTORED for name in (row, column))
_NUMBERS: Final = {
    "F16": "<e", "F32": "<f", "F64": "<d", "BOOL": "<?", "U8": "<B", "I8": "<b", "I16": "<h", "I32": "<i", "I64": "<q"
}  # fmt: skip
Kind = Literal["elementwise", "scalar", "factored", "other"]


def slot_kind(name: str, value: Slot, elementwise: Collection[str] = ()) -> Kind:
    """Return what a slot is, by its name and what is in it; ``elementwise`` are more names of slots that are so."""
    if name in _OF_FACTORS:
        return "factored"
    if not isinstance(value, LazyTensor):
        return "scalar" if value is None or isinstance(value, bool | int | float | complex | str) else "other"
    if name in ELEMENTWISE or name in elementwise:
        return "elementwise"
    return "other" if value.shape else "scalar"


def parameter_shape(slots: Mapping[str, Slot], elementwise: Collection[str] = ()) -> tuple[int, ...] | None:
    """Return the shape that a parameter with these slots has, or None where they do not tell it or contradict it."""
    shapes = {
        value.shape for name, value in slots.items() if slot_kind(name, value, elementwise) == "elementwise"
    }  # fmt: skip
    for row, column, kept in _FACTORED:
        rows, columns = slots.get(row), slots.get(column)
        if isinstance(rows, LazyTensor) and isinstance(columns, LazyTensor):
            shapes.add(_of_factors(rows.shape, columns.shape, kept=kept))
    return shapes.pop() if len(shapes) == 1 else None


def _of_factors(rows: tuple[int, ...], columns: tuple[int, ...], *, kept: bool) -> tuple[int, ...]:
    """Return the shape of what was summed over columns and over rows; ``kept`` says that the sums have dims of one."""
    return (*rows[: -1 if kept else None], *columns[-1:])


def number_of(value: Slot) -> float | int | None:
    """Return a number, or the one that a tensor of one element holds, read without torch; None for anything else."""
    if isinstance(value, int | float):
        return value
    if hasattr(value, "numel"):  # a live tensor
        alone: float | int | None = value.item() if value.numel() == 1 and not value.is_meta else None
        return alone
    if not isinstance(value, LazyTensor) or value.info.elements != 1 or value.info.kind != "dense":
        return None
    data = value.source.read_bytes(value.info.key)
    if value.dtype == "BF16":
        data = b"\0\0" + data
    form = _NUMBERS.get("F32" if value.dtype == "BF16" else value.dtype)
    number: float | int | None = None if form is None else struct.unpack(form, data)[0]
    return number


def same_value(one: Slot, other: Slot) -> bool:
    """Return whether two values are equal: tensors where their bytes are, everything else with its type."""
    if isinstance(one, LazyTensor) and isinstance(other, LazyTensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and same_bytes(one.payload(), other.payload())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    return type(one) is type(other) and bool(one == other)
