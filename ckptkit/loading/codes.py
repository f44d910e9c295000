"""Codes of the findings of ``load_into``."""

from __future__ import annotations

from ckptkit.core.findings import Code, codes_in

__all__ = [
    "CODES",
    "DERIVED",
    "INFINITE",
    "META",
    "MISSING",
    "NAMED",
    "OVERFLOW",
    "REPLACED",
    "SHAPE",
    "SHARED",
    "SKIPPED",
    "TIED",
    "UNDERFLOW",
    "UNPROVED",
]

INFINITE = Code("load.infinite", ("warning",), "Codes of a quantised weight stand for NaN or inf, and were loaded so.")
MISSING = Code(
    "load.missing", ("warning", "note"), "A tensor of the model is not in the checkpoint and keeps its value."
)
NAMED = Code("load.named", ("note",), "The checkpoint numbers its tensors, which were taken in the model's order.")
OVERFLOW = Code("load.overflow", ("warning",), "The dtype of the model cannot hold a value, which became inf.")
SHAPE = Code("load.shape", ("warning", "note"), "A tensor of the checkpoint has another shape and was not loaded.")
SHARED = Code(
    "load.shared", ("warning",), "A tensor was not loaded, but it shares memory with a loaded tensor and changed."
)
SKIPPED = Code("load.skipped", ("note",), "A tensor or another entry of the checkpoint was not loaded.")
TIED = Code("load.tied", ("note",), "A tensor was loaded because it is tied to a loaded tensor.")
DERIVED = Code("load.derived", ("note",), "A hook of the model rewrote a buffer that is in no checkpoint.")
UNDERFLOW = Code("load.underflow", ("note",), "The cast to the model's dtype made 0 of a value, or cut its fraction.")
UNPROVED = Code("load.unproved", ("note",), "A value was not compared after loading.")
REPLACED = Code("load.replaced", ("warning",), "An optimizer holds parameters that assign=True replaced in the model.")
META = Code("load.meta", ("warning",), "A tensor of the model is still on the meta device, without a value.")

CODES = codes_in(globals())
