"""Read the header of a safetensors file, and check each key, dtype, shape and offset in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.config_files import parse_json
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError

__all__ = ["METADATA", "SafetensorsHeader", "read_header"]

METADATA = "__metadata__"
_MOST_DIMENSIONS = 1024
_LARGEST_SIZE = 2**63  # torch uses signed 64-bit sizes
_DEEPEST_EXTRA = 100  # the library stops at 127 levels
_BITS = {dtype.code: dtype.bits for dtype in DTYPES.values() if dtype.storable}
_SIZE = r"(?:0|[1-9][0-9]{0,18}+)"
_METADATA_START = f'{{"{METADATA}":'
_LONGEST_METADATA = 1 << 20  # characters; a longer header may hold more values than JSON is allowed to build
# An entry as the safetensors library writes it, after a comma or the first brace of the text: the key, dtype and shape
# as one text, and the offsets.
_ENTRY = re.compile(
    r'[,{](?<!(?s:.)\{)"([^"\\\x00-\x1f]*+)":\{"dtype":("[A-Z0-9_]++","shape":\[[0-9,]*+\]),"data_offsets":'
    rf"\[({_SIZE}),({_SIZE})\]\}}"
)
_ENTRY_LENGTH = len(',"":{"dtype":,"data_offsets":[,]}')  # without its four parts
_LOOK = re.compile(rf'"([A-Z0-9_]++)","shape":\[({_SIZE}(?:,{_SIZE})*+)?\]')
_MOST_LOOK_CHARACTERS = 1 << 20  # of all different dtypes and shapes


class SafetensorsHeader(NamedTuple):
    """The tensors of a file by key, where the bytes of each begin in the data, the free text, and warnings."""

    infos: dict[str, TensorInfo]
    begins: dict[str, int]
    metadata: Mapping[str, str]
    warnings: Sequence[str]


def read_header(data: bytes, nbytes: int) -> SafetensorsHeader:
    """Return the header in ``data``; its tensors must fill the ``nbytes`` of data behind it.

    Raises ``FormatError`` naming the tensor and the numbers.
    """
    # Nearly every header is text of one form, which is read in half the time of JSON. Any doubt is left to JSON.
    if (header := _read_plain(data, nbytes)) is not None:
        return header
    table = parse_json(data, "the header")
    metadata = _metadata(table.pop(METADATA, None))
    return _entries(table, nbytes, metadata)


def _read_plain(data: bytes, nbytes: int) -> SafetensorsHeader | None:
    """Return a valid header that is written as the library writes it, or None for any other header."""
    try:
        text = data.rstrip(b" ").decode()
        metadata: Mapping[str, str] = {}
        start = 0
        if text.startswith(_METADATA_START):
            _, start = json.JSONDecoder().raw_decode(text[:_LONGEST_METADATA], len(_METADATA_START))
            metadata = _metadata(parse_json(f"{text[:start]}}}".encode(), "the header")[METADATA])
            if text[start : start + 1] != ",":
                return None
    except (ValueError, RecursionError, FormatError):
        return None
    found = _ENTRY.findall(text, start)
    if not found:
        return None
    keys, look_texts, begin_texts, end_texts = zip(*found, strict=True)
    # Entries that take up the whole text follow one another.
    lengths = (sum(map(len, column)) for column in (keys, look_texts, begin_texts, end_texts))
    if not text.endswith("}") or len(text) - start - 1 != sum(lengths) + _ENTRY_LENGTH * len(keys):
        return None
    looks = _parse_looks(set(look_texts))
    if looks is None:
        return None
    kinds = list(map(looks.__getitem__, look_texts))
    ends = list(map(int, end_texts))
    follow_one_another = begin_texts[0] == "0" and begin_texts[1:] == end_texts[:-1]
    if not follow_one_another or ends != list(accumulate(map(itemgetter(2), kinds))) or ends[-1] != nbytes:
        return None
    infos = {key: TensorInfo(key, code, shape) for key, (code, shape, _) in zip(keys, kinds, strict=True)}
    if len(infos) != len(keys) or METADATA in infos:
        return None
    return SafetensorsHeader(infos, dict(zip(keys, [0, *ends[:-1]], strict=True)), metadata, [])


def _parse_looks(texts: set[str]) -> dict[str, tuple[str, tuple[int, ...], int]] | None:
    """Return dtype, shape and number of bytes by their text, or None where one of them is not valid."""
    if sum(map(len, texts)) > _MOST_LOOK_CHARACTERS:
        return None
    looks: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for text in texts:
        match = _LOOK.fullmatch(text)
        if match is None or match[1] not in _BITS:
            return None
        shape = tuple(map(int, match[2].split(","))) if match[2] else ()
        bits = math.prod(shape) * _BITS[match[1]]
        if len(shape) > _MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= _LARGEST_SIZE or bits % 8:
            return None
        looks[text] = match[1], shape, bits // 8
    return looks


def _metadata(value: object) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{METADATA} must map strings to strings")
    return value


def _entries(header: Mapping[str, Any], nbytes: int, metadata: Mapping[str, str]) -> SafetensorsHeader:
    """Return the tensors of a parsed header, which must fill the ``nbytes`` of data."""
    infos: dict[str, TensorInfo] = {}
    begins: dict[str, int] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # most tensors have the shape of another one, and share it
    reached, is_in_order = 0, True
    with_extra_fields = 0
    for key, entry in header.items():
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = _BITS[code]
        except (KeyError, TypeError, ValueError):
            _raise_entry_error(key, entry)
        elements = 1
        if type(shape) is not list or len(shape) > _MOST_DIMENSIONS:
            _raise_entry_error(key, entry)
        for size in shape:
            if type(size) is not int or not 0 <= size < _LARGEST_SIZE:
                _raise_entry_error(key, entry)
            elements *= size
        if type(begin) is not int or type(end) is not int or elements * bits != 8 * (end - begin):
            _raise_entry_error(key, entry)
        if (elements == 0 and math.prod(size or 1 for size in shape) >= _LARGEST_SIZE) or end >= _LARGEST_SIZE:
            raise FormatError(f"{quoted(key)}: the shape {str(shape)[:80]} overflows")
        if len(entry) != 3:
            with_extra_fields += 1
            _check_extra(key, entry, 0)
        sizes = tuple(shape)
        infos[key] = TensorInfo(key, code, shapes.setdefault(sizes, sizes))
        begins[key] = begin
        is_in_order = is_in_order and begin == reached
        reached = end
    # Most headers are in the order of the data, and need no sort.
    _check_end(reached if is_in_order else _end_of_sorted(header), nbytes)
    count = with_extra_fields
    warnings = [f"{plural(count, 'entry', 'entries')} with unknown fields"] if count else []
    return SafetensorsHeader(infos, begins, metadata, warnings)


def _check_extra(key: str, value: object, depth: int) -> None:
    if depth > _DEEPEST_EXTRA:
        raise FormatError(f"{quoted(key)}: the header entry is nested too deeply")
    if type(value) is int and value.bit_length() > 1000:
        raise FormatError(f"{quoted(key)}: the header entry holds an integer of {value.bit_length()} bits")
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_extra(key, part, depth + 1)


def _raise_entry_error(key: str, entry: object) -> NoReturn:
    name = quoted(key)
    if not isinstance(entry, dict):
        raise FormatError(f"{name}: the header entry is not an object")
    missing = [field for field in ("dtype", "shape", "data_offsets") if field not in entry]
    if missing:
        raise FormatError(f"{name}: the header entry has no {missing[0]}")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _BITS:
        raise FormatError(f"{name}: unknown dtype {quoted(str(code)[:40])}")
    if not isinstance(shape, list) or any(type(size) is not int or not 0 <= size < _LARGEST_SIZE for size in shape):
        raise FormatError(f"{name}: the shape {str(shape)[:80]} is not a list of sizes")
    if (
        not isinstance(span, list)
        or len(span) != 2
        or any(type(at) is not int or not 0 <= at < _LARGEST_SIZE for at in span)
    ):
        raise FormatError(f"{name}: the offsets {str(span)[:80]} are not a begin and an end")
    if len(shape) > _MOST_DIMENSIONS:
        raise FormatError(f"{name}: a shape of {len(shape)} dimensions")
    needed = math.prod(shape) * _BITS[code]
    if needed.bit_length() > 128:
        raise FormatError(f"{name}: the shape overflows, with {needed.bit_length()} binary digits")
    size = f"{needed // 8}" if needed % 8 == 0 else f"{needed / 8}"
    raise FormatError(f"{name}: {code} {shape} needs {size} bytes, offsets give {span[1] - span[0]}")


def _check_end(reached: int, size: int) -> None:
    if reached > size:
        raise FormatError(
            f"truncated: {reached - size:,} of {reached:,} bytes are missing at the end",
            hint="download or copy it again",
        )
    if reached < size:
        raise FormatError(f"not part of a tensor: {plural(size - reached, 'byte')} after the last tensor")


def _end_of_sorted(header: Mapping[str, Any]) -> int:
    reached = 0
    offsets = {key: entry["data_offsets"] for key, entry in header.items()}
    for key, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != reached:
            problem = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            where = f"it begins at byte {begin}, and the data before it ends at byte {reached}"
            raise FormatError(f"{quoted(key)} {problem}: {where}")
        reached = end
    return reached
