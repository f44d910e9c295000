"""The options that share the work of a command among processes or machines."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

import click

from ckptkit.cli.common.options import CommandFunction, add_options

__all__ = ["Engine", "engine_options"]

_ENGINES: Final = ("ray",)
_jobs_option = click.option(
    "--jobs", type=click.IntRange(1), metavar="N",
    help="Share the work among N processes of this machine; with --engine, among at most N workers.",
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

    @contextlib.contextmanager
    def executor(self) -> Iterator[Executor | None]:
        """Give the executor for ``executor=`` of the Python API, or None if the work is not shared.

        Raises what ``RayExecutor`` raises.
        """
        if self.name == "ray":
            from ckptkit.tasks.ray import RayExecutor

            with RayExecutor(workers=self.jobs) as executor:
                try:
                    yield executor
                except BaseException:
                    executor.shutdown(wait=False, cancel_futures=True)
                    raise
        elif self.jobs is not None:
            from ckptkit.tasks.processes import local_processes

            with local_processes(self.jobs) as executor:
                yield executor
        else:
            yield None


def engine_options(command: CommandFunction) -> CommandFunction:
    """Add --jobs and --engine, and pass them to the command as ``engine``."""

    @functools.wraps(command)
    def with_engine(*args: object, jobs: int | None, engine_name: str | None, **others: object) -> object:
        return command(*args, engine=Engine(jobs, engine_name), **others)

    return add_options(with_engine, _jobs_option, _engine_option)
