"""Read the universal checkpoints of DeepSpeed: a directory for each parameter, with a file for each of its states.

``ds_to_universal.py`` writes ``zero/NAME/fp32.pt``, ``zero/NAME/exp_avg.pt`` and so on, with whole tensors. A file
of model states holds the buffers, the tied weights, and the order of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from ckptkit.core.checkpoint import Checkpoint, Entry, View, row_major
from ckptkit.core.files.places import absolute, folder_at, name_of, parent_of
from ckptkit.core.files.pool import FilePool
from ckptkit.core.files.source import Folder
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, plural, printable, quoted
from ckptkit.errors import CkptkitError, FormatError, PathError
from ckptkit.formats import codes
from ckptkit.formats.detect import read_torch
from ckptkit.formats.distributed.file_names import UNIVERSAL, ZERO_MODEL_STATES
from ckptkit.formats.distributed.parts import JoinedTensor, Part, joined_checkpoint
from ckptkit.formats.distributed.zero import Model, model_entries, read_model
from ckptkit.formats.torch.checkpoint import LARGEST_PICKLE, build_checkpoint
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.wrappers.envelopes import Selection

__all__ = ["find_universal", "open_universal"]

_WEIGHTS = "fp32"
_PARAM = "param"
_MODEL_STATES = "mp_rank_00_model_states.pt"
_MOST_PARAMETERS = 100_000
_MOST_FILES = 10_000_000
_MOST_TESTED = 16
_MOST_STATES = 1000  # file names in the directory of one parameter
_COPY_AGAIN = "copy the whole directory again, or run ds_to_universal.py again"


def find_universal(folder: Folder, names: Sequence[str]) -> Folder | None:
    """Return the folder of the universal checkpoint at ``folder``, which can be its part ``zero``, or None."""
    at = absolute(folder.path)
    if name_of(at) == UNIVERSAL and _has_parameters(folder):
        return folder_at(parent_of(at))
    return folder if UNIVERSAL in names and _has_parameters(folder.folder(UNIVERSAL)) else None


def _has_parameters(folder: Folder) -> bool:
    try:
        tested = folder.names(_MOST_TESTED).folders[:_MOST_TESTED]
    except PathError:
        return False
    folder.will_list(tested)
    return any(folder.has_file(f"{name}/{_WEIGHTS}.pt") for name in tested)


def open_universal(folder: Folder, selection: Selection) -> Checkpoint:
    """Return the Checkpoint of the fp32 weights, or of the state that ``selection`` names, such as ``exp_avg``.

    Raises ``FormatError`` if a parameter has no file of that state, or a file does not hold one tensor.
    """
    if selection.optimizer:
        raise FormatError("holds one optimizer state for each parameter", hint="add ::exp_avg or another state")
    pool = FilePool(folder)
    with pool.closed_on_error():
        return _open(pool, folder.names(_MOST_FILES).all, selection.key or _WEIGHTS)


def _open(pool: FilePool, names: Sequence[str], state: str) -> Checkpoint:
    states = _states_by_parameter(pool.folder.folder(UNIVERSAL))
    found = sorted({name for held in states.values() for name in held} - {"step"})
    if state not in found:
        raise FormatError(
            f"holds nothing at {quoted(state)}",
            hint=f"the states of the parameters: {listed(found, 8, show=printable)}",
        )
    lacking = [name for name, held in states.items() if state not in held]
    if lacking:
        raise FormatError(f"{UNIVERSAL}/{printable(lacking[0])} has no file {state}.pt", hint=_COPY_AGAIN)
    model = _read_model(pool, names)
    missing = [] if model is None else [
        name for group in model.states.groups for name in group if name not in states
    ]  # fmt: skip
    if missing:
        raise FormatError(f"{_MODEL_STATES} names {quoted(missing[0])}, but {UNIVERSAL} lacks this parameter",
                          hint=_COPY_AGAIN)  # fmt: skip
    pool.folder.will_open([_file_of(name, state) for name in states])
    parts = {name: _read_part(pool, name, state) for name in states}
    tensors: dict[str, JoinedTensor] = {}
    for number, (name, part) in enumerate(parts.items()):
        info = part.checkpoint[name]
        view = View(number, 0, row_major(info.shape))
        tensors[name] = JoinedTensor(replace(info, view=view), partial(part.checkpoint.payload, name))
    warnings = []
    entries = _entries(states, state)
    if state == _WEIGHTS:
        text = "these are the fp32 weights of the optimizer, as ds_to_universal.py of DeepSpeed joined them"
        warnings.append(ReaderWarning(text, codes.MASTER_WEIGHTS))
        if model is not None:
            tensors = _with_module(tensors, model)
            entries += model_entries(model)
    whole = joined_checkpoint(pool, list(parts.values()), tensors, "deepspeed universal", *warnings)
    return whole.with_entries(*entries)


def _states_by_parameter(folder: Folder) -> dict[str, set[str]]:
    """Return the names of the saved states by parameter, in the order of the names."""
    names = folder.names(_MOST_PARAMETERS)
    if len(names.all) > _MOST_PARAMETERS:
        raise FormatError(f"a universal checkpoint of more than {_MOST_PARAMETERS:,} parameters", path=folder.path)
    folder.will_list(names.folders)
    states = {}
    for name in names.folders:
        found = folder.folder(name).names(_MOST_STATES).all[:_MOST_STATES]
        states[name] = {file.removesuffix(".pt") for file in found if file.endswith(".pt")}
    return states


def _read_model(pool: FilePool, names: Sequence[str]) -> Model | None:
    """Return the file of model states, or None if there is none, or several with slices of the tensors."""
    files = [name for name in names if ZERO_MODEL_STATES.fullmatch(name)]
    return read_model(pool, _MODEL_STATES, {}) if files == [_MODEL_STATES] else None


def _file_of(name: str, state: str) -> str:
    return f"{UNIVERSAL}/{name}/{state}.pt"


def _read_part(pool: FilePool, name: str, state: str) -> Part:
    file = pool.get(_file_of(name, state))
    try:
        saved = read_torch(file, largest=LARGEST_PICKLE)
        tree = saved.tree.get(_PARAM) if isinstance(saved.tree, Mapping) else saved.tree
        if not isinstance(tree, TensorRef):
            raise FormatError(f"holds no tensor at {quoted(_PARAM)}", hint=_COPY_AGAIN)
        part = Part(name, saved, build_checkpoint(replace(saved, tree={name: tree}), path=file.path))
    except CkptkitError as error:
        error.path = error.path or file.path
        raise
    return part


def _with_module(tensors: Mapping[str, JoinedTensor], model: Model) -> dict[str, JoinedTensor]:
    """Return the tensors in the order of the state_dict, with tied weights and the buffers of the module."""
    ordered: dict[str, JoinedTensor] = {}
    for name in dict.fromkeys([*map(str, model.states.module), *model.states.shared, *tensors]):
        source = name if name in tensors else model.states.shared.get(name, name)
        if source in tensors:
            tensor = tensors[source]
            ordered[name] = JoinedTensor(replace(tensor.info, key=name), tensor.open)
        elif name in model.whole:
            info = replace(model.whole[name], view=None)
            ordered[name] = JoinedTensor(info, partial(model.whole.payload, name))
    return ordered


def _entries(states: Mapping[str, set[str]], chosen: str) -> list[Entry]:
    """Return an entry for each other state of the parameters."""
    counts: dict[str, int] = {}
    for held in states.values():
        for state in sorted(held - {chosen}):
            counts[state] = counts.get(state, 0) + 1
    return [
        Entry(f"{UNIVERSAL}/*/{state}.pt", plural(count, "file"), _note(state), is_outside=True, is_file=True)
        for state, count in counts.items()
    ]


def _note(state: str) -> str:
    return "not read" if state == "step" else f"::{state} opens these tensors"
