"""Share the work on the tensors of checkpoints among the workers of an executor, in parts of about equal bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.progress import Progress
from ckptkit.core.text import plural, quoted
from ckptkit.tasks.executor_type import Executor, require_executor
from ckptkit.tasks.inputs import SentInput, paths_of, send_input
from ckptkit.tasks.running import run_tasks

__all__ = ["Part", "Sharing", "name_of_part", "require_shareable", "sharing_of"]

_WORTH: Final = 32 << 20  # bytes; to send less to workers takes longer than to read it here
_LEAST, _MOST = 8 << 20, 1 << 30  # bytes of a part, unless one tensor has more
_PER_WORKER: Final = 4  # parts, so that workers of different speed end at about one time
_Item = TypeVar("_Item")
_Work = TypeVar("_Work")
_Result = TypeVar("_Result")


class Part(NamedTuple, Generic[_Work]):
    """A part of the work, as a worker gets it: the inputs to open, and what to do with them.

    ``name`` is what errors call it, and ``nbytes`` how many bytes it reads.
    """

    inputs: tuple[SentInput, ...]
    work: _Work
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """An executor, the inputs that its workers open, and the same inputs as this process has opened them."""

    executor: Executor
    inputs: tuple[SentInput, ...]
    opened: tuple[Checkpoint, ...]

    def parts_of(self, items: Sequence[_Item], nbytes: Callable[[_Item], int]) -> list[list[_Item]]:
        """Return the items in parts of about equal bytes, in order; in one part where sharing does not pay."""
        total = sum(map(nbytes, items))
        return list(_grouped(items, nbytes, self.bytes_of_part(total))) if self.pays(total) else [list(items)]

    def pays(self, total: int) -> bool:
        """Return whether it takes less time to send work on ``total`` bytes to workers than to do it here."""
        return total >= _WORTH

    def bytes_of_part(self, total: int) -> int:
        """Return how many bytes a part of ``total`` bytes should have."""
        return min(max(total // (_PER_WORKER * _workers_of(self.executor)), _LEAST), _MOST)

    def run(
        self, function: Callable[[Part[_Work]], _Result], parts: Iterable[Part[_Work]], progress: Progress | None
    ) -> Iterator[_Result]:
        """Yield what ``function`` returns for each part, in order.

        Raises what ``run_tasks`` raises, and at the end ``ChangedError`` where a path names another file by then.
        """

        def done(part: Part[_Work], _: _Result) -> None:
            if progress is not None:
                progress(part.nbytes)

        yield from run_tasks(self.executor, function, parts, name=lambda part: part.name, done=done)
        for checkpoint in self.opened:  # a worker cannot tell a file of the same size and time from that of the caller
            checkpoint.check_unchanged(by_path=True)


def require_shareable(executor: object, inputs: Mapping[str, object]) -> None:
    """Raise ``ArgumentError`` unless ``executor`` is None, or an executor whose workers can open these inputs."""
    require_executor(executor)
    if executor is not None:
        paths_of(inputs)


def sharing_of(executor: Executor | None, inputs: Iterable[tuple[object, Checkpoint]]) -> Sharing | None:
    """Return what shares the work on inputs, each given as its path and open; None without an executor.

    Raises what ``send_input`` raises.
    """
    if executor is None:
        return None
    given = list(inputs)
    sent = tuple(send_input(os.fsdecode(str(path)), opened) for path, opened in given)
    return Sharing(executor, sent, tuple(opened for _, opened in given))


def name_of_part(keys: Sequence[str]) -> str:
    """Return what errors call the work on these tensors."""
    return quoted(keys[0]) if len(keys) == 1 else f"{plural(len(keys), 'tensor')} from {quoted(keys[0])} on"


def _workers_of(executor: Executor) -> int:
    known = getattr(executor, "workers", None) or getattr(executor, "_max_workers", None)
    return known if isinstance(known, int) else os.cpu_count() or 1


def _grouped(items: Iterable[_Item], nbytes: Callable[[_Item], int], most: int) -> Iterator[list[_Item]]:
    group: list[_Item] = []
    size = 0
    for item in items:
        if group and size + nbytes(item) > most:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes(item)
    if group:
        yield group
