"""Proving an output against its plan: read back, tensor by tensor, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files import same_bytes
from ckptkit.core.text import quoted
from ckptkit.errors import OutputError
from ckptkit.formats import open_checkpoint, open_inside
from ckptkit.plans.plan import Plan
from ckptkit.plans.produce import Maker

__all__ = ["verify"]


def verify(plan: Plan, sources: Mapping[str, Checkpoint], path: str, inner: str = "") -> int:
    """Return the number of tensors in the output at ``path``, each of them proved to be what ``plan`` makes.

    ``inner`` is the mapping of the file that they are in. Everything is made anew from ``sources`` and compared with
    what is read back, in bounded memory. Raises ``OutputError`` naming the first tensor that is missing, is one too
    many, or differs.
    """
    maker = Maker(sources)
    keys = {step.out.key for step in plan.steps}
    with open_inside(path, inner) if inner else open_checkpoint(path) as written:
        surplus = next((key for key in written if key not in keys), None)
        if surplus is not None:
            raise OutputError(f"holds {quoted(surplus)}, which the plan does not make", path=path)
        for step in plan.steps:
            info = written.get(step.out.key)
            if info is None or (info.dtype, info.shape) != (step.out.dtype, step.out.shape):
                raise OutputError(f"{quoted(step.out.key)} should be {step.out}, and is {info or 'missing'}", path=path)
            if not same_bytes(maker.payload(step), written.payload(step.out.key)):
                raise OutputError(f"{quoted(step.out.key)} does not have the bytes that the plan makes", path=path)
    return len(plan.steps)
