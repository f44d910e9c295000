"""The optimizers of torch.optim: the state that each class keeps for a parameter, and the options of its groups."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptkit.core.torch_types import Tensor

__all__ = [
    "OPTIONS",
    "SCHEMAS",
    "GroupOption",
    "OptimizerSchema",
    "OptionKind",
    "SlotSchema",
    "adam_tells_its_decay",
    "constructed_state",
    "initial_lr",
    "options_of_kind",
    "overwritten_options",
    "scheduled_options",
    "schema_from_options",
    "schema_of",
    "source_of_names",
    "torch_options",
]

Layout = Literal["elementwise", "scalar", "row", "column", "other"]
OptionKind = Literal["members", "name", "recipe", "schedule", "speed", "training"]


@dataclass(frozen=True, slots=True)
class GroupOption:
    """One key of a param group, and the effect of a change of its value.

    - ``members``: the key holds the parameters, or their names.
    - ``name``: the key names the group, for people.
    - ``recipe``: training scripts keep the value in the group, and no class of torch.optim reads it.
    - ``schedule``: a scheduler keeps the value in the group.
    - ``speed``: the value changes the speed or the memory of a step, but not its result.
    - ``training``: the value changes the result of a step.
    """

    name: str
    kind: OptionKind
    # A scheduler that keeps this key in the group overwrites these options, so their own values are lost.
    overwrites: tuple[str, ...] = ()
    # The option that this value multiplies, once a scheduler or a script applies it.
    multiplies: str = ""
    # torch.optim got this option after its first release: older files do not have it.
    is_recent: bool = False
    # load_state_dict adds this option to the defaults of the optimizer, but not to its groups.
    is_in_defaults_only: bool = False


# Comparisons of groups, locks and the loading of optimizer state all read this table; no other module lists options.
# An option that is not listed is compared as an option that changes training.
OPTIONS: Mapping[str, GroupOption] = {
    option.name: option
    for option in (
        GroupOption("params", "members"),
        GroupOption("param_names", "members"),
        GroupOption("name", "name"),
        GroupOption("group_name", "name"),
        GroupOption("layer_id", "recipe"),
        GroupOption("base_lr", "recipe"),
        GroupOption("lr_scale", "recipe", multiplies="lr"),
        GroupOption("lr_mult", "recipe", multiplies="lr"),
        GroupOption("decay_mult", "recipe", multiplies="weight_decay"),
        GroupOption("initial_lr", "schedule"),
        GroupOption("max_lr", "schedule", overwrites=("lr",)),
        GroupOption("min_lr", "schedule"),
        GroupOption("swa_lr", "schedule", overwrites=("lr",)),
        GroupOption("base_momentum", "schedule"),
        GroupOption("max_momentum", "schedule", overwrites=("lr", "momentum", "betas")),
        GroupOption("foreach", "speed", is_recent=True),
        GroupOption("fused", "speed", is_recent=True),
        GroupOption("capturable", "speed", is_recent=True),
        GroupOption("differentiable", "speed", is_recent=True, is_in_defaults_only=True),
        GroupOption("maximize", "training", is_recent=True),
        GroupOption("decoupled_weight_decay", "training", is_recent=True),
    )
}


def options_of_kind(*kinds: OptionKind) -> frozenset[str]:
    """Return the names of all options in ``OPTIONS`` of these kinds."""
    return frozenset(option.name for option in OPTIONS.values() if option.kind in kinds)


def overwritten_options(options: Mapping[str, object]) -> frozenset[str]:
    """Return the options of a group that a scheduler overwrites, so that their original values are not known."""
    return frozenset(name for option in OPTIONS.values() if option.name in options for name in option.overwrites)


def scheduled_options(
    live: Mapping[str, object], saved: Mapping[str, object], equal: Callable[[object, object], bool]
) -> frozenset[str]:
    """Return the options that a scheduler of the run made different in a live and a saved group.

    A live group may have no scheduler yet. Its own ``lr`` is then what a scheduler would start from. The saved ``lr``
    was moved by the scheduler if the saved ``initial_lr`` is the same. ``equal`` compares two values of an option.
    """
    schedule_keys = options_of_kind("schedule")
    overwritten = overwritten_options(saved)
    if schedule_keys & live.keys():
        overwritten &= overwritten_options(live)
    elif "lr" in overwritten:
        overwritten |= {"initial_lr"}
    if "initial_lr" in saved and equal(initial_lr(live), initial_lr(saved)):
        overwritten |= {"lr"}
    return overwritten


def initial_lr(options: Mapping[str, object]) -> object:
    """Return the learning rate of a group before schedulers changed it, or None where the group has none."""
    return options.get("initial_lr", options.get("lr"))


@dataclass(frozen=True, slots=True)
class SlotSchema:
    """One entry of the state of a parameter, under torch's own name.

    ``layout`` relates the shape of the entry to the shape of the parameter. ``elementwise``: the same shape.
    ``scalar``: one number. ``row`` and ``column``: one number for each row or column of the last two dimensions.
    ``other``: a shape that does not follow from the parameter.
    """

    name: str
    layout: Layout = "elementwise"
    # The optimizer keeps the slot only where this option of the group is set; None: always.
    enabled_by: str | None = None
    # A step creates the slot where it is missing, instead of failing.
    is_optional: bool = False
    # A step takes the square root of the slot or divides by it: a negative value makes the parameter NaN.
    is_non_negative: bool = False
    # A step fails where the slot has another dtype than the parameter (lerp_); elsewhere torch promotes.
    needs_parameter_dtype: bool = False
    # The option that holds the initial value of each element; empty where the initial value is zero.
    initial_value_option: str = ""

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of the slot for a parameter of shape ``parameter``, or None where it does not follow."""
        if self.layout == "elementwise":
            return parameter
        if self.layout == "row":
            return (*parameter[:-1], 1)
        if self.layout == "column":
            return (*parameter[:-2], 1, parameter[-1])
        return () if self.layout == "scalar" else None

    def mismatch(self, value: object, shape: tuple[int, ...] | None, parameter: tuple[int, ...]) -> str | None:
        """Return the shape or the type of ``value`` if a parameter of shape ``parameter`` cannot have it in this slot.

        ``shape`` is the shape of ``value``, or None if it is not a tensor. Return None for a value that fits.
        """
        expected = self.shape(parameter)
        if expected is None or value is None:
            return None
        if shape is None:
            is_number = self.layout == "scalar" and isinstance(value, int | float)
            return None if is_number else f"a {type(value).__name__}"
        fits = math.prod(shape) == 1 if self.layout == "scalar" else shape == expected
        return None if fits else f"{shape}"


@dataclass(frozen=True, slots=True)
class OptimizerSchema:
    """The slots that a class of torch.optim can keep for a parameter.

    ``is_elementwise`` means that the update of one element depends on no other element. Only then can a parameter and
    its state be split in the same way, and training continues as before.
    """

    name: str
    slots: tuple[SlotSchema, ...]
    is_elementwise: bool = True
    # An option that no other class of torch.optim has: it identifies the class of a file.
    unique_option: str = ""
    # LBFGS keeps one state for all its parameters, under the first parameter.
    has_shared_state: bool = False

    def slots_for(self, options: Mapping[str, object], shape: tuple[int, ...]) -> tuple[SlotSchema, ...]:
        """Return the slots that a parameter of ``shape`` has in a group with ``options`` after its first step."""
        return tuple(slot for slot in self.slots if _is_enabled(slot, options) and _has_form_for(slot, shape))

    def slot(self, name: str) -> SlotSchema | None:
        """Return the slot called ``name``, or None where the class has no such slot."""
        return next((slot for slot in self.slots if slot.name == name), None)


def _is_enabled(slot: SlotSchema, options: Mapping[str, object]) -> bool:
    return slot.enabled_by is None or is_set(options, slot.enabled_by)


def is_equal(left: Any, right: Any) -> bool:
    """Return whether two values of an optimizer are equal; arrays are equal where all their elements are."""
    try:
        same = left == right
        return bool(same.all()) if hasattr(same, "all") else bool(same)
    except Exception:  # noqa: BLE001 - the values may be of any class
        return left is right


def is_set(options: Mapping[str, object], name: str) -> bool:
    """Return whether an option is true; one that is neither true nor false, such as an array, counts as set."""
    try:
        return bool(options.get(name))
    except Exception:  # noqa: BLE001 - the value may be of any class
        return True


def _has_form_for(slot: SlotSchema, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter of this shape has the slot.

    Only Adafactor depends on the shape: it keeps rows and columns for a matrix, else a variance of each element.
    """
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
    """Return the schema of a class of torch.optim, or of a subclass that inherits its ``step``; else None."""
    for base in kind.__mro__:
        if f"{base.__module__}.".startswith("torch.optim."):
            return SCHEMAS.get(base.__name__)
        if "step" in vars(base) or "_init_group" in vars(base):
            return None
    return None


def schema_from_options(options: Mapping[str, object]) -> OptimizerSchema | None:
    """Return the schema that has its unique option among the options of a group; else None."""
    return next(
        (schema for schema in SCHEMAS.values() if schema.unique_option and schema.unique_option in options), None
    )


def constructed_state(schema: OptimizerSchema, options: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the state that the class makes for a new parameter when it is built: empty for nearly all classes.

    A step of a class that makes state in its constructor fails for a parameter without state. In some versions of
    torch, Adagrad is such a class.
    """
    import torch

    taken = [slot.initial_value_option for slot in schema.slots if slot.initial_value_option]
    if not taken:
        return {}
    built = getattr(torch.optim, schema.name)([parameter], **{name: options[name] for name in taken if name in options})
    return dict(built.state.get(parameter, {}))


@functools.cache
def source_of_names() -> str:
    """Return what an optimizer of this torch must be built from, so that it records the names of its parameters.

    The optimizers of older versions of torch refuse ``(name, parameter)`` pairs, but keep ``param_names`` in a group.
    """
    import torch

    try:
        torch.optim.SGD([("weight", torch.nn.Parameter(torch.zeros(())))], lr=0.1)
    except TypeError:
        return "build_param_groups(model, spec)"
    return "model.named_parameters()"


@functools.cache
def adam_tells_its_decay() -> bool:
    """Return whether the Adam of this torch writes into its groups whether its weight decay is decoupled."""
    import torch

    return "decoupled_weight_decay" in _constructor_names(torch.optim.Adam)


@functools.cache
def torch_options() -> tuple[str, ...]:
    """Return every option that a class of torch.optim takes."""
    import torch

    classes = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    options = [key for kind in classes if issubclass(kind, torch.optim.Optimizer) for key in _constructor_names(kind)]
    return tuple(sorted(set(options) - {"self", "params", "defaults"}))


def _constructor_names(kind: type) -> Iterable[str]:
    return inspect.signature(kind.__init__).parameters  # type: ignore[misc]
