"""Refuse the plan of an adapter that changes less of the base than the user requires."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.coverage.requirements import Requirements, find_unmet
from ckptkit.errors import PlanError

__all__ = ["refuse_unmet"]


def refuse_unmet(
    requirements: Requirements,
    base: Checkpoint,
    changed: AbstractSet[str],
    reasons: Mapping[str, str] | None = None,
    *,
    source: str = "the adapter",
    hint: str,
    call: str,
) -> None:
    """Raise ``PlanError`` where ``changed``, the keys of ``base`` that adapters change, are fewer than required.

    ``reasons`` say why a key of the base is not changed; of other keys, the ``source`` has nothing. The hint says where
    to look, on the command line and in Python (``call``). Raises ``RuleError`` for a pattern that matches no key.
    """
    verbs = ("changes" if source == "the adapter" else "change", "changed")
    for unmet in find_unmet(requirements, base, changed, reasons or {}, of="the base", source=source, verbs=verbs):
        raise PlanError(unmet.message, hint=f"require less, or {hint}", call=f"require less, or {call}")
