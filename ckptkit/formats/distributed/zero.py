"""Directories of DeepSpeed's ZeRO: every rank's part of the flattened fp32 weights in a file of its own.

In stages 1 and 2 the parameters of a group lie one behind the other in one vector, which is cut among the ranks; in
stage 3 each parameter is cut among the ranks by itself. Both are put together while they are read, without torch, and
the script that DeepSpeed leaves in the directory for this is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ckptkit.core.checkpoint import (
    Access,
    Checkpoint,
    Description,
    Entry,
    Payload,
    TensorInfo,
    View,
    module_versions,
    row_major,
)
from ckptkit.core.files import Extent, Inflated, Region
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import codes
from ckptkit.formats.detect import read_torch
from ckptkit.formats.distributed.zero_files import (
    ModelStates,
    OptimStates,
    Place,
    Vector,
    joined,
    model_states,
    optim_states,
    parts_of_one,
    parts_of_vector,
    whole,
)
from ckptkit.formats.file_pool import FilePool
from ckptkit.formats.pickle.values import is_harmless, is_suspicious
from ckptkit.formats.torch.checkpoint import LARGEST_PICKLE, TorchFile, build_checkpoint, code_warnings
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.tree import describe_entry

__all__ = ["find_states_file", "is_zero", "open_zero"]

_OPTIM = re.compile(r"([a-z0-9_]*?)zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt")
_ELSEWHERE = re.compile(r"layer_\d.*[-_](?:model|optim)_states\.pt|expp_rank_\d.*_optim_states\.pt")
_CONVERT = "ds_to_universal.py of DeepSpeed converts it"
_MOST_OUTLINED = 200_000


def is_zero(names: Iterable[str]) -> bool:
    """Return whether a directory with these file names holds the parts of a ZeRO checkpoint, all or some."""
    return any(_OPTIM.fullmatch(name) or ((match := _MODEL.fullmatch(name)) and match[1]) for name in names)


def find_states_file(names: Iterable[str], key: str) -> tuple[str, str] | None:
    """Return the file of DeepSpeed's that ``key`` begins with, and the rest."""
    for name in names:
        if f"{key}.".startswith(f"{name}.") and (_OPTIM.fullmatch(name) or _MODEL.fullmatch(name)):
            return name, key[len(name) + 1 :]
    return None


def open_zero(directory: str, names: Sequence[str]) -> Checkpoint:
    """Return the Checkpoint of the fp32 weights in a directory of the files that DeepSpeed's ranks wrote.

    The names are those of the model's state_dict, in its order; buffers and frozen parameters keep their dtype. Raises
    ``FormatError`` where a rank's file is missing or of another step, or the parts do not add up to the shapes.
    """
    pool = FilePool(directory)
    try:
        return _open(pool, names)
    except BaseException as error:
        pool.close()
        if isinstance(error, CkptkitError) and error.path is None:
            error.path = directory
        raise


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank's file of optimizer states, and the regions of its parts."""

    path: str
    states: OptimStates
    parts: tuple[tuple[TensorInfo, Region], ...]
    steps: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Model:
    """One file of model states, and its own whole tensors."""

    name: str
    path: str
    states: ModelStates
    own: Checkpoint
    fragments: Checkpoint


def _open(pool: FilePool, names: Sequence[str]) -> Checkpoint:
    codes: dict[str, None] = {}
    ranks = [_read_rank(pool, name, codes) for name in _optim_names(names)]
    first = ranks[0]
    for number, rank in enumerate(ranks):
        _check_alike(first, rank, number)
    if first.states.count != len(ranks):
        raise FormatError(
            f"{plural(len(ranks), 'rank')} of {first.states.count} have a file of optim_states here",
            hint="copy the whole directory again",
        )
    models = [_read_model(pool, name, codes) for name in _model_names(names, first.states, len(ranks))]
    for model in models:
        if model.states.step != models[0].states.step:
            raise FormatError(
                f"saved at step {model.states.step}, and {models[0].name} at step {models[0].states.step}",
                hint="files of two saves lie here",
                path=model.path,
            )
    return _checkpoint(pool, ranks, models, list(codes))


def _optim_names(names: Sequence[str]) -> list[str]:
    elsewhere = sorted(name for name in names if _ELSEWHERE.fullmatch(name))
    if elsewhere:
        raise FormatError(
            f"holds layers or experts in files of their own, such as {elsewhere[0]}: not read", hint=_CONVERT
        )
    found = {name: match for name in names if (match := _OPTIM.fullmatch(name))}
    if len({match[1] for match in found.values()}) > 1:
        raise FormatError("holds optim_states of two saves, some of them named bf16 and some not")
    if any(int(match[3]) for match in found.values()):
        raise FormatError(
            "model-parallel: each mp rank has its own cut of the weights, which is not read", hint=_CONVERT
        )
    numbers = {int(match[2]): name for name, match in found.items()}
    gap = next((rank for rank in range(len(numbers)) if rank not in numbers), None)
    if not numbers or gap is not None:
        raise FormatError(
            "ZeRO-3: the weights are in the optim_states files, and none is here" if not numbers
            else f"the optim_states of rank {gap} are missing",
            hint="copy the whole directory again",
        )  # fmt: skip
    return [numbers[rank] for rank in range(len(numbers))]


def _model_names(names: Sequence[str], states: OptimStates, ranks: int) -> list[str]:
    if states.stage3:
        wanted = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
    else:
        wanted = ["mp_rank_00_model_states.pt"]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise FormatError(f"{missing[0]} is missing, which names the weights", hint="copy the whole directory again")
    return wanted


def _read(pool: FilePool, name: str, codes: dict[str, None]) -> TorchFile:
    made = read_torch(pool.get(name), largest=LARGEST_PICKLE)
    codes |= dict.fromkeys(made.objects.interpreter.references)
    return made


def _read_rank(pool: FilePool, name: str, codes: dict[str, None]) -> _Rank:
    path = pool.get(name).path
    try:
        made = _read(pool, name, codes)
        states = optim_states(made.tree)
        own = _own(made, {str(number): part for number, part in enumerate(states.parts)}, path)
        steps = {key: step for key, step in states.steps.items() if isinstance(step, TensorRef)}
        stepped = _own(made, steps, path)
        read = {key: stepped.read_bytes(key) if key in stepped else step for key, step in states.steps.items()}
        return _Rank(path, states, tuple(_part(own, info) for info in own.values()), read)
    except FormatError as error:
        error.path = error.path or path
        raise


def _read_model(pool: FilePool, name: str, codes: dict[str, None]) -> _Model:
    path = pool.get(name).path
    try:
        made = _read(pool, name, codes)
        states = model_states(made.tree)
        return _Model(name, path, states, _own(made, states.whole, path), _own(made, states.fragments, path))
    except FormatError as error:
        error.path = error.path or path
        raise


def _own(made: TorchFile, tensors: Mapping[str, TensorRef], path: str) -> Checkpoint:
    # Under their plain names, whatever lies around them in the file.
    return build_checkpoint(replace(made, tree=dict(tensors)), path=path)


def _part(own: Checkpoint, info: TensorInfo) -> tuple[TensorInfo, Region]:
    payload = own.payload(info.key)
    if len(info.shape) != 1 or not isinstance(payload, Extent | Inflated):
        raise FormatError(f"its part of group {info.key} is no flat vector but {info}")
    return info, payload


def _check_alike(first: _Rank, rank: _Rank, number: int) -> None:
    what = None
    if (rank.states.stage3, rank.states.count) != (first.states.stage3, first.states.count):
        what = "is of another stage of ZeRO or another number of ranks than rank 0"
    elif len(rank.parts) != len(first.parts):
        what = f"has {plural(len(rank.parts), 'group')} of weights, and rank 0 has {len(first.parts)}"
    elif any(one.dtype != two.dtype for (one, _), (two, _) in zip(rank.parts, first.parts, strict=True)):
        what = "has its weights in another dtype than rank 0"
    elif rank.steps != first.steps:
        what = "was saved at another step of the optimizer than rank 0"
    if what is not None:
        raise FormatError(f"rank {number} {what}", hint="files of two saves lie here", path=rank.path)


# --- the whole -----------------------------------------------------------------------------------------------------


def _checkpoint(pool: FilePool, ranks: Sequence[_Rank], models: Sequence[_Model], codes: list[str]) -> Checkpoint:
    first = models[0]
    places = _places(ranks, first.states) | _frozen(models, stage3=ranks[0].states.stage3)
    for name, other in first.states.shared.items():
        if other in places:
            places[name] = places[other]
    infos: dict[str, TensorInfo] = {}
    order = [name for name in first.states.module if isinstance(name, str)]
    tied = {name: other for name, other in first.states.shared.items() if other in places}
    own: list[str] = []
    ids = {other: number for number, other in enumerate(dict.fromkeys(tied.values()))}
    for name in dict.fromkeys([*order, *places]):
        if name in places:
            dtype, shape, _ = places[name]
            number = ids.get(tied.get(name, name))
            view = None if number is None else View(number, 0, row_major(shape))
            infos[name] = TensorInfo(name, dtype, shape, view)
        elif name in first.states.whole:
            infos[name] = replace(first.own[name], view=None)
            own.append(name)

    def payload(info: TensorInfo) -> Payload:
        if info.key in places:
            dtype, _, pieces = places[info.key]
            return joined(pieces(), dtype)
        return first.own.payload(info.key)

    lost = [name for name in order if name not in infos and isinstance(first.states.module[name], TensorRef)]
    references = [name for name in codes if not is_harmless(name)]
    suspicious = [name for name in references if is_suspicious(name)]
    table = getattr(first.states.module, "attributes", {}).get("_metadata")
    stage = "3" if ranks[0].states.stage3 else "1 or 2"
    return Checkpoint(
        infos,
        Access(payload, payload, check=pool.check_unchanged, close=pool.close),
        Description(
            pool.directory,
            f"deepspeed zero stage {stage} ({plural(len(ranks), 'rank')})",
            files=[file.path for file in pool.files.values()],
            entries=_entries(first),
            versions=module_versions(table),
            warnings=[*_notes(first, own, lost, stage), *code_warnings(references, suspicious)],
            references=references,
            suspicious=bool(suspicious),
        ),
    )


def _entries(model: _Model) -> list[Entry]:
    left = [_MOST_OUTLINED]
    told = {"module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"}
    return [
        describe_entry(str(key), value, left)._replace(is_outside=True)
        for key, value in model.states.tree.items()
        if key not in told and value is not None
    ]


def _notes(model: _Model, own: Sequence[str], lost: Sequence[str], stage: str) -> list[str]:
    said = "the optimizer's own fp32 weights are shown, put together from the parts of all ranks"
    if stage != "3":
        said += f"; the model's, in the dtype that it trained in, are at ::{model.name}"
    notes: list[str] = [ReaderWarning(said, codes.MASTER_WEIGHTS)]
    buffers = model.states.tree.get("buffer_names")
    frozen = [name for name in own if not isinstance(buffers, list | tuple | set | frozenset) or name not in buffers]
    if frozen:
        what = plural(len(frozen), "parameter")
        said = f"{what} in no rank's part, as frozen ones are, taken from {model.name}: {printable(frozen[0])}"
        notes.append(ReaderWarning(said, codes.NOT_IN_PARTS, "note"))
    if lost:
        what = plural(len(lost), "name")
        said = f"{what} of the state_dict in no rank's part, as of tied weights, left out: {printable(lost[0])}"
        notes.append(ReaderWarning(said, codes.NOT_IN_PARTS))
    return notes


def _places(ranks: Sequence[_Rank], model: ModelStates) -> dict[str, Place]:
    states = ranks[0].states
    paddings = states.paddings
    if not states.stage3:
        if len(model.groups) != len(ranks[0].parts):
            raise FormatError(
                f"param_shapes has {plural(len(model.groups), 'group')}, the ranks have parts of {len(ranks[0].parts)}"
            )
        if paddings is not None and [len(group) for group in paddings] != [len(group) for group in model.groups]:
            raise FormatError("param_alignment_paddings and param_shapes are of different lengths")
        made: dict[str, Place] = {}
        for number, shapes in enumerate(model.groups):
            vector = Vector.of([rank.parts[number] for rank in ranks])
            behind = paddings[number] if paddings is not None else (0,) * len(shapes)
            made |= parts_of_vector(vector, shapes, behind, len(ranks), f"group {number}")
        return made
    shapes = {name: shape for group in model.groups for name, shape in group.items()}
    return parts_of_one([Vector.of(rank.parts) for rank in ranks], shapes)


def _frozen(models: Sequence[_Model], *, stage3: bool) -> dict[str, Place]:
    made: dict[str, Place] = {}
    for name, shape in models[0].states.frozen.items():
        fragments = []
        for model in models:
            if name not in model.fragments:
                raise FormatError(f"{quoted(name)} is frozen and has no fragment here", path=model.path)
            info = model.fragments[name]
            payload = model.fragments.payload(name)
            if not isinstance(payload, Extent | Inflated):
                raise FormatError(f"{quoted(name)}: its fragment is not contiguous", path=model.path)
            fragments.append((replace(info, shape=(info.elements,)), payload))
        vector = Vector.of(fragments)
        numel = math.prod(shape)
        if vector.length < numel or (not stage3 and vector.length != numel):
            raise FormatError(f"{quoted(name)}: {numel:,} elements by its shape, {vector.length:,} in fragments")
        made[name] = (vector.dtype, shape, partial(whole, vector, 0, numel))
    return made
