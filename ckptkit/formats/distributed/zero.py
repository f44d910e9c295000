"""Read directories of DeepSpeed ZeRO. The file of each rank holds a partition of the flattened fp32 weights.

In stages 1 and 2, the parameters of a group are concatenated to one vector, and the vector is split among the ranks. In
stage 3, each parameter is split among the ranks. Reading a tensor joins its partitions without torch. The conversion
script that DeepSpeed writes into the directory is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
from ckptkit.core.files.payloads import Extent, Inflated, Region
from ckptkit.core.files.pool import FilePool
from ckptkit.core.files.source import Folder
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.detect import read_torch
from ckptkit.formats.distributed.file_names import ZERO_OPTIM_STATES
from ckptkit.formats.distributed.zero_files import (
    ModelStates,
    OptimStates,
    Parameter,
    Vector,
    join_ranges,
    join_shares,
    one_range,
    read_model_states,
    read_optim_states,
    split_vector,
)
from ckptkit.formats.pickle.values import is_harmless, is_suspicious
from ckptkit.formats.torch.checkpoint import LARGEST_PICKLE, TorchFile, build_checkpoint, code_warnings
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.tree import describe_entry

__all__ = ["Model", "model_entries", "open_zero", "read_model"]

_ELSEWHERE = re.compile(r"layer_\d.*[-_](?:model|optim)_states\.pt|expp_rank_\d.*_optim_states\.pt")
_CONVERT = "ds_to_universal.py of DeepSpeed converts it"
_MOST_OUTLINED = 200_000


def open_zero(folder: Folder, names: Sequence[str]) -> Checkpoint:
    """Return the Checkpoint of the fp32 weights in a directory that the ranks of DeepSpeed wrote.

    Keys and their order are as in the state_dict of the model. Buffers and frozen parameters keep their dtype. Raises
    ``FormatError`` if the file of a rank is missing or from another step, or the partitions do not fit the shapes.
    """
    pool = FilePool(folder)
    folder.will_open([name for name in names if name.endswith("_states.pt")])
    with pool.closed_on_error():
        return _open(pool, names)


@dataclass(frozen=True, slots=True)
class _Rank:
    """The file of optimizer states of one rank, with its partition of each group of weights."""

    path: str
    states: OptimStates
    parts: tuple[tuple[TensorInfo, Region], ...]
    steps: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Model:
    """A file of model states, with unsplit tensors and with fragments of frozen parameters."""

    name: str
    path: str
    states: ModelStates
    whole: Checkpoint
    fragments: Checkpoint


def _open(pool: FilePool, names: Sequence[str]) -> Checkpoint:
    references: dict[str, None] = {}
    ranks = [_read_rank(pool, name, references) for name in _optim_names(names)]
    first = ranks[0]
    for number, rank in enumerate(ranks):
        _check_same_save(first, rank, number)
    if first.states.count != len(ranks):
        raise FormatError(
            f"{plural(first.states.count, 'rank')} saved, but {plural(len(ranks), 'optim_states file')} found",
            hint="copy the whole directory again",
        )
    models = [read_model(pool, name, references) for name in _model_names(names, first.states, len(ranks))]
    for model in models:
        if model.states.step != models[0].states.step:
            raise FormatError(
                f"saved at step {model.states.step}, but {models[0].name} at step {models[0].states.step}",
                hint="the directory holds files of two saves",
                path=model.path,
            )
    return _checkpoint(pool, ranks, models, list(references))


def _optim_names(names: Sequence[str]) -> list[str]:
    elsewhere = sorted(name for name in names if _ELSEWHERE.fullmatch(name))
    if elsewhere:
        raise FormatError(
            f"holds layers or experts in separate files, such as {elsewhere[0]}, which are not read", hint=_CONVERT
        )
    found = {name: match for name in names if (match := ZERO_OPTIM_STATES.fullmatch(name))}
    if len({match[1] for match in found.values()}) > 1:
        raise FormatError("holds optim_states files of two saves: only some file names begin with bf16")
    if any(int(match[3]) for match in found.values()):
        raise FormatError(
            "model-parallel: each mp rank has its own slice of the weights, which is not read", hint=_CONVERT
        )
    numbers = {int(match[2]): name for name, match in found.items()}
    gap = next((rank for rank in range(len(numbers)) if rank not in numbers), None)
    if not numbers or gap is not None:
        raise FormatError(
            "ZeRO-3: the weights are in the optim_states files, and the directory has none" if not numbers
            else f"the optim_states file of rank {gap} is missing",
            hint="copy the whole directory again",
        )  # fmt: skip
    return [numbers[rank] for rank in range(len(numbers))]


def _model_names(names: Sequence[str], states: OptimStates, ranks: int) -> list[str]:
    if states.stage3:
        expected = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
    else:
        expected = ["mp_rank_00_model_states.pt"]
    missing = [name for name in expected if name not in names]
    if missing:
        raise FormatError(
            f"{missing[0]} is missing, which holds the names of the weights", hint="copy the whole directory again"
        )
    return expected


def _read(pool: FilePool, name: str, references: dict[str, None]) -> TorchFile:
    file = read_torch(pool.get(name), largest=LARGEST_PICKLE)
    references |= dict.fromkeys(file.objects.interpreter.references)
    return file


def _read_rank(pool: FilePool, name: str, references: dict[str, None]) -> _Rank:
    path = pool.get(name).path
    try:
        file = _read(pool, name, references)
        states = read_optim_states(file.tree)
        parts = _checkpoint_of(file, {str(number): part for number, part in enumerate(states.parts)}, path)
        tensors = {key: step for key, step in states.steps.items() if isinstance(step, TensorRef)}
        stored = _checkpoint_of(file, tensors, path)
        steps = {key: stored.read_bytes(key) if key in stored else step for key, step in states.steps.items()}
        return _Rank(path, states, tuple(_part(parts, info) for info in parts.values()), steps)
    except FormatError as error:
        error.path = error.path or path
        raise


def read_model(pool: FilePool, name: str, references: dict[str, None]) -> Model:
    """Return a file of model states, and add the code names in it to ``references``.

    Raises ``FormatError`` if ZeRO did not write the file.
    """
    path = pool.get(name).path
    try:
        file = _read(pool, name, references)
        states = read_model_states(file.tree)
        whole = _checkpoint_of(file, states.whole, path)
        return Model(name, path, states, whole, _checkpoint_of(file, states.fragments, path))
    except FormatError as error:
        error.path = error.path or path
        raise


def _checkpoint_of(file: TorchFile, tensors: Mapping[str, TensorRef], path: str) -> Checkpoint:
    """Return a Checkpoint of only these tensors of the file, by their names in ``tensors``."""
    return build_checkpoint(replace(file, tree=dict(tensors)), path=path)


def _part(parts: Checkpoint, info: TensorInfo) -> tuple[TensorInfo, Region]:
    payload = parts.payload(info.key)
    if len(info.shape) != 1 or not isinstance(payload, Extent | Inflated):
        raise FormatError(f"the partition of group {info.key} is {info}, not a flat vector")
    return info, payload


def _check_same_save(first: _Rank, rank: _Rank, number: int) -> None:
    problem = None
    if (rank.states.stage3, rank.states.count) != (first.states.stage3, first.states.count):
        problem = "is of another stage of ZeRO or another number of ranks than rank 0"
    elif len(rank.parts) != len(first.parts):
        problem = f"has {plural(len(rank.parts), 'group')} of weights, but rank 0 has {len(first.parts)}"
    elif any(one.dtype != two.dtype for (one, _), (two, _) in zip(rank.parts, first.parts, strict=True)):
        problem = "has its weights in another dtype than rank 0"
    elif rank.steps != first.steps:
        problem = "was saved at another step of the optimizer than rank 0"
    if problem is not None:
        raise FormatError(f"rank {number} {problem}", hint="the directory holds files of two saves", path=rank.path)


def _checkpoint(pool: FilePool, ranks: Sequence[_Rank], models: Sequence[Model], names: list[str]) -> Checkpoint:
    first = models[0]
    assembled = _trained_parameters(ranks, first.states) | _frozen_parameters(models, stage3=ranks[0].states.stage3)
    for name, other in first.states.shared.items():
        if other in assembled:
            assembled[name] = assembled[other]
    infos: dict[str, TensorInfo] = {}
    order = [name for name in first.states.module if isinstance(name, str)]
    tied = {name: other for name, other in first.states.shared.items() if other in assembled}
    from_module: list[str] = []
    ids = {other: number for number, other in enumerate(dict.fromkeys(tied.values()))}
    for name in dict.fromkeys([*order, *assembled]):
        if name in assembled:
            dtype, shape, _ = assembled[name]
            number = ids.get(tied.get(name, name))
            view = None if number is None else View(number, 0, row_major(shape))
            infos[name] = TensorInfo(name, dtype, shape, view)
        elif name in first.states.whole:
            infos[name] = replace(first.whole[name], view=None)
            from_module.append(name)

    def payload(info: TensorInfo) -> Payload:
        if info.key in assembled:
            dtype, _, ranges = assembled[info.key]
            return join_ranges(ranges(), dtype)
        return first.whole.payload(info.key)

    left_out = [name for name in order if name not in infos and isinstance(first.states.module[name], TensorRef)]
    references = [name for name in names if not is_harmless(name)]
    suspicious = [name for name in references if is_suspicious(name)]
    table = getattr(first.states.module, "attributes", {}).get("_metadata")
    stage = "3" if ranks[0].states.stage3 else "1 or 2"
    return Checkpoint(
        infos,
        Access(payload, payload, check=pool.check_unchanged, close=pool.close),
        Description(
            pool.folder.path,
            f"deepspeed zero stage {stage} ({plural(len(ranks), 'rank')})",
            files=[file.path for file in pool.files.values()],
            entries=model_entries(first),
            versions=module_versions(table),
            warnings=[*_warnings(first, from_module, left_out, stage), *code_warnings(references, suspicious)],
            references=references,
            suspicious=bool(suspicious),
        ),
    )


def model_entries(model: Model) -> list[Entry]:
    """Return an entry for each value in a file of model states that is not a weight."""
    left = [_MOST_OUTLINED]
    used = {"module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"}
    return [
        describe_entry(str(key), value, left)._replace(is_outside=True)
        for key, value in model.states.tree.items()
        if key not in used and value is not None
    ]


def _warnings(model: Model, from_module: Sequence[str], left_out: Sequence[str], stage: str) -> list[str]:
    text = "these are the fp32 weights of the optimizer, joined from the partitions of all ranks"
    if stage != "3":
        text += f"; the weights of the model, in the dtype of training, are at ::{model.name}"
    warnings: list[str] = [ReaderWarning(text, codes.MASTER_WEIGHTS)]
    buffers = model.states.tree.get("buffer_names")
    frozen = [
        name for name in from_module if not isinstance(buffers, list | tuple | set | frozenset) or name not in buffers
    ]
    if frozen:
        what = plural(len(frozen), "parameter")
        text = f"{what} without fp32 weights (usually frozen), read from {model.name}: {printable(frozen[0])}"
        warnings.append(ReaderWarning(text, codes.NOT_IN_PARTS, "note"))
    if left_out:
        what = plural(len(left_out), "key")
        text = f"{what} of the state_dict without fp32 weights (usually tied), left out: {printable(left_out[0])}"
        warnings.append(ReaderWarning(text, codes.NOT_IN_PARTS))
    return warnings


def _trained_parameters(ranks: Sequence[_Rank], model: ModelStates) -> dict[str, Parameter]:
    states = ranks[0].states
    paddings = states.paddings
    if not states.stage3:
        if len(model.groups) != len(ranks[0].parts):
            raise FormatError(
                f"param_shapes has {plural(len(model.groups), 'group')}, but the ranks have {len(ranks[0].parts)}"
            )
        if paddings is not None and [len(group) for group in paddings] != [len(group) for group in model.groups]:
            raise FormatError("param_alignment_paddings and param_shapes have different lengths")
        parameters: dict[str, Parameter] = {}
        for number, shapes in enumerate(model.groups):
            vector = Vector.of([rank.parts[number] for rank in ranks])
            padding = paddings[number] if paddings is not None else (0,) * len(shapes)
            parameters |= split_vector(vector, shapes, padding, len(ranks), f"group {number}")
        return parameters
    shapes = {name: shape for group in model.groups for name, shape in group.items()}
    return join_shares([Vector.of(rank.parts) for rank in ranks], shapes)


def _frozen_parameters(models: Sequence[Model], *, stage3: bool) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for name, shape in models[0].states.frozen.items():
        fragments = []
        for model in models:
            if name not in model.fragments:
                raise FormatError(
                    f"{quoted(name)} is frozen, but this file has no fragment of the parameter", path=model.path
                )
            info = model.fragments[name]
            payload = model.fragments.payload(name)
            if not isinstance(payload, Extent | Inflated):
                raise FormatError(f"{quoted(name)}: the fragment is not contiguous", path=model.path)
            fragments.append((replace(info, shape=(info.elements,)), payload))
        vector = Vector.of(fragments)
        numel = math.prod(shape)
        if vector.length < numel or (not stage3 and vector.length != numel):
            raise FormatError(
                f"{quoted(name)}: the shape has {numel:,} elements, but the fragments have {vector.length:,}"
            )
        parameters[name] = (vector.dtype, shape, partial(one_range, vector, 0, numel))
    return parameters
