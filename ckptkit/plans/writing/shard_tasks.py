"""Shards as tasks of an executor: each is written by a worker, and recorded by the process that holds the journal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ckptkit.core.files.places import is_url
from ckptkit.core.progress import Progress
from ckptkit.errors import OutputError, WorkerError
from ckptkit.formats.sharded import Shard
from ckptkit.formats.writing.atomic import AtomicFile, current_umask, output_errors
from ckptkit.formats.writing.output_file import OutputFile
from ckptkit.formats.writing.reflink import Reflink
from ckptkit.formats.writing.staging import Staging
from ckptkit.plans.inputs import PlanInputs
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan
from ckptkit.plans.plan.step import Step
from ckptkit.plans.produce import Producer
from ckptkit.plans.writing.files import write_safetensors_file
from ckptkit.plans.writing.finished_shards import FinishedShards
from ckptkit.plans.writing.shard_results import ShardResult, digest_of, result_of
from ckptkit.tasks.executor_type import Executor
from ckptkit.tasks.inputs import SentInput, opened_again, send_input
from ckptkit.tasks.running import run_tasks

if TYPE_CHECKING:
    from ckptkit.plans.methods.limits import Group
    from ckptkit.plans.verify import Verification

__all__ = ["Elsewhere", "ShardTasks", "refuse_elsewhere"]

_Result = TypeVar("_Result")
_SAME_PATH = "give an output on a disk that all workers reach under one path"
_LEAVE_OUT = "leave out --jobs and --engine", "leave out executor"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """An executor whose workers write the shards, and the paths by which they open the inputs, by role."""

    executor: Executor
    paths: Mapping[str, str]


def refuse_elsewhere(output: Output) -> None:
    """Raise ``OutputError`` where workers could not write this output: one file, or no file of this machine."""
    hint, call = _LEAVE_OUT
    if is_url(output.path):
        raise OutputError(
            "workers write shards beside the output, and a store has no place for them",
            hint=f"write to a disk that all workers reach, or {hint}",
            call=f"write to a disk that all workers reach, or {call}",
            path=output.path,
        )
    if output.max_shard_size is None:
        what = "a distributed checkpoint" if output.format == "dcp" else "one file"
        raise OutputError(
            f"each worker writes shards, and this output is {what}",
            hint=f"{hint}, or write shards: --max-shard-size 5GB",
            call=f"{call}, or write shards: max_shard_size='5GB'",
            path=output.path,
        )


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard, for a worker that reaches the inputs and the output under the same paths. It may be done twice.

    ``place`` is where the finished shard gets its name, and ``work`` where it is made before that. Once the process
    that made the task has ended, or needs no shard any more, there is no ``work``.
    """

    name: str
    place: str
    work: str
    steps: tuple[Step, ...]
    metadata: Mapping[str, str]
    inputs: Mapping[str, SentInput]
    limits: Mapping[Group, float] | None
    reflink: Reflink
    shown: str

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(step.out.nbytes for step in self.steps)

    @contextlib.contextmanager
    def opened(self) -> Iterator[PlanInputs]:
        """Give the inputs. Raises what ``opened_again`` raises."""
        with contextlib.ExitStack() as stack, output_errors(self.place):
            roles = {role: stack.enter_context(opened_again(sent)) for role, sent in self.inputs.items()}
            producer = stack.enter_context(contextlib.closing(Producer.of_some(roles, self.steps, self.limits)))
            yield PlanInputs({step.out.key: step for step in self.steps}, roles, producer, allow_overflow=True)

    def refuse_ended(self, _nbytes: int = 0) -> None:
        """Raise ``OutputError`` where no one needs the shard any more."""
        if not os.path.isdir(self.work):
            raise OutputError(
                "the directory of unfinished shards is not there: the run has ended, or this worker cannot reach it",
                hint=_SAME_PATH,
                path=self.work,
            )


def make_shard(task: ShardTask) -> tuple[ShardResult, str]:
    """Write a shard, and return what is to be known of it, with the digest of its bytes.

    The digest is empty where a later run would rather make the shard again.
    """
    task.refuse_ended()
    path = os.path.join(task.place, task.name)

    def create(size: int, block: int, *, by_kernel: bool) -> OutputFile:
        return AtomicFile(path, size, block, by_kernel=by_kernel, place=task.work)

    with task.opened() as inputs:
        infos = tuple(step.out for step in task.steps)
        size, shared = write_safetensors_file(
            create,
            infos,
            task.metadata,
            inputs,
            task.refuse_ended,
            place=path,
            reflink=task.reflink,
            ready=inputs.check_unchanged,
        )
        result = result_of(inputs, Shard(task.name, infos), size, shared, ())
        return result, digest_of(path) if result.is_worth_keeping else ""


def verify_shard(task: ShardTask) -> Verification:
    """Let safetensors read a finished shard, and compare it with its steps, which are computed again."""
    from ckptkit.plans.verify import verify_safetensors

    with task.opened() as inputs:
        path = os.path.join(task.place, task.name)
        return verify_safetensors(path, task.shown, task.steps, task.metadata, inputs.producer)


class ShardTasks:
    """The tasks of the shards of one output, on the executor of the user."""

    def __init__(self, elsewhere: Elsewhere, plan: Plan, output: Output, inputs: PlanInputs) -> None:
        """Note the versions of the inputs. Raises what ``send_input`` raises."""
        self._executor = elsewhere.executor
        self._plan, self._output, self._inputs = plan, output, inputs
        self._sent = {role: send_input(elsewhere.paths[role], inputs.roles[role]) for role in inputs.roles}

    def _tasks(self, shards: Sequence[Shard], place: str, work: str) -> Iterator[ShardTask]:
        limits = self._inputs.producer.found_limits()
        for shard in shards:
            steps = tuple(self._inputs.steps[info.key] for info in shard.infos)
            roles = dict.fromkeys(source.role for step in steps for source in step.sources)
            yield ShardTask(
                shard.name,
                os.path.abspath(place),
                os.path.abspath(work),
                steps,
                dict(self._plan.metadata),
                {role: self._sent[role] for role in roles},
                limits,
                self._output.reflink,
                os.path.join(self._output.path, shard.name),
            )

    def make(
        self, shards: Sequence[Shard], staging: Staging, finished: FinishedShards, progress: Progress
    ) -> dict[str, ShardResult]:
        """Let the workers write the shards, and return their results by name, in order.

        Each is recorded as soon as it is there. After the death of a worker they are kept, as after a kill.
        """
        finished.begin()  # a worker that outlives this run must not leave a shard that another plan would take
        mode = 0o666 & ~current_umask()

        def done(task: ShardTask, made: tuple[ShardResult, str]) -> None:
            path = os.path.join(task.place, task.name)
            if not os.path.isfile(path) or os.path.getsize(path) != made[0].nbytes:
                raise OutputError(f"the shard {task.name} that a worker wrote is not there", hint=_SAME_PATH)
            with contextlib.suppress(PermissionError):  # of a worker with another user
                os.chmod(path, mode)
            finished.record(task.name, *made)
            progress(task.nbytes)

        tasks = self._tasks(shards, staging.files, staging.begin_work())
        try:
            results = list(self._run(make_shard, tasks, done, staging.end_work))
        except WorkerError:
            staging.keeps_finished = True
            raise
        staging.end_work()
        return {shard.name: result for shard, (result, _) in zip(shards, results, strict=True)}

    def verify(self, shards: Sequence[Shard], place: str) -> list[Verification]:
        """Let the workers verify the shards. Raises what ``verify_safetensors`` raises."""
        return list(self._run(verify_shard, self._tasks(shards, place, "")))

    def _run(
        self,
        function: Callable[[ShardTask], _Result],
        tasks: Iterable[ShardTask],
        done: Callable[[ShardTask, _Result], None] = lambda _task, _result: None,
        stop: Callable[[], None] | None = None,
    ) -> Iterator[_Result]:
        return run_tasks(self._executor, function, tasks, name=lambda task: f"shard {task.name}", done=done, stop=stop)
