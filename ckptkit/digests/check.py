"""``check_digests``: compare a checkpoint with digests that were recorded before."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final, NamedTuple

from ckptkit.core.arguments import refuse
from ckptkit.core.checkpoint import MOST_TENSORS
from ckptkit.core.config_files import default_error_path, read_text_file
from ckptkit.core.progress import Progress
from ckptkit.core.result import Result
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.text import listed, quoted
from ckptkit.digests import digest
from ckptkit.digests.hashing import ALGORITHMS, HEX_DIGITS
from ckptkit.digests.model import CONTENTS, NAMES_AND_SHAPES, Digests, contents_digest
from ckptkit.errors import FormatError, RuleError
from ckptkit.inputs import CheckpointLike
from ckptkit.rules.model import RulesLike

__all__ = ["DigestCheck", "check_digests"]

_AGAIN: Final = "a digest file has all lines that ckpt digest PATH prints"
_NOT_HEX: Final = re.compile(r"[^0-9a-f]")
_LINE: Final = re.compile(r"(?P<algorithm>[A-Za-z0-9_-]+):(?P<hex>[0-9A-Za-z]*)  (?P<name>.+)")


@dataclass(frozen=True, repr=False)
class DigestCheck(Result):
    """What became of the recorded tensors. All keys are sorted.

    Attributes:
        equal: Keys of tensors with the recorded digest.
        different: Keys of tensors with another digest: another dtype, shape or value.
        missing: Recorded keys that the checkpoint does not have.
        new: Keys of the checkpoint that were not recorded.
        moved: The first new key of a tensor with the digest of a missing key, by missing key.
        same_names_and_shapes: Whether all keys and shapes are the recorded ones.
        algorithm: ``"sha256"`` or ``"xxh3"``.
        skipped: Why a tensor was left out, by key; empty unless ``skip_unread`` was given.
        checkpoint: Path, format and size of the checkpoint.

    Example:
        >>> recorded = ckptkit.digest("fixtures/lenet_10class.pth")
        >>> ckptkit.check_digests(recorded, "fixtures/lenet_10class.safetensors").ok
        True
    """

    _truth: ClassVar[str] = "ask for .ok"

    equal: tuple[str, ...]
    different: tuple[str, ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]
    moved: Mapping[str, str]
    same_names_and_shapes: bool
    algorithm: str
    skipped: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    checkpoint: CheckpointSummary = NO_CHECKPOINT

    @property
    def ok(self) -> bool:
        """Whether the checkpoint has exactly the recorded keys, each with the recorded digest, and all else agrees.

        False where only the recorded digest of names and shapes is another: the record is then damaged.
        """
        return self.same_contents and self.same_names_and_shapes

    @property
    def same_contents(self) -> bool:
        """Whether the checkpoint has exactly the recorded keys, each with the recorded digest."""
        return not (self.different or self.missing or self.new)

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        rest = f"{len(self.different):,} FAILED, {len(self.missing):,} missing, {len(self.new):,} new"
        return f"{len(self.equal):,} OK, {rest}"


def check_digests(
    recorded: str | os.PathLike[str] | Digests,
    checkpoint: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    skip_unread: bool = False,
    progress: Progress | None = None,
) -> DigestCheck:
    """Return which tensors of a checkpoint have the recorded digests; the recorded checkpoint is not needed.

    Args:
        recorded: The path of a file that ``ckpt digest`` wrote, or what ``digest`` returned. The algorithm is the
            recorded one.
        checkpoint: As in ``digest``.
        rules: As in ``digest``. They must keep and rename the same keys as when the digests were recorded.
        skip_unread: As in ``digest``.
        progress: As in ``digest``.

    Raises:
        ArgumentError: ``recorded`` is neither, or the algorithm needs a package that is not installed.
        FormatError: The digest file is not valid, or the stored bytes of the checkpoint do not agree with its header.
        PathError: A path cannot be read.
        RuleError: A rule cannot be applied, or computes a new tensor.
        ModelError: ``checkpoint`` is not a state_dict.
        PlanError: A tensor cannot be read.
        ChangedError: A file changes while it is read.

    Example:
        >>> recorded = digest({"a": torch.zeros(2), "b": torch.ones(2)})
        >>> check_digests(recorded, {"a": torch.ones(2), "b": torch.ones(2)}).different
        ('a',)
    """
    if isinstance(recorded, Digests):
        known = _Recorded(
            recorded.algorithm,
            {key: tensor.digest for key, tensor in recorded.tensors.items()},
            recorded.names_and_shapes,
        )
    elif isinstance(recorded, str | os.PathLike):
        known = _read(os.fsdecode(recorded))
    else:
        refuse(recorded, "recorded", "the path of a digest file, or the result of digest()")
    found = digest(checkpoint, rules, algorithm=known.algorithm, skip_unread=skip_unread, progress=progress)
    return _compare(known, found)


class _Recorded(NamedTuple):
    """What a digest file says: ``algorithm``, the digest of each key, and the one of names and shapes."""

    algorithm: str
    digests: Mapping[str, str]
    names_and_shapes: str


def _compare(recorded: _Recorded, found: Digests) -> DigestCheck:
    both = [key for key in found.tensors if key in recorded.digests]
    equal = tuple(key for key in both if found.tensors[key].digest == recorded.digests[key])
    missing = tuple(sorted(recorded.digests.keys() - found.tensors.keys()))
    new = tuple(key for key in found.tensors if key not in recorded.digests)
    places: dict[str, str] = {}
    for key in new:
        places.setdefault(found.tensors[key].digest, key)
    return DigestCheck(
        equal,
        tuple(key for key in both if found.tensors[key].digest != recorded.digests[key]),
        missing,
        new,
        {key: places[recorded.digests[key]] for key in missing if recorded.digests[key] in places},
        recorded.names_and_shapes == found.names_and_shapes,
        found.algorithm,
        found.skipped,
        found.checkpoint,
    )


def _read(path: str) -> _Recorded:
    with default_error_path(path):
        try:
            text = read_text_file(path, "digests")
        except RuleError as error:  # too large, or not UTF-8
            raise FormatError(error.reason) from None
        return _parse(text)


def _parse(text: str) -> _Recorded:
    """Return the content of a digest file, also with the mark and the line ends of Windows. Raises ``FormatError``."""
    digests: dict[str, str] = {}
    whole: dict[str, str] = {}
    algorithms: dict[str, None] = {}
    for number, line in enumerate(_lines(text.removeprefix("\ufeff")), 1):
        algorithm, found, name = _parse_line(line, number)
        algorithms[algorithm] = None
        if len(algorithms) > 1:
            raise FormatError(f"line {number} is {algorithm}, and the lines before it are {next(iter(algorithms))}")
        into, key = (digests, _key(name, number)) if name.startswith('"') else (whole, name)
        if into is whole and key not in (CONTENTS, NAMES_AND_SHAPES):
            raise FormatError(f"line {number} has {quoted(key)} where a key in double quotes must be")
        if key in into:
            raise FormatError(f"line {number} has {quoted(key)} a second time")
        if len(digests) >= MOST_TENSORS:
            raise FormatError(f"has more than {MOST_TENSORS:,} tensors")
        into[key] = found
    lost = [name for name in (CONTENTS, NAMES_AND_SHAPES) if name not in whole]
    if lost:
        raise FormatError(f"has no line for {listed(lost, separator=' and ')}, so lines may be lost", hint=_AGAIN)
    algorithm = next(iter(algorithms))
    if contents_digest(digests, algorithm) != whole[CONTENTS]:
        raise FormatError(f"the line {quoted(CONTENTS)} does not agree with the lines of the tensors", hint=_AGAIN)
    return _Recorded(algorithm, digests, whole[NAMES_AND_SHAPES])


def _lines(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end].removesuffix("\r")
        start = end + 1


def _parse_line(line: str, number: int) -> tuple[str, str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise FormatError(f"line {number} does not have the form ALGORITHM:HEX  KEY: {quoted(line)}", hint=_AGAIN)
    algorithm, digits = match["algorithm"], match["hex"].lower()
    if algorithm not in ALGORITHMS:
        raise FormatError(f"line {number} has the algorithm {quoted(algorithm)}, and ckptkit knows sha256 and xxh3")
    if len(digits) != HEX_DIGITS[algorithm] or _NOT_HEX.search(digits):
        raise FormatError(f"line {number} does not have {HEX_DIGITS[algorithm]} hexadecimal digits after {algorithm}:")
    return algorithm, f"{algorithm}:{digits}", match["name"]


def _key(text: str, number: int) -> str:
    try:
        key = json.loads(text)
    except ValueError:
        key = None
    if not isinstance(key, str):
        raise FormatError(f"line {number} has a key that is not a valid JSON string: {quoted(text)}")
    return key
