"""The codes of the findings of ``ckpt git frozen``."""

from __future__ import annotations

from ckptkit.core.findings import Code, codes_in

NOT_FROZEN = Code("git.frozen", ("error",), "A tensor that must be frozen is not the same as in the base.")
NEW_FILE = Code("git.new-file", ("note",), "The base does not have the file, so nothing was compared.")
SAME_FILE = Code("git.same-file", ("note",), "The base has the same file, byte by byte.")
NO_KEY = Code("git.no-key", ("note",), "A pattern of frozen tensors matches no key of the file.")

CODES = codes_in(globals())
