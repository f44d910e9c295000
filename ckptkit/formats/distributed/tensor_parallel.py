"""Join the files ``consolidated.00.pth``, ``consolidated.01.pth``, ... of Meta's Llama models.

Each file holds a slice of every matrix. The code of the models says which dimension is cut: ``ColumnParallelLinear``
cuts the rows of a weight, ``RowParallelLinear`` the columns. The embedding is cut by columns in Llama 1 and 2, and by
rows since Llama 3. Shapes and ``params.json`` must leave one reading of every tensor; else the directory is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.pool import FilePool
from ckptkit.core.files.source import Folder
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats.distributed.file_names import CONSOLIDATED
from ckptkit.formats.distributed.parts import (
    JoinedTensor,
    Part,
    check_same_keys,
    copy_of_equals,
    join_blocks,
    joined_checkpoint,
    open_part,
)
from ckptkit.formats.layout import Block, Box
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["check_whole", "open_tensor_parallel"]

_COPY: Final = -1  # every file holds the whole tensor
_EMBEDDING, _NORM, _OUTPUT = "tok_embeddings.weight", "norm.weight", "output.weight"
_LAYER = re.compile(r"layers\.\d+\.(.+)")
_CUT_DIMENSION: Final[Mapping[str, int]] = {
    "attention.wq.weight": 0, "attention.wk.weight": 0, "attention.wv.weight": 0, "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0, "feed_forward.w2.weight": 1, "feed_forward.w3.weight": 0,
    "attention_norm.weight": _COPY, "ffn_norm.weight": _COPY, "attention.inner_attention.rope.freqs": _COPY,
}  # fmt: skip
_READING: Final = {0: "cut by rows", 1: "cut by columns", _COPY: "a copy in each file"}
_WAY_OUT = "give the path of one file to see its slices, and join them with the program that saved them"
_COPY_AGAIN = "copy the whole directory again"


def open_tensor_parallel(
    folder: Folder, names: Sequence[str], params: Mapping[str, object] | None, selection: Selection = WEIGHTS
) -> Checkpoint:
    """Return the Checkpoint of the whole tensors in the ``consolidated.NN.pth`` files among ``names``.

    ``params`` is the content of ``params.json``, or None. Raises ``FormatError`` if a file is missing, or the files
    do not belong together, or a tensor does not have exactly one reading.
    """
    pool = FilePool(folder)
    folder.will_open(names)
    with pool.closed_on_error():
        parts = [open_part(pool, name, selection) for name in _in_order(names)]
        check_same_keys(parts)
        sizes = _Sizes.of(parts, params or {})
        tensors = {key: _join(key, parts, sizes) for key in parts[0].checkpoint}
        return joined_checkpoint(pool, parts, tensors, "tensor-parallel torch-zip")


def check_whole(checkpoint: Checkpoint, params: Mapping[str, object]) -> None:
    """Raise ``FormatError`` if ``params`` prove that a ``consolidated.00.pth`` without siblings is one of several."""
    width = _number(params, "n_heads") * _number(params, "head_dim") or _number(params, "dim")
    key = next((key for key in checkpoint if key.endswith(".attention.wo.weight")), None)
    shape = () if key is None else checkpoint[key].shape
    if len(shape) == 2 and 0 < shape[1] < width and width % shape[1] == 0:
        raise FormatError(
            f"consolidated.01.pth is missing: {quoted(str(key))} is {checkpoint[str(key)]}, "
            f"and params.json says that the whole tensor has {width:,} columns",
            hint=_COPY_AGAIN,
        )


def _number(params: Mapping[str, object], name: str) -> int:
    value = params.get(name)
    return value if type(value) is int and value > 0 else 0


def _in_order(names: Sequence[str]) -> list[str]:
    found = {int(match[1]): name for name in sorted(names) if (match := CONSOLIDATED.fullmatch(name))}
    gap = next((number for number in range(len(found)) if number not in found), None)
    if gap is not None:
        raise FormatError(
            f"consolidated.{gap:02}.pth is missing, but there is {found[max(found)]}: each file holds a part of every "
            "tensor",
            hint=_COPY_AGAIN,
        )
    return [found[number] for number in range(len(found))]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of the whole model; 0 is an unknown size."""

    count: int  # of files
    dim: int
    width: int  # of all query heads
    kv_width: int
    vocabulary: int
    hidden: int

    @classmethod
    def of(cls, parts: Sequence[Part], params: Mapping[str, object]) -> _Sizes:
        """Return the sizes that the shapes and ``params`` prove. Raises ``FormatError`` where they disagree."""
        count = len(parts)
        first = parts[0].checkpoint
        norm = first.get(_NORM)
        if norm is None or len(norm.shape) != 1:
            raise FormatError(
                f"holds {plural(count, 'numbered file')} without {quoted(_NORM)}, so they are not known as parts of a "
                "Llama model",
                hint=_WAY_OUT,
            )
        (dim,) = norm.shape
        stated = _number(params, "dim")
        if stated not in (0, dim):
            raise FormatError(f"params.json says dim = {stated:,}, but {quoted(_NORM)} is {norm}", hint=_WAY_OUT)
        heads = _number(params, "n_heads")
        head_dim = _number(params, "head_dim") or (dim // heads if heads else 0)
        width = heads * head_dim or dim
        output = first.get(_OUTPUT)
        vocabulary = output.shape[0] * count if output is not None and len(output.shape) == 2 else 0
        stated = _number(params, "vocab_size")
        if output is not None and stated not in (0, vocabulary):
            raise FormatError(
                f"params.json says vocab_size = {stated:,}, but {quoted(_OUTPUT)} has {vocabulary:,} rows in all "
                f"{plural(count, 'file')} together",
                hint=_WAY_OUT,
            )
        w2 = next((info for key, info in first.items() if key.endswith(".feed_forward.w2.weight")), None)
        return cls(
            count,
            dim,
            width,
            (_number(params, "n_kv_heads") or heads) * head_dim,
            stated or vocabulary,
            w2.shape[1] * count if w2 is not None and len(w2.shape) == 2 else 0,
        )


def _join(key: str, parts: Sequence[Part], sizes: _Sizes) -> JoinedTensor:
    info = parts[0].checkpoint[key]
    for part in parts[1:]:
        if (found := part.checkpoint[key]).shape != info.shape:
            raise FormatError(f"{quoted(key)} is {info} in {parts[0].name}, but {found} in {part.name}")
    if info.kind != "dense" or DTYPES[info.dtype].bits < 8:
        raise FormatError(f"{quoted(key)} is {info}, which cannot be joined", hint=_WAY_OUT)
    dimension = _cut_dimension(key, info, sizes)
    if dimension == _COPY:
        return copy_of_equals(key, parts)
    size = info.shape[dimension]
    shape = tuple(n * sizes.count if dim == dimension else n for dim, n in enumerate(info.shape))
    if math.prod(n or 1 for n in shape) >= 2**63:
        raise FormatError(f"{quoted(key)}: the joined shape {str(list(shape))[:80]} overflows")
    boxes = (
        Box(tuple(number * size if dim == dimension else 0 for dim in range(len(shape))), info.shape)
        for number in range(sizes.count)
    )
    blocks = [Block(box, partial(part.checkpoint.payload, key)) for box, part in zip(boxes, parts, strict=True)]
    return join_blocks(replace(info, shape=shape, view=None), blocks)


def _cut_dimension(key: str, info: TensorInfo, sizes: _Sizes) -> int:
    """Return the dimension that is cut, or ``_COPY``. Raises ``FormatError`` unless there is exactly one reading."""
    if key in (_NORM, "rope.freqs"):
        return _COPY
    if key == _EMBEDDING:
        return _only_reading(key, info, list(_embedding_readings(info.shape, sizes)), sizes)
    match = _LAYER.fullmatch(key)
    name = key if match is None else match[1]
    dimension = 0 if key == _OUTPUT else _CUT_DIMENSION.get(name)
    if dimension is None:
        raise FormatError(
            f"{quoted(key)} is not the name of a Llama tensor, so it is unknown how {plural(sizes.count, 'file')} "
            "share it",
            hint=_WAY_OUT,
        )
    if dimension == _COPY or _fits(name, info.shape, dimension, sizes):
        return dimension
    raise _no_reading_error(key, info, sizes)


def _fits(name: str, shape: tuple[int, ...], dimension: int, sizes: _Sizes) -> bool:
    """Return whether the slices of a matrix give the size of the whole model in both dimensions."""
    if len(shape) != 2 or shape[1 - dimension] != sizes.dim:
        return False
    whole = shape[dimension] * sizes.count
    if name in ("attention.wq.weight", "attention.wo.weight"):
        return whole == sizes.width
    if name in ("attention.wk.weight", "attention.wv.weight"):
        return whole == sizes.kv_width if sizes.kv_width else whole > 0 and sizes.width % whole == 0
    return name == _OUTPUT or whole == sizes.hidden


def _embedding_readings(shape: tuple[int, ...], sizes: _Sizes) -> Iterator[int]:
    if len(shape) == 2:
        rows, columns = shape
        if columns == sizes.dim and sizes.vocabulary in (0, rows * sizes.count):
            yield 0
        if columns * sizes.count == sizes.dim and sizes.vocabulary in (0, rows):
            yield 1
        if columns == sizes.dim and sizes.vocabulary in (0, rows):
            yield _COPY


def _only_reading(key: str, info: TensorInfo, readings: Sequence[int], sizes: _Sizes) -> int:
    if not readings:
        raise _no_reading_error(key, info, sizes)
    if len(readings) > 1:
        raise FormatError(
            f"{quoted(key)} is {info} in each file, which has {len(readings)} readings: "
            f"{' or '.join(_READING[reading] for reading in readings)}",
            hint="write the vocab_size of the model into params.json in the directory",
        )
    return readings[0]


def _no_reading_error(key: str, info: TensorInfo, sizes: _Sizes) -> FormatError:
    return FormatError(
        f"{quoted(key)} is {info} in each of {plural(sizes.count, 'file')}, which does not fit a Llama model of "
        f"dim {sizes.dim:,}: a file missing, or files of two saves?",
        hint=_WAY_OUT,
    )
