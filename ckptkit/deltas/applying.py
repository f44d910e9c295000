"""``apply_delta``: make a checkpoint of its base and of a patch, in one call."""

from __future__ import annotations

import os

from ckptkit.core.arguments import require_path
from ckptkit.core.config_files import default_error_path
from ckptkit.core.progress import Progress
from ckptkit.deltas.planning import BASE, PATCH, plan_of_patch
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.plans.execute import Prepared, execute_prepared, workers_of
from ckptkit.plans.output import choose_output
from ckptkit.plans.writing.written import Written
from ckptkit.tasks.executor_type import Executor

__all__ = ["apply_delta"]


def apply_delta(
    base: CheckpointLike,
    patch: CheckpointLike,
    out: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    max_shard_size: int | str | None = None,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Written:
    """Write the checkpoint that a patch of ``make_delta`` makes of ``base``, as ``ckpt apply`` does.

    Every tensor is hashed in the pass that writes it, and compared with the digest that the patch has of it. The output
    gets its name only if all agree. ``plan_apply_delta`` gives the tensors without a file.

    Args:
        base: The checkpoint that the patch was made from: a path, a Checkpoint, a Module or a mapping of tensors. Its
            format may be another one, and so may its shards.
        patch: The path of the patch, or an open Checkpoint of it.
        out: The path of the output, as in ``choose_output``.
        format: As in ``choose_output``.
        max_shard_size: As in ``choose_output``.
        force: Replace an existing output.
        resume: As in ``execute``.
        verify: As in ``execute``.
        progress: As in ``execute``.
        executor: As in ``execute``. Then ``base`` and ``patch`` must be paths.

    Raises:
        ArgumentError: An argument has a wrong type, or an input is not a path and there is an ``executor``.
        PathError: A path cannot be read.
        FormatError: ``patch`` is not a patch, is damaged, or is of a later version.
        PlanError: ``base`` is not the checkpoint that the patch was made from, or the format cannot hold a tensor.
        ChangedError: An input changes while it is read.
        OutputError: The output exists (without ``force``), or cannot be written.

    Example:
        >>> import ckptkit, os, tempfile
        >>> base, new = "fixtures/lenet_10class.pth", "fixtures/lenet_tuned.safetensors"
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     patch, out = (os.path.join(directory, name) for name in ("patch.safetensors", "out.safetensors"))
        ...     delta = ckptkit.make_delta(base, new, patch)
        ...     written = ckptkit.apply_delta(base, patch, out)
        ...     ckptkit.digest(out).contents == ckptkit.digest(new).contents
        True
    """
    require_path(out, "out")
    output = choose_output(out, format=format, max_shard_size=max_shard_size, force=force)
    elsewhere = workers_of(executor, {BASE: base, PATCH: patch})
    with opened(base, BASE) as checkpoint, opened(patch, PATCH) as packed:
        with default_error_path(packed.path):
            plan = plan_of_patch(checkpoint, packed)
        sources = {BASE: checkpoint, PATCH: packed}
        return execute_prepared(
            Prepared(plan), sources, output, verify=verify, resume=resume, progress=progress, elsewhere=elsewhere
        )
