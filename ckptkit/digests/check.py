"""``check_digests``: compare a checkpoint with digests that were recorded before."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Final, NamedTuple

from ckptkit.core.arguments import refuse, require_flags, require_progress
from ckptkit.core.checkpoint import MOST_TENSORS, Checkpoint
from ckptkit.core.config_files import default_error_path, read_text_file
from ckptkit.core.files.places import clean_path, is_file, open_source
from ckptkit.core.progress import Progress
from ckptkit.core.result import Result
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.text import listed, quoted, shared_start
from ckptkit.digests import digest_opened
from ckptkit.digests.hashing import ALGORITHMS, HEX_DIGITS, hash_function
from ckptkit.digests.model import CONTENTS, NAMES_AND_SHAPES, Digests, contents_digest
from ckptkit.errors import CkptkitError, FormatError, RuleError
from ckptkit.formats import open_checkpoint
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules, RulesLike
from ckptkit.tasks.executor_type import Executor
from ckptkit.tasks.sharing import require_shareable, sharing_of

__all__ = ["DigestCheck", "check_digests", "is_digest_file", "refuse_checkpoint"]

_AGAIN: Final = "a digest file has all lines that ckpt digest PATH prints"
_START_BYTES: Final = 64
_START: Final = re.compile(rb"(\xef\xbb\xbf)?(sha256|xxh3):[0-9A-Fa-f]{20}")
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
        moved: A new key of a tensor with the digest of a missing key, by missing key. Of several, it is the one whose
            last parts are those of the missing key.
        same_names_and_shapes: Whether all keys and shapes are the recorded ones; None where that is not known, since
            ``left_out`` has keys and a digest differs.
        algorithm: ``"sha256"`` or ``"xxh3"``.
        skipped: Why a tensor was left out, by key; empty unless ``skip_unread`` was given.
        checkpoint: Path, format and size of the checkpoint.
        left_out: Recorded keys that the rules leave out. They are in no other field.

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
    same_names_and_shapes: bool | None
    algorithm: str
    skipped: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    checkpoint: CheckpointSummary = NO_CHECKPOINT
    left_out: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the checkpoint has exactly the recorded keys, each with the recorded digest, and all else agrees.

        False where only the recorded digest of names and shapes is another: the record is then damaged.
        """
        return self.same_contents and self.same_names_and_shapes is not False

    @property
    def same_contents(self) -> bool:
        """Whether the checkpoint has exactly the recorded keys, each with the recorded digest."""
        return not (self.different or self.missing or self.new)

    @property
    def prefixes(self) -> tuple[str, str] | None:
        """The prefix of all missing keys, and the one that their tensors have instead; None if that explains not all.

        Either may be empty, and both end with a dot otherwise.
        """
        if not self.missing or len(self.moved) < len(self.missing):
            return None
        found = {_prefixes(key, place) for key, place in self.moved.items()}
        return found.pop() if len(found) == 1 else None

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
    executor: Executor | None = None,
) -> DigestCheck:
    """Return which tensors of a checkpoint have the recorded digests; the recorded checkpoint is not needed.

    Args:
        recorded: The path of a file that ``ckpt digest`` wrote, or what ``digest`` returned. The algorithm is the
            recorded one.
        checkpoint: As in ``digest``.
        rules: As in ``digest``: they make the recorded names of the names in the checkpoint. Recorded tensors that
            ``keep`` and ``drop`` leave out are not compared.
        skip_unread: As in ``digest``.
        progress: As in ``digest``.
        executor: As in ``stats``.

    Raises:
        ArgumentError: ``recorded`` is neither, or the algorithm needs a package that is not installed; or
            ``checkpoint`` is not a path, but there is an executor.
        WorkerError: A worker ended before its task was done.
        FormatError: The digest file is not valid, or the stored bytes of the checkpoint do not agree with its header.
        PathError: A path cannot be read.
        RuleError: A rule cannot be applied, or computes a new tensor.
        ModelError: ``checkpoint`` is not a state_dict.
        PlanError: A tensor cannot be read.
        ChangedError: A file changes while it is read.

    Example:
        >>> recorded = ckptkit.digest({"a": torch.zeros(2), "b": torch.ones(2)})
        >>> ckptkit.check_digests(recorded, {"a": torch.ones(2), "b": torch.ones(2)}).different
        ('a',)
    """
    require_flags(skip_unread=skip_unread)
    require_progress(progress)
    require_shareable(executor, {"checkpoint": checkpoint})
    if isinstance(recorded, Digests):
        known = _Recorded(
            recorded.algorithm,
            {key: tensor.digest for key, tensor in recorded.tensors.items()},
            recorded.names_and_shapes,
        )
    elif isinstance(recorded, str | os.PathLike):
        known = _read(clean_path(os.fsdecode(recorded)))
    else:
        refuse(recorded, "recorded", "the path of a digest file, or the result of digest()")
    with opened(checkpoint, "checkpoint") as opened_checkpoint:
        parsed = rules_for(rules, opened_checkpoint)
        sharing = sharing_of(executor, [(checkpoint, opened_checkpoint)])
        hash_function(known.algorithm)  # its package may be missing
        found = digest_opened(opened_checkpoint, parsed, known.algorithm, progress, sharing, skip_unread=skip_unread)
        left_out = _left_out(known.digests, parsed, opened_checkpoint) - found.tensors.keys()
    return _compare(known, found, left_out)


class _Recorded(NamedTuple):
    """What a digest file says: ``algorithm``, the digest of each key, and the one of names and shapes."""

    algorithm: str
    digests: Mapping[str, str]
    names_and_shapes: str


def _left_out(recorded: Iterable[str], rules: Rules, found: Checkpoint) -> set[str]:
    """Return the recorded keys that the filters of ``rules`` leave out.

    Filters without renames apply to the recorded names as to those of the checkpoint. Beside renames, they apply to
    names from before: then the recorded name of each key that was dropped is known, and no other.
    """
    filters = [stage for stage in rules.stages if stage.keep or any(rule.drops for rule in stage.rules)]
    if not filters:
        return set()
    renames = [replace(stage, keep=(), rules=tuple(rule for rule in stage.rules if not rule.drops))
               for stage in rules.stages]  # fmt: skip
    if not any(stage.rules or stage.strip or stage.made for stage in renames):
        kept = apply_rules(replace(rules, allow_unused=True), recorded).renamed
        return {key for key in recorded if key not in kept}
    dropped = apply_rules(rules, found).dropped
    try:
        names = apply_rules(Rules(tuple(renames), allow_unused=True), found).renamed
    except RuleError:  # two keys get one name, and the filters leave one of them out
        return set()
    return {names[key] for key in dropped if key in names}.intersection(recorded)


def _compare(known: _Recorded, found: Digests, left_out: Collection[str]) -> DigestCheck:
    recorded = {key: one for key, one in known.digests.items() if key not in left_out}
    both = [key for key in found.tensors if key in recorded]
    equal = tuple(key for key in both if found.tensors[key].digest == recorded[key])
    different = tuple(key for key in both if found.tensors[key].digest != recorded[key])
    missing = tuple(sorted(recorded.keys() - found.tensors.keys()))
    new = tuple(key for key in found.tensors if key not in recorded)
    is_same: bool | None = known.names_and_shapes == found.names_and_shapes
    if left_out:  # the recorded digest of names and shapes covers them
        is_same = False if missing or new else None if different else True
    return DigestCheck(
        equal, different, missing, new,
        dict(_moved(missing, recorded, {key: found.tensors[key].digest for key in new})),
        is_same, found.algorithm, found.skipped, found.checkpoint, tuple(sorted(left_out)),
    )  # fmt: skip


def _moved(missing: Iterable[str], recorded: Mapping[str, str], new: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield missing keys with the new key of the same digest that ends as they do; of several, the first in order."""
    places: dict[str, list[tuple[list[str], str]]] = {}
    for key, found in new.items():
        places.setdefault(found, []).append((key.split(".")[::-1], key))
    for candidates in places.values():
        candidates.sort()
    for key in missing:
        candidates = places.get(recorded[key], [])
        parts = key.split(".")[::-1]
        at = bisect_left(candidates, (parts, key))  # the longest common end is that of a neighbour
        near = candidates[max(at - 1, 0) : at + 1]
        if near:
            yield key, max(near, key=lambda one: shared_start(one[0], parts))[1]


def _prefixes(key: str, place: str) -> tuple[str, str]:
    """Return what is before the last parts that two keys share."""
    parts, others = key.split("."), place.split(".")
    shared = shared_start(parts[::-1], others[::-1])
    return "".join(f"{part}." for part in parts[: len(parts) - shared]), "".join(
        f"{part}." for part in others[: len(others) - shared]
    )


def is_digest_file(path: str) -> bool:
    """Return whether a file begins as a digest file does; False for a path that cannot be read."""
    if not is_file(path):  # what a pipe gives once is for its reader
        return False
    try:
        with closing(open_source(path)) as file:
            return _START.match(file.read(0, min(file.size, _START_BYTES))) is not None
    except CkptkitError:
        return False


def refuse_checkpoint(path: str) -> None:
    """Raise ``FormatError`` if a path that should be a digest file is a checkpoint."""
    try:
        open_checkpoint(path).close()
    except CkptkitError:
        return
    raise FormatError(
        "is a checkpoint, not a digest file",
        path=path,
        hint="ckpt digest PATH -o OUT writes the digests of a checkpoint",
    )


def _read(path: str) -> _Recorded:
    with default_error_path(path):
        try:
            text = read_text_file(path, "digests")
            return _parse(text)
        except (RuleError, FormatError) as error:  # RuleError: too large, or not UTF-8
            if not is_digest_file(path):
                refuse_checkpoint(path)
            raise FormatError(error.reason, hint=error.hint) from None


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
