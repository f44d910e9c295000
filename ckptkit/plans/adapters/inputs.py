"""The inputs of plans with an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.plans.steps import refuse_suspicious

__all__ = ["BASE", "DONOR", "opened_roles"]

BASE, DONOR = "base", "donor"


@contextlib.contextmanager
def opened_roles(base: CheckpointLike, donor: CheckpointLike) -> Iterator[dict[str, Checkpoint]]:
    """Open the two inputs, and give both by role; raise ``PlanError`` for a file with code that looks malicious."""
    with opened(base, BASE) as base_side, opened(donor, DONOR) as donor_side:
        roles = {BASE: base_side, DONOR: donor_side}
        for role, checkpoint in roles.items():
            refuse_suspicious(checkpoint, role)
        yield roles
