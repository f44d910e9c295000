"""Tables of integers against what they number: positions, token types, windows, batches."""

from __future__ import annotations

import array
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from ckptkit.checks.structure import FLOATS
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["buffers", "holds_indices"]

_TYPES: Final = {"I8": "b", "U8": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q", "U64": "Q"}
_IDS = re.compile(r"(?P<what>\w*?)_ids?")
_TOKENS = frozenset({"input", "token", "tokens"})
_VOCABULARIES = ("embed_tokens", "word_embeddings", "tok_embeddings", "token_embedding", "wte", "shared", "embed_in")
_AGAIN = "fill it anew: it is computed, not trained"


def holds_indices(info: TensorInfo) -> bool:
    """Return whether a tensor is by its name a table of positions, whose very order is looked at."""
    return info.key.rpartition(".")[2] == "position_ids"


def buffers(
    infos: Mapping[str, TensorInfo], numbers: Mapping[str, ValueStats], content: Callable[[str], bytes]
) -> Iterator[Finding]:
    """Yield what indexes out of its table, or counts what cannot be; ``content`` gives the bytes of a small tensor.

    Errors are ``position-ids`` (not 0 to n-1 in order), ``index-range`` (negative, or beyond the rows of the table that
    lies beside it), ``negative-count`` and ``negative-variance``; ``index-dtype`` is a warning where positions are
    stored as floating-point numbers, which cannot hold them all.
    """
    for key, found in numbers.items():
        info = infos[key]
        prefix, _, name = key.rpartition(".")
        if not found.finite or found.min is None or found.max is None:
            continue
        if name == "num_batches_tracked" and found.min < 0:
            said = f"{quoted(key)} counts {found.min:g} batches"
            yield Finding("negative-count", "error", key, said, "batch norm without momentum averages by it")
        elif name == "running_var" and found.min < 0:
            said = f"{quoted(key)} has a variance of {found.min:g}: batch norm takes its square root"
            yield Finding("negative-variance", "error", key, said, "was it merged or scaled like a weight?")
        elif name == "position_ids":
            yield from _positions(info, found, content)
        rows = _rows(prefix, name, infos) if info.dtype in _TYPES else None
        if rows is not None and not (found.min >= 0 and found.max < rows[1]):
            table, count = rows
            said = f"{quoted(key)} holds {found.min:g} to {found.max:g}, and {quoted(table)} has {count:,} rows"
            yield Finding("index-range", "error", key, said, _AGAIN)


def _positions(info: TensorInfo, found: ValueStats, content: Callable[[str], bytes]) -> Iterator[Finding]:
    count = info.shape[-1] if info.shape else 1
    if info.dtype in FLOATS:
        said = f"{quoted(info.key)} is stored as {info.dtype}, and positions are integers"
        yield Finding("index-dtype", "warning", info.key, said, "a cast of the whole model took it along: drop it")
        wrong = found.min != 0 or found.max != count - 1
    elif info.dtype in _TYPES:
        ids = array.array(_TYPES[info.dtype], content(info.key))
        if sys.byteorder == "big":
            ids.byteswap()
        wrong = any(ids[at : at + count].tolist() != list(range(count)) for at in range(0, len(ids), count))
    else:
        return
    if wrong:
        said = f"{quoted(info.key)} is not 0 to {count - 1:,} in order: it holds {found.min:g} to {found.max:g}"
        yield Finding("position-ids", "error", info.key, said, _AGAIN)


def _rows(prefix: str, name: str, infos: Mapping[str, TensorInfo]) -> tuple[str, int] | None:
    """Return the table that these indices go into, and how many rows it has."""
    beside = f"{prefix}." if prefix else ""
    if name == "relative_position_index":
        return _table(infos, [f"{beside}relative_position_bias_table"])
    match = _IDS.fullmatch(name)
    if match is None or not match["what"]:
        return None
    what = match["what"]
    found = _table(infos, [f"{beside}{what}_embeddings.weight", f"{beside}{what}_embedding.weight"])
    if found is None and what in _TOKENS:
        words = [key for key in infos if key.endswith(".weight") and key.split(".")[-2] in _VOCABULARIES]
        found = _table(infos, words[:1])
    return found


def _table(infos: Mapping[str, TensorInfo], names: list[str]) -> tuple[str, int] | None:
    return next(((name, infos[name].shape[0]) for name in names if name in infos and infos[name].shape), None)
