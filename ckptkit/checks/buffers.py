"""Checks of buffers: indices must be rows of their table, counters and variances must not be negative."""

from __future__ import annotations

import array
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from ckptkit.checks import codes
from ckptkit.checks.structure import FLOATS
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted, short_number
from ckptkit.values.extremes import Extremes

__all__ = ["check_buffers"]

_ARRAY_TYPES: Final = {"I8": "b", "U8": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q", "U64": "Q"}
_CHECKED_NAMES = frozenset({"num_batches_tracked", "running_var", "position_ids"})
_IDS = re.compile(r"(?P<kind>\w*?)_ids?")
_TOKENS = frozenset({"input", "token", "tokens"})
_VOCABULARIES = ("embed_tokens", "word_embeddings", "tok_embeddings", "token_embedding", "wte", "shared", "embed_in")
_RECOMPUTE = "compute the buffer again: it is not trained"


def check_buffers(
    infos: Mapping[str, TensorInfo], stats: Mapping[str, Extremes], read_bytes: Callable[[str], bytes]
) -> Iterator[Finding]:
    """Yield findings about index buffers, batch counters and running variances.

    Errors are ``position-ids`` (not 0 to n-1 in order), ``index-range`` (negative, or beyond the rows of the embedding
    in the same module), ``negative-count`` and ``negative-variance``. ``index-dtype`` is a warning for positions in a
    floating-point dtype, which cannot represent all of them. ``read_bytes`` returns the bytes of a small tensor.
    """
    for key, found in stats.items():
        info = infos[key]
        prefix, _, name = key.rpartition(".")
        if name not in _CHECKED_NAMES and info.dtype not in _ARRAY_TYPES:
            continue
        if not found.finite or found.min is None or found.max is None:
            continue
        if name == "num_batches_tracked" and found.min < 0:
            message = f"{quoted(key)} counts {short_number(found.min)} batches"
            yield codes.NEGATIVE_COUNT.finding(key, message, "batch norm with momentum=None averages by this count")
        elif name == "running_var" and found.min < 0:
            message = f"{quoted(key)} has a variance of {short_number(found.min)}, but batch norm takes its square root"
            yield codes.NEGATIVE_VARIANCE.finding(key, message, "was it merged or scaled like a weight?")
        elif name == "position_ids":
            yield from _check_positions(info, found, read_bytes)
        table = _indexed_table(prefix, name, infos) if info.dtype in _ARRAY_TYPES else None
        if table is not None and not (found.min >= 0 and found.max < table.shape[0]):
            held = f"{quoted(key)} holds {short_number(found.min)} to {short_number(found.max)}"
            message = f"{held}, but {quoted(table.key)} has {table.shape[0]:,} rows"
            yield codes.INDEX_RANGE.finding(key, message, _RECOMPUTE)


def _check_positions(info: TensorInfo, found: Extremes, read_bytes: Callable[[str], bytes]) -> Iterator[Finding]:
    count = info.shape[-1] if info.shape else 1
    if info.dtype in FLOATS:
        message = f"{quoted(info.key)} has dtype {info.dtype}, but positions are integers"
        yield codes.INDEX_DTYPE.finding(info.key, message, "a cast of the whole model also cast this buffer: drop it")
        wrong = found.min != 0 or found.max != count - 1
    elif info.dtype in _ARRAY_TYPES:
        ids = array.array(_ARRAY_TYPES[info.dtype], read_bytes(info.key))
        if sys.byteorder == "big":
            ids.byteswap()
        wrong = any(ids[at : at + count].tolist() != list(range(count)) for at in range(0, len(ids), count))
    else:
        return
    if wrong:
        held = f"it holds {short_number(found.min)} to {short_number(found.max)}"
        message = f"{quoted(info.key)} is not 0 to {count - 1:,} in order: {held}"
        yield codes.POSITION_IDS.finding(info.key, message, _RECOMPUTE)


def _indexed_table(prefix: str, name: str, infos: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """Return the table that the buffer ``name`` of module ``prefix`` indexes by row."""
    module = f"{prefix}." if prefix else ""
    if name == "relative_position_index":
        return _first_table(infos, [f"{module}relative_position_bias_table"])
    match = _IDS.fullmatch(name)
    if match is None or not match["kind"]:
        return None
    kind = match["kind"]
    found = _first_table(infos, [f"{module}{kind}_embeddings.weight", f"{module}{kind}_embedding.weight"])
    if found is None and kind in _TOKENS:
        embeddings = [key for key in infos if key.endswith(".weight") and key.split(".")[-2] in _VOCABULARIES]
        found = _first_table(infos, embeddings[:1])
    return found


def _first_table(infos: Mapping[str, TensorInfo], keys: list[str]) -> TensorInfo | None:
    return next((infos[key] for key in keys if key in infos and infos[key].shape), None)
