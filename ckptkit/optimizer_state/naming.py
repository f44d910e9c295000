"""Find the name of each parameter in a state: given, stored, by position, or inferred from shapes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from ckptkit.core.arguments import require_flags, require_strings, require_type
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.live_prefix import is_live_path
from ckptkit.core.findings import Finding
from ckptkit.core.patterns import drop_options
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import CkptkitError, FormatError, PlanError
from ckptkit.formats import open_checkpoint, split_path
from ckptkit.inputs import CheckpointLike
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.forms import FoundState, as_named, read_state
from ckptkit.optimizer_state.given_names import compare_with_weights
from ckptkit.optimizer_state.model import OptimizerState, is_less, keeps_less, parameter_shape
from ckptkit.optimizer_state.positions import GIVE_MODEL, GIVE_NAMES, Groups, Parameters, Shape, name_positions
from ckptkit.param_groups.properties import parameter_table
from ckptkit.wrappers.envelopes import SeveralWeightsError

__all__ = [
    "ModelLike",
    "NamesLike",
    "name_by_position",
    "naming_findings",
    "parameters_of",
    "structure_findings",
    "to_named",
    "to_named_for",
]

ModelLike = CheckpointLike | Mapping[str, Shape]
NamesLike = Sequence[str] | ModelLike

_MAX_SHOWN = 4
_OTHER_READINGS = (
    'to read otherwise, give names="model" for the order of the model, or the names in the order of the file'
)


def parameters_of(model: Parameters | ModelLike) -> Parameters:
    """Return the parameters of a Module, or the tensors of a Checkpoint or a mapping that can be parameters.

    A path is opened here, and closed at the end; ``py:package.module:callable`` builds a Module. ``model`` can also be
    a mapping of names to shapes. A tied parameter has its first name, as in ``named_parameters()``, and an
    uninitialised one has the shape ``()``. Raises ``ModelError`` for any other type.
    """
    if isinstance(model, Parameters):
        return model
    if isinstance(model, Mapping) and not isinstance(model, Checkpoint) and all(map(_is_shape, model.values())):
        shapes = cast("Mapping[str, Shape]", model)
        return Parameters({str(name): tuple(shape) for name, shape in shapes.items()})
    parameters = parameter_table(cast("CheckpointLike", model)).parameters
    is_live = hasattr(model, "named_parameters") or (isinstance(model, str) and is_live_path(model))
    return Parameters(
        {parameter.name: parameter.shape or () for parameter in parameters},
        frozenset(info.name for parameter in parameters if not parameter.trainable for info in parameter.named()),
        is_certain=is_live,
        source="the model" if is_live else "the model's checkpoint",
        aliases={alias.name: parameter.name for parameter in parameters for alias in parameter.aliases},
    )


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(size) is int for size in value)


def to_named(
    state: FoundState | Checkpoint | Mapping[str, object],
    names: NamesLike | None = None,
    *,
    model: ModelLike | None = None,
    groups: Groups | None = None,
    drop_strays: bool = False,
) -> OptimizerState:
    """Return the state of an optimizer by the names of its parameters.

    ``state`` is an open Checkpoint of such a state, or a live ``state_dict()``, in any form of torch. If it only counts
    its parameters, ``names`` must tell which they are. ``names`` is a list of all names in the order of the groups, or
    a model: a Module, a Checkpoint or a mapping of tensors. The order and the shapes of the model must then allow
    exactly one assignment. If the state has names of its own, they are compared with such a model. Without ``names``,
    the weights in the file of the state are that model, if the file has weights.

    A list of names must fit the shapes of ``model``, or else of the weights in the file of the state. These weights can
    be of another model, so they refuse a list only if they have all shapes of the state, under other names.

    ``groups`` has the names in each group of the optimizer that will load the state, if there is one. A state without
    names is then read by position, as ``load_state_dict`` reads it, if the sizes of the groups and all shapes agree.
    ``names`` must be a model. The result tells in ``evidence`` how the state was read.
    With ``drop_strays``, state of parameters in no group is left out instead of refused.

    Raises ``FormatError`` for positions that are used twice or missing, and for state of no group. Raises ``PlanError``
    if names are missing, do not fit the shapes, or are ambiguous; the message lists the parameters in doubt.

    Example:
        >>> from ckptkit.optimizer_state import to_named
        >>> model = torch.nn.Linear(2, 2)
        >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
        >>> state.names
        ('weight', 'bias')
    """
    require_flags(drop_strays=drop_strays)
    if groups is not None:
        takes = "a list with the names in each group"
        require_type(groups, Sequence, "groups", takes)
        for members in groups:
            require_strings(members, "groups", takes)
    found = state if isinstance(state, FoundState) else read_state(state)
    if drop_strays:
        params = {param for group in found.groups for param in group.params}
        found = replace(found, state={key: slots for key, slots in found.state.items() if key in params})
    findings = tuple(structure_findings(found))
    for finding in findings:
        if finding.severity == "error":
            call = "drop_strays=True drops it" if finding.code == codes.STATE_STRAY.name else None
            raise FormatError(finding.message, hint=finding.hint or None, call=call, path=found.path or None)
    try:
        return replace(_named(found, names, groups, model), findings=findings)
    except PlanError as error:
        error.path = error.path or found.path or None
        if names is not None and _weights_tell_names(found):
            error.hint = "leave out the model and the names: the weights in the same file tell the names"
        raise


def _weights_tell_names(found: FoundState) -> bool:
    """Return whether the weights in the file of a state without names tell all names."""
    with contextlib.suppress(PlanError):
        return found.form == "indexed" and bool(_named(found).names)
    return False


def _named(
    found: FoundState,
    names: NamesLike | None = None,
    groups: Groups | None = None,
    compared: ModelLike | None = None,
) -> OptimizerState:
    if isinstance(names, str | bytes):
        raise PlanError(f"the names are one string, {quoted(str(names))}", hint="give a list of strings, or a model")
    if isinstance(names, Sequence):
        params = [param for group in found.groups for param in group.params]
        given = _given_names(params, names)
        return as_named(found, given, f"by the list of names; {_compare_given(found, given, compared)}")
    if compared is not None:
        raise PlanError("model is for a list of names", hint="give the model as names")
    own = _own_names(found)
    beside = _parameters_beside(found) if names is None and own is None else None
    model = beside if names is None else parameters_of(names)
    if own is not None:
        if model is not None:
            _compare_with_model(found, own, model)
        return as_named(found, own)
    if model is None:
        raise PlanError("the state numbers its parameters and does not contain their names", hint=GIVE_MODEL)
    inferred, evidence = name_positions(found, model, groups)
    return as_named(found, inferred, evidence)


def _compare_given(found: FoundState, names: Mapping[object, str], model: ModelLike | None) -> str:
    """Return words that tell what the given names were compared with; raise ``PlanError`` if they do not fit."""
    if model is not None:
        parameters = parameters_of(model)
        _compare_with_model(found, names, parameters, are_given=True)
        known = sum(parameter_shape(found.state.get(param, {})) is not None for param in names)
        return f"{known:,} of {plural(len(names), 'shape')} known, and all fit {parameters.source}"
    weights = _parameters_beside(found)
    if weights is None:
        return "not compared with the shapes of weights"
    return compare_with_weights(found, names, weights)


def _parameters_beside(found: FoundState) -> Parameters | None:
    """Return the parameters among the weights in the file of a state, or None if the file has no weights.

    Of the trained weights and averages of them, the trained weights count.
    """
    if not found.checkpoint.envelope:
        return None
    path = split_path(found.path)[0]
    try:
        with _trained_weights(path) as weights:
            is_other = weights.envelope != found.checkpoint.envelope and len(weights) > 0
            return parameters_of(weights) if is_other else None
    except CkptkitError:
        return None


def _trained_weights(path: str) -> Checkpoint:
    try:
        return open_checkpoint(path)
    except SeveralWeightsError as error:
        if error.trained is None:
            raise
        return open_checkpoint(f"{path}::{error.trained}")


def to_named_for(found: FoundState, model: ModelLike, groups: Groups, *, drop_strays: bool = False) -> OptimizerState:
    """Return the state as an optimizer of ``model`` loads it; ``groups`` has the names in each of its groups.

    If the model does not tell the names, or has other shapes, the weights in the file of the state tell them where they
    can. Raises what ``to_named`` raises.
    """
    try:
        reading = to_named(found, model, groups=groups, drop_strays=drop_strays)
    except PlanError:
        with contextlib.suppress(PlanError):
            return to_named(found, drop_strays=drop_strays)
        raise
    if found.form == "indexed" and found.checkpoint.envelope:
        live = parameters_of(model)
        shapes = ((live.shape(name), parameter_shape(slots)) for name, slots in reading.state.items())
        if any(None not in pair and pair[0] != pair[1] for pair in shapes):
            with contextlib.suppress(PlanError):
                return to_named(found, drop_strays=drop_strays)
    return reading


def naming_findings(state: OptimizerState) -> Iterator[Finding]:
    """Yield a note that tells how a state without names was read."""
    if state.form == "indexed" and state.evidence:
        yield codes.UNNAMED.finding("", f"the state has no names, so they were given {state.evidence}", _OTHER_READINGS)


def name_by_position(found: FoundState) -> OptimizerState:
    """Return the state with the positions as names, for use when no names are known."""
    keys = dict.fromkeys([*(param for group in found.groups for param in group.params), *found.state])
    return as_named(found, {key: str(key) for key in keys})


def _own_names(found: FoundState) -> dict[object, str] | None:
    if found.form == "param-names":
        pairs = (pair for group in found.groups for pair in zip(group.params, group.param_names or (), strict=True))
        return {param: str(name) for param, name in pairs}
    if found.form == "indexed":
        return None
    return {param: str(param) for group in found.groups for param in group.params}


def _given_names(params: Sequence[object], names: Sequence[object]) -> dict[object, str]:
    if len(names) != len(params):
        raise PlanError(f"{plural(len(names), 'name')} for {plural(len(params), 'parameter')}", hint=GIVE_MODEL)
    if not all(isinstance(name, str) and name for name in names):
        raise PlanError("a name is not a string, or is empty", hint=GIVE_MODEL)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise PlanError(f"{listed(repeated, _MAX_SHOWN)} is given twice", hint=GIVE_MODEL)
    return dict(zip(params, map(str, names), strict=True))


def _compare_with_model(
    found: FoundState, names: Mapping[object, str], model: Parameters, *, are_given: bool = False
) -> None:
    """Raise ``PlanError`` if the model lacks a name, or has another shape; ``are_given`` names are from the user."""
    in_order = f"give the names that {model.source} has, in the order of the groups"
    shapes = {param: model.shapes.get(model.aliases.get(own, own), ()) for param, own in names.items()}
    allows_less = keeps_less(shapes, found.state)
    unknown = [own for own in names.values() if model.aliases.get(own, own) not in model.shapes]
    if unknown:
        raise PlanError(
            f"the {'list of names' if are_given else 'state'} has {listed(unknown, _MAX_SHOWN)}, which the model does "
            "not have",
            hint=in_order
            if are_given
            else "rename them first: ckpt optim remap PATH -o OUT --rename OLD=NEW; or drop them: ckpt optim prune "
            f"PATH -o OUT {drop_options(unknown)}",
        )
    for param, own in names.items():
        name = model.aliases.get(own, own)
        shape = parameter_shape(found.state.get(param, {}))
        if shape is not None and shape != shapes[param] and not (allows_less and is_less(shape, shapes[param])):
            raise PlanError(
                f"the state of {quoted(name)} has shape {list(shape)}, but the parameter has shape "
                f"{list(model.shapes[name])}",
                hint=in_order
                if are_given
                else "torch overwrites param_names when it loads a file, so the names can be in another order",
            )


def structure_findings(found: FoundState) -> Iterator[Finding]:
    """Yield a finding for each contradiction: repeated or missing positions, state of no group, wrong param_names."""
    params = [param for group in found.groups for param in group.params]
    counts = Counter(params)
    repeated = [param for param, count in counts.items() if count > 1]
    if repeated:
        verb = "is" if len(repeated) == 1 else "are"
        yield codes.PARAM_TWICE.finding(
            str(repeated[0]),
            f"{listed(repeated, _MAX_SHOWN)} {verb} in the groups more than once",
            "the optimizer held a parameter twice, so its positions do not tell which parameter is which",
        )
    if found.form in ("indexed", "param-names") and not repeated:
        missing = sorted(set(range(len(params))) - set(params), key=int)
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            yield codes.POSITION_MISSING.finding(
                str(missing[0]),
                f"the positions must be 0 to {len(params) - 1}, but {listed(missing, _MAX_SHOWN)} {verb} missing",
                "the file was edited or is damaged",
            )
    strays = [key for key in found.state if key not in counts]
    if strays:
        yield codes.STATE_STRAY.finding(
            str(strays[0]),
            f"there is state of {listed(strays, _MAX_SHOWN)}, which no group has",
            "drop it: ckpt optim prune PATH -o OUT",
        )
    if found.form == "param-names":
        yield from _param_names_findings(found)


def _param_names_findings(found: FoundState) -> Iterator[Finding]:
    for number, group in enumerate(found.groups):
        names = group.param_names
        if names is None or len(names) != len(group.params) or not all(isinstance(name, str) for name in names):
            count = "no list of names" if names is None else plural(len(names), "name")
            yield codes.NAMES_COUNT.finding(
                "", f"group {number} has {count} for {plural(len(group.params), 'parameter')}", GIVE_NAMES
            )
            return
    counts = Counter(name for group in found.groups for name in group.param_names or ())
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        yield codes.NAMES_TWICE.finding(
            str(repeated[0]), f"param_names gives {listed(repeated, _MAX_SHOWN)} to several parameters", GIVE_NAMES
        )
