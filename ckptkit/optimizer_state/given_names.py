"""The names of parameters that a user gave: read from a file, and compared with the weights in the file of a state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ckptkit.core.config_files import MOST_NAMES, json_value, read_text_file
from ckptkit.core.files.places import clean_path
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import PlanError, RuleError
from ckptkit.optimizer_state.forms import FoundState
from ckptkit.optimizer_state.model import parameter_shape
from ckptkit.optimizer_state.positions import Parameters
from ckptkit.param_groups.parameters import bare_name

__all__ = ["compare_with_weights", "read_names_file"]

_MAX_SHOWN = 4


def read_names_file(path: str) -> list[str]:
    """Return the names in a file: a JSON list, or words, such as one name a line.

    Raises ``PathError`` if the file cannot be read, and ``RuleError`` if its content is not a list of names.
    """
    path = clean_path(path)
    text = read_text_file(path)
    if not text.lstrip().startswith("["):
        names = text.split(maxsplit=MOST_NAMES)
        if len(names) > MOST_NAMES:
            raise RuleError(f"more than {MOST_NAMES:,} names", path=path)
        return names
    hint = 'write ["first.weight", "first.bias"], or one name a line'
    try:
        items = json_value(text)
    except ValueError as error:
        raise RuleError(f"not a valid JSON list of names: {error}", hint=hint, path=path) from None
    assert isinstance(items, list)  # noqa: S101 - the text starts with a bracket
    strings = [name for name in items if isinstance(name, str)]
    if len(strings) != len(items):
        raise RuleError("not a valid JSON list of names: an item is not a string", hint=hint, path=path)
    return strings


def compare_with_weights(found: FoundState, names: Mapping[object, str], weights: Parameters) -> str:
    """Return words that tell how many of the given names fit the weights in the file of a state.

    ``names`` has the name of each parameter of the state. The weights can be of another model, or edited since the
    state was saved. So a misfit is refused only if these weights have all shapes of the state, under other names. State
    that has the shape of a transposed weight is never refused.

    Raises ``PlanError`` for such a list of names.
    """
    shapes = {param: parameter_shape(found.state.get(param, {})) for param in names}
    keys = _keys(list(names.values()), weights)
    misfits = [
        (place, name, shape, expected)
        for place, (param, name) in enumerate(names.items(), 1)
        if (shape := shapes[param]) is not None
        if name in keys and (expected := weights.shapes[keys[name]]) != shape
    ]
    wrong = [misfit for misfit in misfits if misfit[2] != misfit[3][::-1]]
    state_shapes = Counter(shape for shape in shapes.values() if shape is not None)
    if wrong and state_shapes <= Counter(weights.shapes.values()):
        place, name, shape, expected = wrong[0]
        raise PlanError(
            f"the list of names does not fit: the state of name {place:,}, {quoted(name)}, has shape {list(shape)}, "
            f"but the weight in the file has shape {list(expected)}",
            hint="give the names in the order of the groups; if other weights were trained, add --model MODEL",
        )
    return _describe(names, keys, [name for _, name, _, _ in misfits], sum(state_shapes.values()))


def _describe(names: Mapping[object, str], keys: Mapping[str, str], misfits: Sequence[str], known: int) -> str:
    if not keys:
        return "not compared with shapes, because the weights in the file have none of these names"
    unknown = [name for name in names.values() if name not in keys]
    parts = [f"{known:,} of {plural(len(names), 'shape')} known"]
    if misfits:
        parts.append(f"{listed(misfits, _MAX_SHOWN)} of another shape in the weights of the file")
    if unknown:
        parts.append(f"the weights in the file have no {listed(unknown, _MAX_SHOWN)}")
    return ", ".join(parts) if len(parts) > 1 else f"{parts[0]}, and all fit the weights in the file"


def _keys(names: Sequence[str], weights: Parameters) -> dict[str, str]:
    """Return the key of each name among the weights, which can have a wrapper, or one prefix more, in their names."""
    firsts = {key: key for key in weights.shapes} | dict(weights.aliases)
    by_name = {bare_name(name): first for name, first in firsts.items()} | firsts
    keys = {name: by_name.get(name) or by_name.get(bare_name(name)) for name in names}
    known = {name: key for name, key in keys.items() if key is not None}
    if known or not names:
        return known
    end = f".{names[0]}"
    prefixes = [name.removesuffix(end) for name in firsts if name.endswith(end)]
    whole = [prefix for prefix in prefixes if all(f"{prefix}.{name}" in firsts for name in names)]
    return {name: firsts[f"{whole[0]}.{name}"] for name in names} if len(whole) == 1 else {}
