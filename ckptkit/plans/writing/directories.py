"""Outputs of several files, which replace their directory as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ckptkit.core.files.places import is_url, join
from ckptkit.core.progress import Progress
from ckptkit.errors import CkptkitError, OutputError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.detect import TORCH_SUFFIXES
from ckptkit.formats.distributed.file_names import DCP_METADATA, DCP_SUFFIX
from ckptkit.formats.sharded import Shard, split_into_shards, weight_index
from ckptkit.formats.writing.output_file import OutputFile, OutputFolder
from ckptkit.formats.writing.outputs import output_folder, writes_in_order
from ckptkit.formats.writing.staging import Staging
from ckptkit.formats.writing.state import Target
from ckptkit.formats.writing.targets import prepare_directory
from ckptkit.plans.carried import Carried, write_carried
from ckptkit.plans.inputs import PlanInputs
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan
from ckptkit.plans.writing.files import has_tensors, write_safetensors_file
from ckptkit.plans.writing.finished_shards import FinishedShards, finished_shards, made_of, staging_for
from ckptkit.plans.writing.refusals import is_own_name
from ckptkit.plans.writing.shard_results import ShardResult, result_of
from ckptkit.plans.writing.written import Written

if TYPE_CHECKING:
    from ckptkit.plans.verify import Verification
    from ckptkit.plans.writing.shard_tasks import Elsewhere

__all__ = ["write_directory"]

_WEIGHTS = (".safetensors", DCP_SUFFIX, ".index.json", *TORCH_SUFFIXES)


def write_directory(
    plan: Plan,
    output: Output,
    inputs: PlanInputs,
    progress: Progress,
    *,
    carried: Carried,
    verify: bool,
    resume: bool,
    elsewhere: Elsewhere | None,
) -> tuple[Written, list[Verification]]:
    """Write shards or a distributed checkpoint; return what was written and what ``verify`` found.

    With ``resume``, the finished shards of a killed run are kept, and so are those of this run after an error. The
    workers of ``elsewhere``, if it is given, write and verify the shards.
    """
    files: _Shards | _Dcp
    if output.format == "dcp":
        files = _Dcp(plan, output, inputs)
    else:
        files = _Shards(plan, output, inputs) if elsewhere is None else _WorkersShards(plan, output, inputs, elsewhere)
    target = prepare_directory(output.path, force=output.force, before=output.before)
    existing = list(target.before.entries)
    ours = frozenset(name for name in existing if is_own_name(output, name))
    left: list[str] = []
    verified: list[Verification] = []
    staging = files.staging(target, resume=resume)
    replaced = ours.union(carried.names)
    with (
        output_folder(target, replaced=replaced, last=files.last, left=left, staging=staging) as folder,
        finished_shards(staging, files.made_of) as finished,
    ):
        total = files.write(folder, progress, finished)
        write_carried(carried, folder.file, output)
        inputs.check_unchanged()
        directory = folder.complete()
        _check_directory(directory, plan, files.names)
        if verify:
            verified = _verified(files, directory, staging)
            inputs.check_unchanged()
    beside = sorted(name for name in existing if name not in ours and name.endswith(_WEIGHTS))
    written = Written(
        output.path,
        files.format,
        len(plan.steps),
        total,
        files.names,
        tuple(beside),
        left=tuple(left),
        shared=files.shared,
        kept_shards=len(finished.kept),
    )
    return written, verified


def _verified(files: _Shards | _Dcp, directory: str, staging: Staging | None) -> list[Verification]:
    try:
        return files.verify(directory)
    except OutputError:  # a finished shard does not have the planned bytes, and a later run must not keep it
        if staging is not None:
            staging.keeps_finished = False
        raise


class _Shards:
    """The shards of an output, and their index if there are several."""

    def __init__(self, plan: Plan, output: Output, inputs: PlanInputs) -> None:
        assert output.max_shard_size is not None  # noqa: S101 - choose_output gives each directory of shards a size
        self.plan, self.output, self.inputs = plan, output, inputs
        self.shards = split_into_shards([step.out for step in plan.steps], output.max_shard_size)
        self.index, self.index_data = weight_index(self.shards)
        self.has_index = len(self.shards) > 1
        self.last = self.index if self.has_index else ""
        self.names = (*(shard.name for shard in self.shards), *((self.index,) if self.has_index else ()))
        self.shared = 0
        self._made_of: Mapping[str, str] | None = None
        self.format = f"sharded safetensors ({len(self.shards)} shards)" if self.has_index else "safetensors"

    def staging(self, target: Target, *, resume: bool) -> Staging | None:
        """Return where the shards are made, or None where a store makes them."""
        if is_url(target.path):
            return None
        return staging_for(target, self.made_of, resume=resume)

    def made_of(self) -> Mapping[str, str]:
        """Return what decides the bytes of all shards; nothing is asked a second time."""
        if self._made_of is None:
            self._made_of = made_of(self.plan, self.output, self.inputs.roles)
        return self._made_of

    def write(self, folder: OutputFolder, progress: Progress, finished: FinishedShards) -> int:
        """Write the files that are not there yet, and return the size of all shards."""
        finished.keep(self.shards, progress)
        total = 0
        for result in self._results(folder, progress, finished):
            total += result.nbytes
            self.shared += result.shared
        self.inputs.refuse_overflow()
        if self.has_index:
            _write_small(folder, self.index, self.index_data)
        return total

    def _results(self, folder: OutputFolder, progress: Progress, finished: FinishedShards) -> Iterator[ShardResult]:
        for shard in self.shards:
            result = finished.kept.get(shard.name)
            if result is None:
                result = self._write_shard(shard, folder, progress)
                finished.add(shard.name, result)
            else:
                result.tell(self.inputs.producer)
            yield result

    def _write_shard(self, shard: Shard, folder: OutputFolder, progress: Progress) -> ShardResult:
        before = set(self.inputs.producer.extracted)

        def create(size: int, block: int, *, by_kernel: bool) -> OutputFile:
            return folder.file(shard.name, size, block, by_kernel=by_kernel)

        size, shared = write_safetensors_file(
            create,
            shard.infos,
            self.plan.metadata,
            self.inputs,
            progress,
            place=join(folder.place(), shard.name),
            reflink=self.output.reflink,
        )
        return result_of(self.inputs, shard, size, shared, before)

    def verify(self, directory: str) -> list[Verification]:
        """Let safetensors read every shard, and compare the index with the shards."""
        from ckptkit.plans.verify import verify_index

        verified = self._verified_shards(directory)
        if self.has_index:
            verify_index(join(directory, self.index), join(self.output.path, self.index), self.shards)
        return verified

    def _verified_shards(self, directory: str) -> list[Verification]:
        from ckptkit.plans.verify import verify_safetensors

        verified = []
        for shard in self.shards:
            path, shown = (join(parent, shard.name) for parent in (directory, self.output.path))
            steps = [self.inputs.steps[info.key] for info in shard.infos]
            verified.append(verify_safetensors(path, shown, steps, self.plan.metadata, self.inputs.producer.again()))
        return verified


class _WorkersShards(_Shards):
    """Shards that the workers of an executor write; this process writes their index."""

    def __init__(self, plan: Plan, output: Output, inputs: PlanInputs, elsewhere: Elsewhere) -> None:
        from ckptkit.plans.writing.shard_tasks import ShardTasks

        super().__init__(plan, output, inputs)
        self._tasks = ShardTasks(elsewhere, plan, output, inputs)
        self._staging: Staging | None = None

    def staging(self, target: Target, *, resume: bool) -> Staging:
        self._staging = staging_for(target, self.made_of, resume=resume)
        return self._staging

    def _results(
        self,
        folder: OutputFolder,  # noqa: ARG002 - which is in the staging place
        progress: Progress,
        finished: FinishedShards,
    ) -> Iterator[ShardResult]:
        assert self._staging is not None  # noqa: S101 - it was asked for before
        wanted = [shard for shard in self.shards if shard.name not in finished.kept]
        results = {**finished.kept, **self._tasks.make(wanted, self._staging, finished, progress)}
        for shard in self.shards:
            results[shard.name].tell(self.inputs.producer)
            yield results[shard.name]

    def _verified_shards(self, directory: str) -> list[Verification]:
        return self._tasks.verify(self.shards, directory)


class _Dcp:
    """A distributed checkpoint: one file of tensors, and the metadata that says where each is."""

    format = "dcp"
    shared = 0  # the bytes of its tensors begin at other places of a block than in the inputs

    def __init__(self, plan: Plan, output: Output, inputs: PlanInputs) -> None:
        from ckptkit.formats.distributed.dcp_write import DCP_FILE, layout_dcp

        self.plan, self.output, self.inputs = plan, output, inputs
        in_order = writes_in_order(output.path)
        self.layout = layout_dcp([step.out for step in plan.steps], inputs.payload, in_order=in_order)
        self.names = (DCP_FILE, DCP_METADATA)
        self.last = DCP_METADATA

    def staging(self, target: Target, *, resume: bool) -> None:
        """Return None: the place is new, since a killed run leaves nothing that could be kept."""

    def made_of(self) -> Mapping[str, str]:
        """Return nothing: no file is recorded."""
        return {}

    def write(self, folder: OutputFolder, progress: Progress, finished: FinishedShards) -> int:  # noqa: ARG002
        """Write the files and return the size of the file of tensors."""
        from ckptkit.formats.distributed.dcp_write import write_dcp

        data, metadata = self.names
        with folder.file(data, self.layout.nbytes, by_kernel=self.output.reflink != "never") as file:
            for count in write_dcp(self.layout, file):
                progress(count)
        self.inputs.refuse_overflow()
        _write_small(folder, metadata, self.layout.metadata)
        return self.layout.nbytes

    def verify(self, directory: str) -> list[Verification]:
        """Let torch load the checkpoint."""
        from ckptkit.plans.verify import verify_dcp

        return [verify_dcp(directory, self.output.path, self.plan.steps, self.inputs.producer.again())]


def _write_small(folder: OutputFolder, name: str, data: bytes) -> None:
    with folder.file(name, len(data)) as file:
        file.write(data, 0)


def _check_directory(directory: str, plan: Plan, names: Iterable[str]) -> None:
    # The directory keeps its other files. A reader could prefer an index or old shards among them to the output.
    why = "holds other weights, which would be read instead of the output"
    try:
        with open_checkpoint(directory) as written:
            as_planned = has_tensors(written, [step.out for step in plan.steps], names)
            for key in written if as_planned and written.format == "dcp" else ():
                # The reader compares the header of each tensor with the metadata only when it reads the tensor.
                next(iter(written.payload(key).chunks()), None)
    except CkptkitError as error:
        as_planned, why = False, f"the weights cannot be read with the other files of the directory: {error.reason}"
    if not as_planned:
        raise OutputError(why, hint="give a new directory, or remove its other weights")
