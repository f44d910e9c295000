"""The options that share the work of a command among processes or machines."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

from ckptkit.cli.common.options import CommandFunction, add_options
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.errors import CkptkitError

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["Engine", "engine_options"]

_ENGINES: Final = ("ray",)
_jobs_option = click.option(
    "--jobs", type=click.IntRange(1), metavar="N",
    help="Share the work among N processes of this machine, or among at most N workers of an engine.",
)  # fmt: skip
_engine_option = click.option(
    "--engine", "engine_name", type=click.Choice(_ENGINES),
    help="Share the work among the machines of the Ray cluster that RAY_ADDRESS names; without it, Ray starts here. "
    "Inputs and output must be where all machines see them. Needs the extra [ray].",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engine:
    """What shares the work of a command: ``jobs`` workers of an engine, by default processes; or nothing."""

    jobs: int | None = None
    name: str | None = None

    def __bool__(self) -> bool:
        """Return whether the work is shared."""
        return self.jobs is not None or self.name is not None

    def input(self, path: str, checkpoint: Checkpoint) -> str | Checkpoint:
        """Return what a function of the Python API takes: workers open the path, and this process has opened it."""
        return path if self else checkpoint

    @contextlib.contextmanager
    def executor(self) -> Iterator[Executor | None]:
        """Give the executor for ``executor=`` of the Python API, or None if the work is not shared.

        Warnings of Python are off in the block, because commands print the warnings about each path themselves. Raises
        what ``RayExecutor`` raises.
        """
        with self._executor() as executor, warnings.catch_warnings():
            if executor is not None:
                warnings.simplefilter("ignore", UserWarning)
            yield executor

    @contextlib.contextmanager
    def _executor(self) -> Iterator[Executor | None]:
        if self.name == "ray":
            from ckptkit.tasks.ray import RayExecutor

            try:
                executor = RayExecutor(workers=self.jobs)
            except CkptkitError as error:
                error.path = ""  # it is about no file, although commands name one where errors do not
                raise
            with executor:
                yield executor
        elif self.jobs is not None:
            from ckptkit.tasks.processes import local_processes

            with local_processes(self.jobs) as processes:
                yield processes
        else:
            yield None


def engine_options(command: CommandFunction) -> CommandFunction:
    """Add --jobs and --engine, and pass them to the command as ``engine``."""

    @functools.wraps(command)
    def with_engine(*args: object, jobs: int | None, engine_name: str | None, **others: object) -> object:
        return command(*args, engine=Engine(jobs, engine_name), **others)

    return add_options(with_engine, _jobs_option, _engine_option)
