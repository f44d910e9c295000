"""What each class of torch.optim keeps for a parameter, and what may be done with it: the slots of its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["SCHEMAS", "Schema", "Slot", "marked_by", "schema_of"]

Layout = Literal["elementwise", "scalar", "row", "column", "other"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One entry of the state of a parameter, under torch's own name.

    ``layout`` is how it lies beside the parameter: ``elementwise`` has its shape, ``scalar`` is one number,
    ``row`` and ``column`` have one number for each row and each column of the last two dimensions, ``other``
    has a shape of its own.
    """

    name: str
    layout: Layout = "elementwise"
    # The option of the group that asks for it; without one it is there for every parameter.
    option: str | None = None
    # torch starts it afresh where it is not there, instead of failing.
    restarts: bool = False
    # A step takes its root or divides by it: below zero the parameter becomes NaN.
    not_negative: bool = False
    # A step fails where its dtype is not that of the parameter (lerp_); elsewhere torch promotes.
    exact_dtype: bool = False
    # The option that each element begins with, where that is not zero.
    begins: str = ""

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape beside a parameter of shape ``parameter``, or None where that does not follow from it."""
        if self.layout == "elementwise":
            return parameter
        if self.layout == "row":
            return (*parameter[:-1], 1)
        if self.layout == "column":
            return (*parameter[:-2], 1, parameter[-1])
        return () if self.layout == "scalar" else None


@dataclass(frozen=True, slots=True)
class Schema:
    """All slots that a class of torch.optim can have, and whether each element of a parameter is updated by itself.

    ``elementwise`` says that an update of one element depends on no other: only then do a parameter cut in
    pieces and its state cut the same way train on as before.
    """

    name: str
    slots: tuple[Slot, ...]
    elementwise: bool = True
    # An option that no other class of torch.optim has: where only a file is there, it tells the class.
    mark: str = ""
    # LBFGS keeps one state for all its parameters, under the first.
    shared: bool = False

    def wanted(self, options: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Slot, ...]:
        """Return the slots that a parameter of ``shape`` has in a group with ``options``, once it was stepped."""
        return tuple(slot for slot in self.slots if _asked(slot, options) and _factors(slot, shape))

    def slot(self, name: str) -> Slot | None:
        """Return the slot called ``name``, or None where the class has none of that name."""
        return next((slot for slot in self.slots if slot.name == name), None)


def _asked(slot: Slot, options: Mapping[str, Any]) -> bool:
    return slot.option is None or bool(options.get(slot.option))


def _factors(slot: Slot, shape: tuple[int, ...]) -> bool:
    """Tell Adafactor's two forms apart: rows and columns where there are both, else a variance for each element."""
    if slot.layout in {"row", "column"}:
        return len(shape) > 1
    return slot.name != "variance" or len(shape) < 2


def _squares(*names: str, exact: bool = False) -> tuple[Slot, ...]:
    return tuple(Slot(name, not_negative=True, exact_dtype=exact) for name in names)


_STEP = Slot("step", "scalar", not_negative=True)
_MEAN = Slot("exp_avg", exact_dtype=True)
_ADAM = (_STEP, _MEAN, *_squares("exp_avg_sq"), Slot("max_exp_avg_sq", option="amsgrad", not_negative=True))

SCHEMAS: Mapping[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("ASGD", (_STEP, Slot("eta", "scalar"), Slot("mu", "scalar"), Slot("ax"))),
        Schema("Adadelta", (_STEP, *_squares("square_avg", "acc_delta"))),
        Schema(
            "Adafactor",
            (
                _STEP,
                Slot("row_var", "row", not_negative=True, exact_dtype=True),
                Slot("col_var", "column", not_negative=True, exact_dtype=True),
                *_squares("variance", exact=True),
            ),
            elementwise=False,
            mark="beta2_decay",
        ),
        Schema("Adagrad", (_STEP, Slot("sum", not_negative=True, begins="initial_accumulator_value"))),
        Schema("Adam", _ADAM),
        Schema("AdamW", _ADAM),
        Schema("Adamax", (_STEP, _MEAN, *_squares("exp_inf"))),
        Schema(
            "LBFGS",
            tuple(
                Slot(name, "other")
                for name in (
                    *("func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag"),
                    *("prev_flat_grad", "prev_loss", "al"),
                )
            ),
            elementwise=False,
            mark="history_size",
            shared=True,
        ),
        Schema(
            "Muon",
            (Slot("momentum_buffer", restarts=True, exact_dtype=True),),
            elementwise=False,
            mark="ns_coefficients",
        ),
        Schema("NAdam", (_STEP, Slot("mu_product", "scalar"), _MEAN, *_squares("exp_avg_sq"))),
        Schema("RAdam", (_STEP, _MEAN, *_squares("exp_avg_sq"))),
        Schema(
            "RMSprop",
            (
                _STEP,
                *_squares("square_avg"),
                Slot("momentum_buffer", option="momentum"),
                Slot("grad_avg", option="centered", exact_dtype=True),
            ),
        ),
        Schema("Rprop", (_STEP, Slot("prev"), Slot("step_size", not_negative=True, begins="lr"))),
        Schema("SGD", (Slot("momentum_buffer", option="momentum", restarts=True),)),
        Schema("SparseAdam", (_STEP, Slot("exp_avg"), *_squares("exp_avg_sq"))),
    )
}


def schema_of(kind: type) -> Schema | None:
    """Return the schema of a class of torch.optim, or of one that inherits the ``step`` of such a class; else None."""
    for base in kind.__mro__:
        if f"{base.__module__}.".startswith("torch.optim."):
            return SCHEMAS.get(base.__name__)
        if "step" in vars(base) or "_init_group" in vars(base):
            return None
    return None


def marked_by(options: Mapping[str, Any]) -> Schema | None:
    """Return the schema that the options of a group tell, where they have the mark of one."""
    return next((schema for schema in SCHEMAS.values() if schema.mark and schema.mark in options), None)
