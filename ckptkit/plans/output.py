"""The path, format and options of an output, chosen before any input is read."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from ckptkit.core.arguments import require_flags, require_path, require_type
from ckptkit.core.text import kind_of, quoted
from ckptkit.errors import OutputError
from ckptkit.formats.atomic import PathState

__all__ = ["FORMATS", "Output", "choose_output"]

FORMATS = ("safetensors", "torch", "dcp")
_SUFFIXES = {
    ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".ckpt": "torch", ".pkl": "torch",
}  # fmt: skip


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?B?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_EXAMPLE = "write 2GB, 500MiB, or a number of bytes"


@dataclass(frozen=True, slots=True)
class Output:
    """The path, format and options of an output: one file, a directory of shards, or a distributed checkpoint.

    A shard has at most ``max_shard_size`` bytes. A distributed checkpoint (DCP) is a directory too.

    With ``force``, an existing output is replaced. A torch file that is made from a training checkpoint keeps the
    other entries of that file, unless ``only_tensors`` is true. It keeps references to code that torch's weights-only
    loader would refuse only where ``keep_unknown`` is true.

    ``before`` is the state of the path when the output was chosen, or None for its state when the writing begins. An
    output that another program changed since is not replaced.

    Example:
        >>> output = ckptkit.choose_output("model.safetensors", force=True)
        >>> output.format, output.force
        ('safetensors', True)
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
        return self.max_shard_size is not None or self.format == "dcp"


def choose_output(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    max_shard_size: int | str | None = None,
    force: bool = False,
    only_tensors: bool = False,
    keep_unknown: bool = False,
) -> Output:
    """Return the output for ``path``: a directory of shards if ``max_shard_size`` is given, else one file.

    ``format`` is ``safetensors``, ``torch`` or ``dcp``; without it the suffix of ``path`` decides. ``dcp`` writes a
    directory that ``torch.distributed.checkpoint.load`` reads, on any number of ranks. ``max_shard_size`` is a number
    of bytes, or a size such as ``"2GB"`` or ``"500MiB"``. Raises ``OutputError`` where the format is unknown, where
    shards are requested for another format than safetensors, and where the size is not valid.

    Example:
        >>> choose_output("shards", max_shard_size="2GB").max_shard_size
        2000000000
    """
    require_path(path, "path")
    require_type(format, str | None, "format", "a str")
    require_flags(force=force, only_tensors=only_tensors, keep_unknown=keep_unknown)
    name = os.fspath(path)
    if not name:
        raise OutputError("the output has no name", hint="give -o a file name")
    chosen = format or _SUFFIXES.get(os.path.splitext(name)[1].lower())
    if max_shard_size is not None:
        size = _size(max_shard_size, name)
        if (format or "safetensors") != "safetensors":
            raise OutputError("shards are written as safetensors only", hint="leave out --format", path=name)
        if os.path.splitext(name)[1] in _SUFFIXES:
            raise OutputError("shards need a directory", hint="give -o a name without a suffix", path=name)
        if size <= 0:
            raise OutputError(f"a shard of at most {size} bytes cannot hold a tensor", path=name)
        return Output(name, "safetensors", size, force)
    if chosen == "dcp" and os.path.splitext(name)[1] in _SUFFIXES:
        raise OutputError("a distributed checkpoint is a directory", hint="give -o a name without a suffix", path=name)
    if chosen is None:
        raise OutputError(
            "the suffix does not name a known format", hint=f"use --format {' or '.join(FORMATS)}", path=name
        )
    if chosen not in FORMATS:
        raise OutputError(f"unknown format {quoted(chosen)}", hint=f"one of {', '.join(FORMATS)}", path=name)
    return Output(name, chosen, None, force, only_tensors, keep_unknown)


def _size(given: object, path: str) -> int:
    """Return the number of bytes that a size means; raise ``OutputError`` for one that is not valid."""
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    match = _SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
    if match is None:
        what = quoted(given) if isinstance(given, str) else kind_of(given)
        raise OutputError(f"{what} is not a valid size of a shard", hint=_EXAMPLE, path=path)
    size = float(match[1]) * _UNITS[match[2].lower().removesuffix("b")]
    if not math.isfinite(size):
        raise OutputError(f"{quoted(match[0])} is larger than any file can be", hint=_EXAMPLE, path=path)
    return int(size)
