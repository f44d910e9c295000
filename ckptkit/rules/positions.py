"""Give names to numbered tensors, by the order of the parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import listed, plural, quoted
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import named_of
from ckptkit.core.torch_types import Module
from ckptkit.errors import RuleError
from ckptkit.wrappers.positions import PositionalList, find_positions

__all__ = ["NamedByPosition", "PositionNames", "name_positions"]

_MOST_NAMED = 3
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # that a state_dict shows to be buffers
_IN_ORDER = ("torch-zip", "torch-legacy")  # formats that keep the order of the state_dict
_GIVE_MODEL = "give the model whose parameters are in the list, or write rules for the numbers: --rules FILE"
_ORDER = "the order of the parameters"


class _Parameter(NamedTuple):
    """A parameter of a model: its names in the state_dict, several if it is tied, and whether it trains."""

    names: tuple[str, ...]
    trains: bool


class NamedByPosition(str):
    """A note which says that tensors got their names by the order of the parameters."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class PositionNames:
    """The new names of each numbered tensor, the reason for each key that is left out, and a sentence about both."""

    names: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str]
    note: NamedByPosition

    @property
    def rule(self) -> str:
        """The words that tell why a tensor has its name."""
        return f"by {_ORDER}"


def name_positions(found: Mapping[str, TensorInfo], expected: Checkpoint) -> PositionNames | None:
    """Return the names of numbered tensors in the order of ``parameters()`` of ``expected``; None if keys are names.

    ``expected`` is a live model, or a torch file of its state_dict, which has the same order. The list has all
    parameters or those that train, whichever is as long, or any others that only fit in one way. All shapes must fit.

    Raises ``RuleError`` where the list does not fit the model, and where it fits in two ways. Where the name of the
    list does not say that it is one, the tensors keep their keys then.
    """
    numbered = find_positions({key: info.shape for key, info in found.items()})
    if numbered is None or any(key in expected for key in numbered.keys):
        return None
    parameters = _parameters(expected)
    if not parameters:
        return None
    try:
        chosen, which = _choose(numbered, [found[key].shape for key in numbered.keys], parameters, expected)
    except RuleError:
        if numbered.is_certain:
            raise
        return None
    in_list = {name for parameter in chosen for name in parameter.names}
    of_model = {name for parameter in parameters for name in parameter.names}
    buffers = [key for key in expected if key not in of_model]
    others = [key for key in expected if key in of_model and key not in in_list]
    shapes = [found[key].shape for key in numbered.keys]
    same = "; equal shapes were taken in this order" if len(set(shapes)) < len(shapes) else ""
    note = f"{numbered.name} has no names: its {plural(len(chosen), 'tensor')} got those of {which}, and all shapes fit"
    for keys, noun, nouns in ((buffers, "buffer is", "buffers are"), (others, "parameter is", "parameters are")):
        if keys:
            same += f"; {plural(len(keys), noun, nouns)} not in the list: {listed(keys, _MOST_NAMED)}"
    names = {key: parameter.names for key, parameter in zip(numbered.keys, chosen, strict=True)}
    why = f"beside {numbered.name}, which is read"
    return PositionNames(names, dict.fromkeys(numbered.others, why), NamedByPosition(note + same))


def _parameters(expected: Checkpoint) -> Sequence[_Parameter]:
    """Return the parameters of a model in their order; of a torch file those that its keys do not show as buffers."""
    if expected.model is not None:
        return _live_parameters(expected.model, expected)
    if expected.format not in _IN_ORDER:
        return ()
    first = {key: keys for keys in tied_keys(expected.values()) for key in keys}
    return [
        _Parameter(tuple(first.get(key, (key,))), trains=True)
        for key in expected
        if key.rpartition(".")[2] not in _BUFFERS and first.get(key, (key,))[0] == key
    ]


def _live_parameters(model: Module, expected: Checkpoint) -> Sequence[_Parameter]:
    names: dict[int, list[str]] = {}
    trains: dict[int, bool] = {}
    for name, parameter in named_of(model, "parameters"):
        trains[id(parameter)] = bool(parameter.requires_grad)
        names.setdefault(id(parameter), []).append(name)
    stored = {key: tuple(name for name in own if name in expected) for key, own in names.items()}
    return [_Parameter(own, trains[key]) for key, own in stored.items() if own]


def _choose(
    numbered: PositionalList,
    shapes: Sequence[tuple[int, ...]],
    parameters: Sequence[_Parameter],
    expected: Checkpoint,
) -> tuple[Sequence[_Parameter], str]:
    trained = [parameter for parameter in parameters if parameter.trains]
    wanted: Sequence[_Parameter] = []
    for candidates, which in ((parameters, "all parameters"), (trained, "the parameters that train")):
        if len(candidates) == len(shapes):
            wanted = wanted or candidates
            if _misfit(shapes, candidates, expected) is None:
                return candidates, which
    if wanted:
        at = _misfit(shapes, wanted, expected) or 0
        name = wanted[at].names[0]
        raise RuleError(
            f"{quoted(numbered.keys[at])} is {list(shapes[at])}, and the parameter at its place, {quoted(name)}, is "
            f"{list(expected[name].shape)}",
            hint=_GIVE_MODEL,
        )
    first, last = (_embedded(shapes, parameters, expected, from_end=from_end) for from_end in (False, True))
    if first is None or last is None:
        counts = f"{plural(len(parameters), 'parameter')}, of which {len(trained):,} train"
        raise RuleError(
            f"{numbered.name} has {plural(len(shapes), 'tensor')}, and does not fit the model, which has {counts}",
            hint=_GIVE_MODEL,
        )
    for at, (one, other) in enumerate(zip(first, last, strict=True)):
        if one is not other:
            raise RuleError(
                f"{numbered.name} has {len(shapes):,} of {plural(len(parameters), 'parameter')}, and the shapes do not "
                f"tell which: {quoted(numbered.keys[at])} is {quoted(one.names[0])} or {quoted(other.names[0])}",
                hint=_GIVE_MODEL,
            )
    return first, f"{len(first):,} of {plural(len(parameters), 'parameter')}, in the only way that fits"


def _misfit(shapes: Sequence[tuple[int, ...]], parameters: Sequence[_Parameter], expected: Checkpoint) -> int | None:
    """Return the first place where the shapes differ."""
    pairs = zip(shapes, parameters, strict=True)
    return next((at for at, (shape, one) in enumerate(pairs) if expected[one.names[0]].shape != shape), None)


def _embedded(
    shapes: Sequence[tuple[int, ...]], parameters: Sequence[_Parameter], expected: Checkpoint, *, from_end: bool
) -> list[_Parameter] | None:
    """Return the first parameters, or the last, that have these shapes in this order; None if there are none.

    There is exactly one way to take parameters of these shapes if the first and the last way are the same.
    """
    step = -1 if from_end else 1
    waiting = list(shapes[::step])[::-1]
    chosen = []
    for parameter in parameters[::step]:
        if waiting and expected[parameter.names[0]].shape == waiting[-1]:
            waiting.pop()
            chosen.append(parameter)
    return None if waiting else chosen[::step]
