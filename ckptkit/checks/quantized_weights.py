"""Checks of quantised weights: missing parts; and which values of their parts can be judged."""

from __future__ import annotations

from collections.abc import Container, Iterator

from ckptkit.checks import codes
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.core.findings import Finding, Severity
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import CkptkitError
from ckptkit.quantized import Quantized, QuantizedWeight
from ckptkit.quantized.decoding import Decoding

__all__ = ["check_broken_parts", "check_quantized", "has_numbers"]


def check_quantized(quantized: Quantized, keys: Container[str], *, is_one_shard: bool = False) -> Iterator[Finding]:
    """Yield a ``missing-part`` for each weight that lacks parts, and a ``quantized`` note for each scheme.

    Only weights with a part among ``keys`` count. A part that ``is_one_shard`` lacks can be in another shard.
    """
    by_scheme: dict[str, list[QuantizedWeight]] = {}
    for weight in quantized.weights:
        if not any(part in keys for part in weight.parts):
            continue
        if weight.missing:
            message = f"{quoted(weight.key)} is quantised as {weight.scheme}, but lacks {listed(weight.missing)}"
            hint = "save or download the checkpoint again"
            if is_one_shard:
                hint = "another shard may have it: check the index or the directory"
            severity: Severity = "note" if is_one_shard else "error"
            yield codes.MISSING_PART.finding(weight.parts[0], message, hint, severity=severity)
        if weight.parts != (weight.coded,):
            by_scheme.setdefault(weight.scheme, []).append(weight)
    for scheme, weights in by_scheme.items():
        parts = plural(sum(len(weight.parts) for weight in weights), "tensor")
        count = f"{plural(len(weights), 'weight')} quantised as {scheme}, in {parts}"
        message = f"{count}: of their values, only NaN and Inf were looked for: {listed([w.key for w in weights])}"
        yield codes.QUANTIZED.finding(weights[0].parts[0], message)


def check_broken_parts(
    checkpoint: Checkpoint, quantized: Quantized, keys: Container[str], *, reads: bool
) -> Iterator[Finding]:
    """Yield a ``broken-part`` for each weight with parts that its scheme cannot have, for the schemes with a decoder.

    Shapes and dtypes are in the headers. With ``reads``, scales, zero points and other companions are read too, and
    must not be NaN or infinite.
    """
    decoding = Decoding(checkpoint)
    for weight in quantized.weights:
        if not weight.family or weight.missing or not any(part in keys for part in weight.parts):
            continue
        try:
            found = decoding.broken(weight, reads=reads)
        except (CkptkitError, OSError):  # the pass over the records reports what cannot be read
            continue
        if found is not None:
            hint = "save or download the checkpoint again"
            yield codes.BROKEN_PART.finding(found.key, found.reason, hint)


def has_numbers(info: TensorInfo, weight: QuantizedWeight | None) -> bool:
    """Return whether NaN and infinities in a tensor are real: in codes of fp8 and in scales, not in other codes."""
    if weight is None:
        return True
    return info.dtype.startswith("F8_") or (info.dtype in PLAIN_FLOATS and info.key != weight.coded)
