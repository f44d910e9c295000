"""The path, format and options of an output, chosen before any input is read."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Final

from ckptkit.core.arguments import require_choice, require_flags, require_number, require_path, require_type
from ckptkit.core.files.live_prefix import is_live_path
from ckptkit.core.files.places import is_url
from ckptkit.core.text import kind_of, nearest, printable, quoted
from ckptkit.errors import OutputError
from ckptkit.formats.writing.reflink import REFLINKS, Reflink
from ckptkit.formats.writing.state import PathState
from ckptkit.formats.writing.targets import output_path

__all__ = ["FORMATS", "Output", "choose_output"]

FORMATS = ("safetensors", "torch", "dcp")
_SUFFIXES = {
    ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".ckpt": "torch", ".pkl": "torch",
}  # fmt: skip


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?B?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_ALIKE = 0.7  # the least likeness of a suffix to a right one
_SHARD_SIZE: Final = 5 * 10**9  # of a directory without a given size, as in transformers
_EXAMPLE = "write 2GB, 500MiB, or a number of bytes"


@dataclass(frozen=True, slots=True)
class Output:
    """The path, format and options of an output: one file, a directory of shards, or a distributed checkpoint.

    A shard has at most ``max_shard_size`` bytes. A distributed checkpoint (DCP) is a directory too.

    With ``force``, an existing output is replaced. A torch file that is made from a training checkpoint keeps the
    other entries of that file, unless ``only_tensors`` is true. It keeps references to code that torch's weights-only
    loader would refuse only where ``keep_unknown`` is true.

    ``reflink`` says whether unchanged bytes may stay where they are on the disk, in blocks that the output shares with
    the input: ``auto`` shares them where the file system can, ``always`` refuses an output that cannot share them, and
    ``never`` copies. The files stay independent: a change of one never changes the other.

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
    reflink: Reflink = "auto"

    def __post_init__(self) -> None:
        """Refuse a path, a format or a size that no output can have."""
        path = _checked_path(self.path)
        object.__setattr__(self, "path", path)
        require_flags(force=self.force, only_tensors=self.only_tensors, keep_unknown=self.keep_unknown)
        require_type(self.format, str, "format", "a str")
        require_type(self.before, PathState | None, "before", "a PathState, or None")
        require_choice(self.reflink, REFLINKS, "reflink")
        if self.reflink == "always" and is_url(path):
            raise OutputError("a store cannot share blocks with an input", hint="leave out --reflink", path=path)
        if self.format not in FORMATS:
            raise OutputError(f"unknown format {quoted(self.format)}", hint=f"one of {', '.join(FORMATS)}", path=path)
        if self.max_shard_size is not None:
            require_number(self.max_shard_size, "max_shard_size", "a number of bytes", whole=True)
            if self.format != "safetensors":
                raise OutputError("shards are written as safetensors only", hint="leave out --format", path=path)
            if self.max_shard_size <= 0:
                raise OutputError(f"a shard of at most {self.max_shard_size} bytes cannot hold a tensor", path=path)

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
    reflink: Reflink = "auto",
) -> Output:
    """Return the output for ``path``: a directory of shards if ``max_shard_size`` is given, else one file.

    ``format`` is ``safetensors``, ``torch`` or ``dcp``; without it the suffix of ``path`` decides. A path without a
    suffix is a directory of safetensors, with shards of at most 5 GB. ``dcp`` writes a directory that
    ``torch.distributed.checkpoint.load`` reads, on any number of ranks. ``max_shard_size`` is a number of bytes, or a
    size such as ``"2GB"`` or ``"500MiB"``. ``reflink`` is as in ``Output``.

    Raises ``OutputError`` where the format is unknown, where shards are requested for another format than safetensors,
    and where the size is not valid.

    Example:
        >>> choose_output("shards", max_shard_size="2GB").max_shard_size
        2000000000
    """
    require_type(format, str | None, "format", "a str")
    name = _checked_path(path)
    suffix = _suffix(name)
    chosen = format or _SUFFIXES.get(suffix)
    is_other = name == "-" or "::" in name or is_live_path(name)  # of an input
    if chosen is None and max_shard_size is None and not is_other and (not suffix or suffix[1:].isdecimal()):
        max_shard_size = _SHARD_SIZE
    if max_shard_size is not None:
        output = Output(name, format or "safetensors", _size(max_shard_size, name), force, reflink=reflink)
        if suffix in _SUFFIXES:
            raise OutputError("shards need a directory", hint="give the output a name without a suffix", path=name)
        return output
    if chosen == "dcp" and suffix in _SUFFIXES:
        raise OutputError(
            "a distributed checkpoint is a directory", hint="give the output a name without a suffix", path=name
        )
    if chosen is None:
        near = nearest(suffix, _SUFFIXES, _ALIKE)
        start = (
            f"did you mean {printable(name.removesuffix(suffix) + near)}? " if near and name.endswith(suffix) else ""
        )
        raise OutputError(
            "the suffix does not name a format to write",
            hint=f"{start}use --format {' or '.join(FORMATS)}",
            call=f"{start}use format={' or '.join(map(repr, FORMATS))}",
            path=name,
        )
    return Output(name, chosen, None, force, only_tensors, keep_unknown, reflink=reflink)


def _suffix(name: str) -> str:
    """Return the suffix that tells the format, in lower case: of ``best.pth.tar``, a usual name, it is ``.pth``."""
    start, suffix = os.path.splitext(name.lower())
    inner = os.path.splitext(start)[1]
    return inner if suffix == ".tar" and _SUFFIXES.get(inner) == "torch" else suffix


def _checked_path(path: object) -> str:
    """Return the path of an output as a string; raise ``OutputError`` where no file can have this name."""
    require_path(path, "path")
    name = os.fsdecode(path)  # type: ignore[arg-type]
    if not name:
        raise OutputError("the output has no name", hint="give the output a file name")
    name = output_path(name)
    try:
        is_valid = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise OutputError("is not a name that a file can have", hint="give another name", path=name)
    return name


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
