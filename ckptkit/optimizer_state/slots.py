"""What the slots of an optimizer are: one number for each element of the parameter, a few for all, or neither."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

from ckptkit.optimizer_state.model import LazyTensor, Slot

__all__ = ["ELEMENTWISE", "Kind", "parameter_shape", "slot_kind"]

# One number for each element of the parameter, which nothing but that element's gradients went into: of torch.optim,
# and of optimizers that are widely used beside it.
ELEMENTWISE: Final = frozenset(
    {
        "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg", "acc_delta",
        "exp_inf", "prev", "step_size", "ax", "variance", "exp_avg_diff", "neg_pre_grad", "exp_avg_slow", "z",
        "hessian",
    }
)  # fmt: skip
# Sums over rows and columns: torch.optim.Adafactor's, and those of transformers.
_FACTORED: Final = (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False))
_OF_FACTORS: Final = frozenset(name for row, column, _ in _FACTORED for name in (row, column))
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
