"""The path, format and options of an output, chosen before any input is read."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ckptkit.core.text import quoted
from ckptkit.errors import OutputError
from ckptkit.formats.atomic import PathState

__all__ = ["FORMATS", "Output", "choose_output"]

FORMATS = ("safetensors", "torch")
_SUFFIXES = {
    ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".ckpt": "torch", ".pkl": "torch",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Output:
    """The path, format and options of an output: one file, or a directory of shards.

    A shard has at most ``max_shard_size`` bytes.

    With ``force``, an existing output is replaced. A torch file that is made from a training checkpoint keeps the
    other entries of that file, unless ``only_tensors`` is true. It keeps references to code that torch's weights-only
    loader would refuse only where ``keep_unknown`` is true.

    ``before`` is the state of the path when the output was chosen, or None for its state when the writing begins. An
    output that another program changed since is not replaced.
    """

    path: str
    format: str
    max_shard_size: int | None = None
    force: bool = False
    only_tensors: bool = False
    keep_unknown: bool = False
    before: PathState | None = None

    @property
    def is_directory(self) -> bool:
        """Whether the output is a directory of several files."""
        return self.max_shard_size is not None


def choose_output(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    max_shard_size: int | None = None,
    force: bool = False,
    only_tensors: bool = False,
    keep_unknown: bool = False,
) -> Output:
    """Return the output for ``path``: a directory of shards if ``max_shard_size`` is given, else one file.

    ``format`` is ``safetensors`` or ``torch``; without it the suffix of ``path`` decides. Raises ``OutputError`` where
    the format is unknown, and where shards are requested for another format than safetensors.
    """
    name = os.fspath(path)
    if not name:
        raise OutputError("the output has no name", hint="give -o a file name")
    chosen = format or _SUFFIXES.get(os.path.splitext(name)[1].lower())
    if max_shard_size is not None:
        if (format or "safetensors") != "safetensors":
            raise OutputError("shards are written as safetensors only", hint="leave out --format", path=name)
        if os.path.splitext(name)[1] in _SUFFIXES:
            raise OutputError("shards need a directory", hint="give -o a name without a suffix", path=name)
        if max_shard_size <= 0:
            raise OutputError(f"a shard of at most {max_shard_size} bytes cannot hold a tensor", path=name)
        return Output(name, "safetensors", max_shard_size, force)
    if chosen is None:
        raise OutputError(
            "the suffix does not name a known format", hint=f"use --format {' or '.join(FORMATS)}", path=name
        )
    if chosen not in FORMATS:
        raise OutputError(f"unknown format {quoted(chosen)}", hint=f"one of {', '.join(FORMATS)}", path=name)
    return Output(name, chosen, None, force, only_tensors, keep_unknown)
