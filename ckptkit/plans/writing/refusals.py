"""Outputs that are refused before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.files.places import is_same_file, name_of, parent_of, split
from ckptkit.core.text import listed, printable
from ckptkit.errors import OutputError
from ckptkit.formats.distributed.file_names import DCP_METADATA, DCP_SUFFIX
from ckptkit.formats.safetensors import refuse_unstorable
from ckptkit.formats.sharded import is_output_shard_name, is_shard_name
from ckptkit.formats.writing.targets import real_path
from ckptkit.plans.output import Output

__all__ = ["is_own_name", "refuse_replacing_inputs", "refuse_unwritable_tensors"]


def refuse_unwritable_tensors(infos: Sequence[TensorInfo], format_name: str) -> None:
    """Raise ``PlanError`` for a tensor that a file of this format cannot hold."""
    if format_name == "safetensors":
        refuse_unstorable(infos)
    elif format_name == "dcp":
        from ckptkit.formats.distributed.dcp_write import refuse_unfit

        refuse_unfit(infos)
    else:
        from ckptkit.formats.torch.write import refuse_unwritable

        refuse_unwritable(infos)


def refuse_replacing_inputs(output: Output, roles: Mapping[str, Checkpoint], edited: str) -> None:
    """Raise ``OutputError`` where an output would replace an input without ``force``, or lose a part of an input.

    ``edited`` is the role of the input that the output is an edited copy of, or the empty string.
    """
    parent, name = split(real_path(output.path))
    for role, checkpoint in roles.items():
        same = any(is_same_file(file, output.path) for file in checkpoint.files)
        parents = {parent_of(file) or "." for file in checkpoint.files}
        inside = output.is_directory and any(
            is_own_name(output, name_of(file)) and is_same_file(parent_of(file) or ".", output.path)
            for file in checkpoint.files
        )
        if not same and not inside:
            if len(checkpoint.files) > 1 and is_shard_name(name) and any(is_same_file(at, parent) for at in parents):
                raise OutputError("would be read as a shard of an input", hint="write elsewhere", path=output.path)
            continue
        if not output.force:
            raise OutputError("is an input", hint="write elsewhere, or --force to replace it", path=output.path)
        if len(checkpoint.files) > 1 and not inside:
            raise OutputError("is a shard of an input, and the other shards would no longer match", path=output.path)
        lost = [entry.path for entry in checkpoint.entries if entry.path != "_metadata" and not entry.is_file]
        if lost and role != edited:
            raise OutputError(
                f"is an input that holds more than tensors: the output would lose {listed(lost, 4, show=printable)}",
                hint="write elsewhere",
                path=output.path,
            )


def is_own_name(output: Output, name: str) -> bool:
    """Return whether an output directory replaces an old file of this name."""
    return name == DCP_METADATA or name.endswith(DCP_SUFFIX) if output.format == "dcp" else is_output_shard_name(name)
