"""The inputs of plans with an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.plans.inputs import roles_of
from ckptkit.plans.steps import refuse_suspicious

__all__ = ["BASE", "DONOR", "opened_roles"]

BASE, DONOR = "base", "donor"


@contextlib.contextmanager
def opened_roles(base: CheckpointLike, *donors: CheckpointLike) -> Iterator[dict[str, Checkpoint]]:
    """Open the inputs, and give all by role; raise ``PlanError`` for a file with code that looks malicious."""
    with contextlib.ExitStack() as stack:
        roles = {role: stack.enter_context(opened(value, role)) for role, value in roles_of(base, donors).items()}
        for role, checkpoint in roles.items():
            refuse_suspicious(checkpoint, role)
        yield roles
