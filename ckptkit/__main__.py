"""``python -m ckptkit`` is ``ckpt``."""

from __future__ import annotations

from ckptkit.cli import run

run()
