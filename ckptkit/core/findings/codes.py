"""The codes of findings that every check can have."""

from __future__ import annotations

from ckptkit.core.findings import Code, codes_in

IGNORE_UNUSED = Code("ignore-unused", ("note",), "An entry of the ignore list left no finding out.")

CODES = codes_in(globals())
