"""Short descriptions of checkpoints, tensors and shares, which several pages and documents contain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.text import human_bytes, plural, printable
from ckptkit.render.page import Code, as_code

__all__ = ["checkpoint_document", "describe", "json_number", "percent", "share_cell", "tensor_document", "totals"]


def totals(infos: Iterable[TensorInfo]) -> dict[str, int]:
    """Return the number of tensors, of their elements, and of their bytes."""
    tensors = elements = nbytes = 0
    for info in infos:
        count = info.elements
        tensors += 1
        elements += count
        nbytes += (count * DTYPES[info.dtype].bits + 7) // 8 if info.dtype in DTYPES else info.stored_bytes
    return {"tensors": tensors, "elements": elements, "bytes": nbytes}


def describe(checkpoint: Checkpoint, count: Mapping[str, int]) -> tuple[str | Code, ...]:
    """Return the parts of a line with the path, the mapping inside the file, the format and the ``totals``."""
    inside = (" at ", Code(f"::{printable(checkpoint.envelope)}")) if checkpoint.envelope else ()
    what = f": {checkpoint.format}, {plural(count['tensors'], 'tensor')}, {plural(count['elements'], 'element')}"
    return as_code(checkpoint.path), *inside, f"{what}, {human_bytes(count['bytes'])}"


def checkpoint_document(checkpoint: Checkpoint) -> dict[str, object]:
    """Return path, format and totals of a checkpoint for a JSON document."""
    return {"path": checkpoint.path, "format": checkpoint.format, **totals(checkpoint.values())}


def tensor_document(info: TensorInfo) -> dict[str, object]:
    """Return key, dtype and shape of a tensor for a JSON document."""
    return {"key": info.key, "dtype": info.dtype, "shape": list(info.shape)}


def percent(share: float) -> str:
    """Return a share between 0 and 1 as a percentage; only a share of exactly 1 gives 100 %."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def json_number(value: float | None) -> float | str | None:
    """Return a number for a JSON document, in which NaN and Inf are strings."""
    return value if value is None or math.isfinite(value) else str(value)


def share_cell(part: int, whole: int) -> str:
    """Return ``part`` of ``whole`` as a percentage for a table; empty if ``whole`` is 0."""
    return f"{part / whole:.1%}" if whole else ""
