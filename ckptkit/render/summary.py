"""Short descriptions of checkpoints, tensors and shares, which several pages and documents contain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import human_bytes, listed, percent, plural, printable
from ckptkit.render.page import Code, Line, as_code, table_rows

if TYPE_CHECKING:
    from ckptkit.core.coverage import ModuleCoverage
    from ckptkit.quantized import Quantized
    from ckptkit.quantized.view import DequantizedWeight

__all__ = [
    "MOST_NAMES",
    "checkpoint_document", "coverage_documents", "dequantized_document", "dequantized_lines", "describe", "json_number",
    "names_in_short", "quantized_document", "quantized_lines", "share_cell", "tensor_document", "totals_document",
    "value_cell",
]  # fmt: skip

_LONGEST_VALUE = 80
MOST_NAMES = 16  # that a sentence lists; the JSON document has all


def describe(checkpoint: CheckpointSummary, label: str = "") -> tuple[str | Code, ...]:
    """Return the parts of a line with the path, the mapping inside the file, the format and the totals.

    The path is left out where the line begins with the same ``label``, as with a model in memory.
    """
    inside = (" at ", Code(f"::{printable(checkpoint.envelope)}")) if checkpoint.envelope else ()
    what = f": {checkpoint.format}, {plural(checkpoint.tensors, 'tensor')}, {plural(checkpoint.elements, 'element')}"
    if label and checkpoint.path == label and not checkpoint.is_stored:
        return (f"{what[2:]}, {human_bytes(checkpoint.nbytes)}",)
    return as_code(checkpoint.path), *inside, f"{what}, {human_bytes(checkpoint.nbytes)}"


def checkpoint_document(checkpoint: CheckpointSummary) -> dict[str, object]:
    """Return path, format and totals of a checkpoint for a JSON document."""
    return {"path": checkpoint.path, "format": checkpoint.format, **totals_document(checkpoint)}


def totals_document(checkpoint: CheckpointSummary) -> dict[str, object]:
    """Return the totals of a checkpoint for a JSON document."""
    return {"tensors": checkpoint.tensors, "elements": checkpoint.elements, "bytes": checkpoint.nbytes}


def tensor_document(info: TensorInfo) -> dict[str, object]:
    """Return key, dtype and shape of a tensor for a JSON document."""
    return {"key": info.key, "dtype": info.dtype, "shape": list(info.shape)}


def quantized_document(quantized: Quantized, keys: Container[str]) -> list[dict[str, object]]:
    """Return the quantised weights that have a part among ``keys`` for a JSON document."""
    return [
        {"key": weight.key, "scheme": weight.scheme, "parts": list(weight.parts)}
        for weight in quantized.weights
        if any(part in keys for part in weight.parts)
    ]


def quantized_lines(quantized: Quantized, keys: Container[str]) -> list[Line]:
    """Return one line for each scheme with the number of quantised weights, and of their parts among ``keys``."""
    weights, tensors = Counter[str](), Counter[str]()
    for weight in quantized.weights:
        count = sum(part in keys for part in weight.parts)
        weights[weight.scheme] += bool(count)
        tensors[weight.scheme] += count
    return [
        Line((f"quantised as {scheme}: {plural(count, 'weight')} in {plural(tensors[scheme], 'tensor')}",))
        for scheme, count in weights.items()
        if count
    ]


def dequantized_lines(weights: Iterable[DequantizedWeight], label: str = "") -> list[Line]:
    """Return one line for each scheme and dtype with the number of weights that were read as numbers."""
    counts = Counter((weight.scheme, weight.dtype) for weight in weights)
    side = f"{label}: " if label else ""
    return [
        Line((f"{side}{plural(count, 'weight')} ({scheme}) {'is' if count == 1 else 'are'} dequantised to {dtype}",))
        for (scheme, dtype), count in counts.items()
    ]


def dequantized_document(weight: DequantizedWeight) -> dict[str, object]:
    """Return a weight that was read as numbers for a JSON document."""
    return {"key": weight.key, "scheme": weight.scheme, "dtype": weight.dtype}


def coverage_documents(modules: Iterable[ModuleCoverage]) -> list[dict[str, object]]:
    """Return the coverage of modules for a JSON document."""
    return [
        {
            "module": module.module,
            "loaded": module.loaded,
            "tensors": module.tensors,
            "loaded_elements": module.loaded_elements,
            "elements": module.elements,
        }
        for module in modules
    ]


def names_in_short(names: Iterable[str], *, expand: bool = False, most: int = MOST_NAMES) -> str:
    """Return printable names, joined as rows of a table are, and the first ``most`` of them unless ``expand``."""
    rows = [name for (name,) in table_rows([(name, ()) for name in names], expand=expand)]
    return listed(rows, len(rows) if expand else most, show=str)


def json_number(value: float | None) -> float | str | None:
    """Return a number for a JSON document, in which NaN and Inf are strings."""
    return value if value is None or math.isfinite(value) else str(value)


def share_cell(part: int, whole: int) -> str:
    """Return ``part`` of ``whole`` as a percentage for a table; empty if ``whole`` is 0."""
    return percent(part / whole) if whole else ""


def value_cell(text: str) -> str:
    """Return a value for a table: printable, and cut after 80 characters."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[: _LONGEST_VALUE - 1]}…"
