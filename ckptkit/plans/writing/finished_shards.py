"""The finished shards of an output: recorded for a later run, and kept where this run goes on with a killed one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.places import is_url, name_of, parent_of, version_at
from ckptkit.core.progress import Progress
from ckptkit.core.text import plural, printable
from ckptkit.errors import ArgumentError, OutputError, PathError
from ckptkit.formats.sharded import Shard
from ckptkit.formats.writing.journal import FinishedFile, Journal
from ckptkit.formats.writing.staging import Staging, find_leftovers
from ckptkit.formats.writing.state import Target
from ckptkit.formats.writing.targets import real_path
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan
from ckptkit.plans.writing.shard_results import ShardResult, digest_of, hash_of
from ckptkit.tasks.same_code import LIBRARIES, version_of

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = [
    "FinishedShards",
    "finished_shards",
    "made_of",
    "notes_of_leftovers",
    "refuse_to_resume",
    "staging_for",
]

_LOST_AT_MOST: Final = 5.0  # seconds of work, beside the shard that is being made; short runs are not slowed down


def refuse_to_resume(plan: Plan, output: Output, roles: Mapping[str, Checkpoint]) -> None:
    """Raise ``OutputError`` where a killed run leaves nothing that a later run could keep."""
    reason, hint = "", "leave out --continue"
    if is_url(output.path):
        reason = "a store keeps no finished shards of a killed run"
    elif output.max_shard_size is None:
        what = "a distributed checkpoint" if output.format == "dcp" else "one file"
        reason = f"a killed run leaves only finished shards, and this output is {what}"
        hint = "leave out --continue, or write shards: --max-shard-size 5GB"
    else:
        role = next((role for role in _roles_read(plan) if not roles[role].files), None)
        reason = "" if role is None else f"the {role} is in memory, and may be another one than in the earlier run"
    if reason:
        raise OutputError(reason, hint=hint, path=output.path)


def _roles_read(plan: Plan) -> list[str]:
    return list(dict.fromkeys(source.role for step in plan.steps for source in step.sources))


def made_of(plan: Plan, output: Output, roles: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Return what decides the bytes of all shards, as two digests: of the plan, and of the versions of its inputs.

    It is empty where an input is in memory, or in a store that does not tell its version. Raises ``ChangedError`` where
    a path of an input names another file than when it was opened.
    """
    files = {role: [_version(file) for file in roles[role].files] for role in _roles_read(plan)}
    if any(not versions or None in versions for versions in files.values()):
        return {}
    for role in files:
        roles[role].check_unchanged(by_path=True)
    import hashlib  # most runs end before a shard is recorded, and should not wait for these
    import json

    from ckptkit.plans.saved import step_to_json

    about = {
        "libraries": [version_of(name) for name in ("ckptkit", *LIBRARIES)],
        "size": output.max_shard_size,
        "reflink": output.reflink,
        "metadata": sorted(plan.metadata.items()),
    }
    found = hashlib.sha256(json.dumps(about).encode())
    for step in plan.steps:
        found.update(json.dumps({**step_to_json(step, roles), "rule": ""}).encode())
    inputs = hashlib.sha256(json.dumps(files).encode())
    return {"plan": f"sha256:{found.hexdigest()}", "inputs": f"sha256:{inputs.hexdigest()}"}


def _version(path: str) -> tuple[object, ...] | None:
    with contextlib.suppress(PathError):
        return version_at(path)
    return None


def staging_for(target: Target, made: Callable[[], Mapping[str, str]], *, resume: bool) -> Staging:
    """Return where the shards of an output are made: with ``resume`` where an earlier run left shards of these bytes.

    Of several places, the one with the most finished shards. ``made`` returns what decides the bytes, see ``made_of``.
    Raises ``OutputError`` where another process works on this output, and where nothing tells the version of an input.
    """
    if not resume:
        return Staging.new(target.path)
    wanted = made()
    if not wanted:
        raise OutputError("nothing tells the version of an input", hint="leave out --continue", path=target.given)
    found: Staging | None = None
    for staging, is_in_use in find_leftovers(target.path):
        if is_in_use:
            if found is not None:
                found.close()
            where = printable(_shown(staging, target.given))
            raise OutputError(
                f"another process writes this output now, in {where}", hint="wait until it ends", path=target.given
            )
        is_fewer = found is not None and len(staging.finished) <= len(found.finished)
        if not _fits(staging, wanted) or is_fewer:
            staging.close()
            continue
        if found is not None:
            found.close()
        found = staging
    found = found or Staging.new(target.path)
    found.keeps_finished = True
    return found


def _fits(staging: Staging, made: Mapping[str, str]) -> bool:
    """Return whether a place has shards of these bytes, or nothing that was recorded."""
    return staging.journal.made_of in ({}, made)


def notes_of_leftovers(
    plan: Plan, output: Output, roles: Mapping[str, Checkpoint], *, resume: bool, is_run: bool
) -> list[str]:
    """Return a sentence about each place that an earlier run left beside the output, and that this run does not use.

    Without ``is_run``, also about the place that a run uses.
    """
    if is_url(output.path) or not output.is_directory:
        return []
    left = []
    for staging, is_in_use in find_leftovers(real_path(output.path)):
        staging.close()
        left += [] if is_in_use else [staging]
    made = made_of(plan, output, roles) if left and resume else {}
    fitting = [staging for staging in left if made and _fits(staging, made)]
    chosen = max(fitting, key=lambda staging: len(staging.finished), default=None)
    return [
        _note(staging, output.path, made, is_chosen=staging is chosen)
        for staging in left
        if staging is not chosen or not (is_run or not staging.finished)
    ]


def _note(staging: Staging, given: str, made: Mapping[str, str], *, is_chosen: bool) -> str:
    place, count, found = printable(_shown(staging, given)), len(staging.finished), staging.journal.made_of
    if is_chosen:
        return f"{place} holds {plural(count, 'finished shard')} of this plan, which --continue compares and keeps"
    if not count:
        return f"{place} is left of an earlier run, without a finished shard: remove it by hand"
    holds = f"{place} is left of an earlier run, with {plural(count, 'finished shard')}"
    if not made:
        return f"{holds}; --continue keeps those of the same plan and inputs, or remove it by hand"
    if found == made:
        return f"{holds}, and another place has more: remove it by hand"
    other = "another plan" if found.get("plan") != made["plan"] else "inputs that have changed"
    return f"{holds} of {other}: remove it by hand"


def _shown(staging: Staging, given: str) -> str:
    return os.path.join(parent_of(given), name_of(staging.path))


class FinishedShards:
    """The shards of one output directory that are complete, in its staging place.

    A thread hashes and records them while the next ones are made. That begins when a kill would lose more than a few
    seconds of work; where the run keeps its shards also after an error, it begins at once. A shard of which most blocks
    are those of an input is not recorded: to make it again costs less than to read it.
    """

    def __init__(self, staging: Staging | None, made: Callable[[], Mapping[str, str]]) -> None:
        """Take the staging place, which has begun, or None where nothing is recorded; and what decides the bytes."""
        self.kept: dict[str, ShardResult] = {}
        self._staging = staging if staging is not None and staging.journal.is_locked else None
        self._made = made
        self._pool: ThreadPoolExecutor | None = None
        self._not_recorded: list[tuple[str, ShardResult]] = []
        self._waiting: Future[None] | None = None
        self._recorded_at = time.monotonic()
        self._is_stopped = False

    def keep(self, shards: Iterable[Shard], progress: Progress) -> None:
        """Compare the shards that an earlier run finished with their digests, and keep those that have them.

        All other shards are removed. Every byte of each is read, by all threads. ``progress`` gets the bytes of the
        tensors of each shard that is kept.
        """
        if self._staging is None:
            return
        recorded = {file.name: file for file in self._staging.finished}
        wanted = [(shard, recorded.pop(shard.name)) for shard in shards if shard.name in recorded]
        if not wanted and not recorded:
            return
        from ckptkit.values.workers import Workers

        with Workers() as workers:
            for shard, file, is_same in workers.each(self._compared, wanted):
                result = _result_of(file) if is_same else None
                if result is None:
                    os.unlink(self._path(file.name))
                else:
                    self.kept[shard.name] = result
                    progress(sum(info.nbytes for info in shard.infos))
        for name in recorded:
            os.unlink(self._path(name))

    def _compared(self, task: tuple[Shard, FinishedFile]) -> tuple[Shard, FinishedFile, bool]:
        shard, file = task
        algorithm, _, wanted = file.digest.partition(":")
        try:
            digest = hash_of(self._path(file.name), algorithm, lambda: self._is_stopped)
        except (ArgumentError, OSError):  # the library of this digest is gone, or the disk cannot read the file
            digest = ""
        return shard, file, bool(wanted) and digest == wanted

    def add(self, name: str, result: ShardResult) -> None:
        """Take a shard that is complete and on the disk. Raises ``OSError`` where an earlier one cannot be recorded."""
        if self._staging is None or not result.is_worth_keeping:
            return
        self._not_recorded.append((name, result))
        if not self._staging.keeps_finished and time.monotonic() < self._recorded_at + _LOST_AT_MOST:
            return
        self.begin()
        if self._staging is None:
            return
        if self._waiting is not None:
            self._waiting.result()
        shards, self._not_recorded = self._not_recorded, []
        from concurrent.futures import ThreadPoolExecutor

        self._pool = self._pool or ThreadPoolExecutor(1)
        try:
            self._waiting = self._pool.submit(self._record, shards, self._staging.journal)
        except RuntimeError:  # the system refuses a thread
            self._pool = None
            self._record(shards, self._staging.journal)
        self._recorded_at = time.monotonic()

    def begin(self) -> None:
        """Write down what decides the bytes, before another process may leave a shard. Raises ``OSError``."""
        if self._staging is not None and not self._staging.journal.made_of:
            made = self._made()
            if made:
                self._staging.journal.begin(made)
            else:
                self._staging = None

    def record(self, name: str, result: ShardResult, digest: str) -> None:
        """Take a shard that is complete, on the disk and hashed, after ``begin``. Raises ``OSError``."""
        if self._staging is not None and digest:
            self._staging.journal.add(FinishedFile(name, result.nbytes, digest, result.to_json()))

    def _record(self, shards: Iterable[tuple[str, ShardResult]], journal: Journal) -> None:
        for name, result in shards:
            digest = digest_of(self._path(name), lambda: self._is_stopped)
            if digest:
                journal.add(FinishedFile(name, result.nbytes, digest, result.to_json()))

    def _path(self, name: str) -> str:
        assert self._staging is not None  # noqa: S101 - only shards of a staging place are hashed
        return os.path.join(self._staging.files, name)

    def stop(self) -> None:
        """End the thread; a shard that it hashes now is recorded only where the run keeps its shards after an error."""
        self._is_stopped = self._staging is None or not self._staging.keeps_finished
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


def _result_of(file: FinishedFile) -> ShardResult | None:
    try:
        return ShardResult.of(file)
    except (KeyError, TypeError):
        return None


@contextlib.contextmanager
def finished_shards(staging: Staging | None, made: Callable[[], Mapping[str, str]]) -> Iterator[FinishedShards]:
    """Give the finished shards of a staging place; the thread ends with the block."""
    found = FinishedShards(staging, made)
    try:
        yield found
    finally:
        found.stop()
