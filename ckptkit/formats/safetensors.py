"""safetensors: a JSON header with names, dtypes, shapes and offsets, then the bytes, without gaps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ckptkit.core.checkpoint import DTYPES, Checkpoint, Payload, Record, TensorInfo
from ckptkit.core.files import Extent, LocalFile
from ckptkit.core.gc_pause import without_collection
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError

__all__ = ["LARGEST_HEADER", "METADATA", "open_safetensors", "parse_json"]

LARGEST_HEADER = 100_000_000  # the limit of the safetensors library itself
METADATA = "__metadata__"
_MOST_DIMENSIONS = 1024
_LARGEST_SIZE = 2**63  # torch counts with signed 64-bit sizes
_DEEPEST_EXTRA = 100  # the library stops at 127 levels
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BITS = {dtype.code: dtype.bits for dtype in DTYPES.values() if dtype.storable}


def open_safetensors(file: LocalFile) -> Checkpoint:
    """Return the Checkpoint in a safetensors file; takes over the file.

    Accepts nothing that the safetensors library refuses, and refuses more: duplicate names and a
    header that does not begin with a brace. Raises ``FormatError`` naming the tensor and the numbers.
    """
    size = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else -1
    if size < 0:
        raise FormatError(f"too short: {file.size} bytes, and a safetensors header takes 8 to begin with")
    if size > LARGEST_HEADER:
        raise FormatError(f"the header is said to have {size:,} bytes, more than the limit of {LARGEST_HEADER:,}")
    if size > file.size - 8:
        raise FormatError(
            f"the header is said to have {size:,} bytes and the file has {file.size:,}: truncated?",
            hint="download or copy it again",
        )
    data = file.read(8, size)
    if not data.startswith(b"{"):
        raise FormatError("the header does not begin with '{': not a safetensors file")
    with without_collection():
        header = parse_json(data, "the header")
        metadata = _metadata(header.pop(METADATA, None))
        infos, offsets, warnings = _entries(header)
        _check_tiling(offsets, file.size - 8 - size)
    base = 8 + size

    def payload(info: TensorInfo) -> Payload:
        begin, end = offsets[info.key]
        return Extent(file, base + begin, end - begin)

    def records() -> Iterator[Record]:
        for key in sorted(offsets, key=offsets.__getitem__):
            yield Record(file.path, key, payload(infos[key]), keys=(key,))

    return Checkpoint(
        infos,
        payload,
        path=file.path,
        format="safetensors",
        metadata=metadata,
        warnings=warnings,
        span=payload,
        records=records,
        files=[file.path],
        check=file.check_unchanged,
        close=file.close,
    )


def parse_json(data: bytes, what: str, *, finite: bool = True) -> dict[str, Any]:
    """Return the JSON object in ``data``; raises ``FormatError`` for anything else, a key given twice included.

    Without ``finite``, NaN and Infinity are read as Python writes them.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant if finite else None,
            parse_float=_finite if finite else None,
            parse_int=_integer if b"-0" in data else None,
        )
        if _LONE_SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise FormatError(f"{what} holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply") from None
    except _JsonError as error:
        raise FormatError(f"{what} {error}") from None
    except ValueError as error:
        raise FormatError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is a JSON {type(value).__name__}, not an object")
    return value


class _JsonError(Exception):
    """JSON that Python reads and the standard does not allow."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _JsonError(f"names {quoted(name)} twice")
    return made


def _no_constant(name: str) -> NoReturn:
    raise _JsonError(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _JsonError(f"holds {text[:40]}, which is no finite number")
    return value


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # no integer to the safetensors library, and none to us


def _metadata(value: object) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{METADATA} must map strings to strings")
    return value


def _entries(header: Mapping[str, Any]) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]], list[str]]:
    infos: dict[str, TensorInfo] = {}
    offsets: dict[str, tuple[int, int]] = {}
    odd = 0
    for key, entry in header.items():
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = _BITS[code]
        except (KeyError, TypeError, ValueError):
            _explain(key, entry)
        elements = 1
        if type(shape) is not list or len(shape) > _MOST_DIMENSIONS:
            _explain(key, entry)
        for size in shape:
            if type(size) is not int or not 0 <= size < _LARGEST_SIZE:
                _explain(key, entry)
            elements *= size
        if type(begin) is not int or type(end) is not int or elements * bits != 8 * (end - begin):
            _explain(key, entry)
        if (elements == 0 and math.prod(size or 1 for size in shape) >= _LARGEST_SIZE) or end >= _LARGEST_SIZE:
            raise FormatError(f"{quoted(key)}: the shape {str(shape)[:80]} overflows")
        if len(entry) != 3:
            odd += 1
            _check_extra(key, entry, 0)
        infos[key] = TensorInfo(key, code, tuple(shape))
        offsets[key] = (begin, end)
    return infos, offsets, [f"{plural(odd, 'entry', 'entries')} with fields that are not known"] if odd else []


def _check_extra(key: str, value: object, depth: int) -> None:
    if depth > _DEEPEST_EXTRA:
        raise FormatError(f"{quoted(key)}: the header entry is nested too deeply")
    if type(value) is int and value.bit_length() > 1000:
        raise FormatError(f"{quoted(key)}: the header entry holds an integer of {value.bit_length()} bits")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_extra(key, inner, depth + 1)


def _explain(key: str, entry: object) -> NoReturn:
    name = quoted(key)
    if not isinstance(entry, dict):
        raise FormatError(f"{name}: the header entry is no object")
    missing = [field for field in ("dtype", "shape", "data_offsets") if field not in entry]
    if missing:
        raise FormatError(f"{name}: the header entry has no {missing[0]}")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _BITS:
        raise FormatError(f"{name}: unknown dtype {quoted(str(code)[:40])}")
    if not isinstance(shape, list) or any(type(size) is not int or not 0 <= size < _LARGEST_SIZE for size in shape):
        raise FormatError(f"{name}: the shape {str(shape)[:80]} is no list of sizes")
    if (
        not isinstance(span, list)
        or len(span) != 2
        or any(type(at) is not int or not 0 <= at < _LARGEST_SIZE for at in span)
    ):
        raise FormatError(f"{name}: the offsets {str(span)[:80]} are no begin and end")
    if len(shape) > _MOST_DIMENSIONS:
        raise FormatError(f"{name}: a shape of {len(shape)} dimensions")
    needed = math.prod(shape) * _BITS[code]
    if needed.bit_length() > 128:
        raise FormatError(f"{name}: the shape overflows, with {needed.bit_length()} binary digits")
    size = f"{needed // 8}" if needed % 8 == 0 else f"{needed / 8}"
    raise FormatError(f"{name}: {code} {shape} needs {size} bytes, offsets give {span[1] - span[0]}")


def _check_tiling(offsets: Mapping[str, tuple[int, int]], size: int) -> None:
    reached = 0
    for begin, end in offsets.values():
        if begin != reached:
            reached = _reach_of_sorted(offsets)  # most headers are in the order of their data; others cost a sort
            break
        reached = end
    if reached > size:
        raise FormatError(
            f"truncated: {reached - size:,} of {reached:,} bytes are missing at the end",
            hint="download or copy it again",
        )
    if reached < size:
        raise FormatError(f"{size - reached:,} bytes follow the last tensor and belong to none")


def _reach_of_sorted(offsets: Mapping[str, tuple[int, int]]) -> int:
    reached = 0
    for key, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            raise FormatError(f"{quoted(key)} {what}: it begins at byte {begin}, and {reached} are taken")
        reached = end
    return reached
