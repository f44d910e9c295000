"""What each class of torch.optim keeps for a parameter, and what may be done with it: the slots of its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["SCHEMAS", "OptimizerSchema", "SlotSchema", "schema_from_options", "schema_of"]

Layout = Literal["elementwise", "scalar", "row", "column", "other"]


@dataclass(frozen=True, slots=True)
class SlotSchema:
    """One entry of the state of a parameter, under torch's own name.

    ``layout`` is how it lies beside the parameter: ``elementwise`` has its shape, ``scalar`` is one number,
    ``row`` and ``column`` have one number for each row and each column of the last two dimensions, ``other``
    has a shape of its own.
    """

    name: str
    layout: Layout = "elementwise"
    # The option of the group that asks for it; without one it is there for every parameter.
    enabled_by: str | None = None
    # torch starts it afresh where it is not there, instead of failing.
    is_optional: bool = False
    # A step takes its root or divides by it: below zero the parameter becomes NaN.
    is_non_negative: bool = False
    # A step fails where its dtype is not that of the parameter (lerp_); elsewhere torch promotes.
    needs_parameter_dtype: bool = False
    # The option that each element begins with, where that is not zero.
    initial_value_option: str = ""

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
class OptimizerSchema:
    """All slots that a class of torch.optim can have, and whether each element of a parameter is updated by itself.

    ``elementwise`` says that an update of one element depends on no other: only then do a parameter cut in
    pieces and its state cut the same way train on as before.
    """

    name: str
    slots: tuple[SlotSchema, ...]
    is_elementwise: bool = True
    # An option that no other class of torch.optim has: where only a file is there, it tells the class.
    unique_option: str = ""
    # LBFGS keeps one state for all its parameters, under the first.
    has_shared_state: bool = False

    def slots_for(self, options: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[SlotSchema, ...]:
        """Return the slots that a parameter of ``shape`` has in a group with ``options``, once it was stepped."""
        return tuple(slot for slot in self.slots if _asked(slot, options) and _factors(slot, shape))

    def slot(self, name: str) -> SlotSchema | None:
        """Return the slot called ``name``, or None where the class has none of that name."""
        return next((slot for slot in self.slots if slot.name == name), None)


def _asked(slot: SlotSchema, options: Mapping[str, Any]) -> bool:
    return slot.enabled_by is None or bool(options.get(slot.enabled_by))


def _factors(slot: SlotSchema, shape: tuple[int, ...]) -> bool:
    """Tell Adafactor's two forms apart: rows and columns where there are both, else a variance for each element."""
    if slot.layout in {"row", "column"}:
        return len(shape) > 1
    return slot.name != "variance" or len(shape) < 2


def _squares(*names: str, exact: bool = False) -> tuple[SlotSchema, ...]:
    return tuple(SlotSchema(name, is_non_negative=True, needs_parameter_dtype=exact) for name in names)


_STEP = SlotSchema("step", "scalar", is_non_negative=True)
_MEAN = SlotSchema("exp_avg", needs_parameter_dtype=True)
_ADAM = (
    _STEP,
    _MEAN,
    *_squares("exp_avg_sq"),
    SlotSchema("max_exp_avg_sq", enabled_by="amsgrad", is_non_negative=True),
)

SCHEMAS: Mapping[str, OptimizerSchema] = {
    schema.name: schema
    for schema in (
        OptimizerSchema("ASGD", (_STEP, SlotSchema("eta", "scalar"), SlotSchema("mu", "scalar"), SlotSchema("ax"))),
        OptimizerSchema("Adadelta", (_STEP, *_squares("square_avg", "acc_delta"))),
        OptimizerSchema(
            "Adafactor",
            (
                _STEP,
                SlotSchema("row_var", "row", is_non_negative=True, needs_parameter_dtype=True),
                SlotSchema("col_var", "column", is_non_negative=True, needs_parameter_dtype=True),
                *_squares("variance", exact=True),
            ),
            is_elementwise=False,
            unique_option="beta2_decay",
        ),
        OptimizerSchema(
            "Adagrad",
            (_STEP, SlotSchema("sum", is_non_negative=True, initial_value_option="initial_accumulator_value")),
        ),
        OptimizerSchema("Adam", _ADAM),
        OptimizerSchema("AdamW", _ADAM),
        OptimizerSchema("Adamax", (_STEP, _MEAN, *_squares("exp_inf"))),
        OptimizerSchema(
            "LBFGS",
            tuple(
                SlotSchema(name, "other")
                for name in (
                    *("func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag"),
                    *("prev_flat_grad", "prev_loss", "al"),
                )
            ),
            is_elementwise=False,
            unique_option="history_size",
            has_shared_state=True,
        ),
        OptimizerSchema(
            "Muon",
            (SlotSchema("momentum_buffer", is_optional=True, needs_parameter_dtype=True),),
            is_elementwise=False,
            unique_option="ns_coefficients",
        ),
        OptimizerSchema("NAdam", (_STEP, SlotSchema("mu_product", "scalar"), _MEAN, *_squares("exp_avg_sq"))),
        OptimizerSchema("RAdam", (_STEP, _MEAN, *_squares("exp_avg_sq"))),
        OptimizerSchema(
            "RMSprop",
            (
                _STEP,
                *_squares("square_avg"),
                SlotSchema("momentum_buffer", enabled_by="momentum"),
                SlotSchema("grad_avg", enabled_by="centered", needs_parameter_dtype=True),
            ),
        ),
        OptimizerSchema(
            "Rprop",
            (_STEP, SlotSchema("prev"), SlotSchema("step_size", is_non_negative=True, initial_value_option="lr")),
        ),
        OptimizerSchema("SGD", (SlotSchema("momentum_buffer", enabled_by="momentum", is_optional=True),)),
        OptimizerSchema("SparseAdam", (_STEP, SlotSchema("exp_avg"), *_squares("exp_avg_sq"))),
    )
}


def schema_of(kind: type) -> OptimizerSchema | None:
    """Return the schema of a class of torch.optim, or of one that inherits the ``step`` of such a class; else None."""
    for base in kind.__mro__:
        if f"{base.__module__}.".startswith("torch.optim."):
            return SCHEMAS.get(base.__name__)
        if "step" in vars(base) or "_init_group" in vars(base):
            return None
    return None


def schema_from_options(options: Mapping[str, Any]) -> OptimizerSchema | None:
    """Return the schema that the options of a group tell, where they have the mark of one."""
    return next(
        (schema for schema in SCHEMAS.values() if schema.unique_option and schema.unique_option in options), None
    )
