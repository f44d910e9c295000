"""``stats``: statistics of every tensor of a state_dict, of its modules, and of all tensors together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptkit.core.arguments import require_number, require_progress, takes_rules
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.progress import Progress
from ckptkit.core.result import Result
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.ties import first_of_ties
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.quantized import Quantized, quantized_weights
from ckptkit.quantized.view import DequantizedWeight, DequantizeLike, as_numbers, parse_dequantize
from ckptkit.rules.apply import renamed_keys
from ckptkit.rules.model import Rules, RulesLike
from ckptkit.statistics.columns import StatsTable
from ckptkit.statistics.measured import measure_values
from ckptkit.statistics.value_stats import ValueStats
from ckptkit.tasks.executor_type import Executor
from ckptkit.tasks.sharing import Sharing, require_shareable, sharing_of
from ckptkit.values.endless import refuse_endless
from ckptkit.values.kernels import why_unsupported
from ckptkit.values.workers import Workers

__all__ = ["StateDictStats", "TensorStats", "module_name", "stats", "stats_of_keys"]


@dataclass(frozen=True, slots=True)
class TensorStats:
    """The statistics of one tensor.

    Attributes:
        info: The key, dtype and shape of the tensor.
        numbers: The statistics of its values, or None if they cannot be computed.
        why: The reason why ``numbers`` is None.
        same_as: The key of an earlier tensor in the same memory, or an empty string.
    """

    info: TensorInfo
    numbers: ValueStats | None
    why: str = ""
    same_as: str = ""


class MeasuredTensors(Mapping[str, TensorStats]):
    """The statistics of tensors by name, each made when it is asked for.

    Attributes:
        infos: The description of each tensor.
        numbers: The statistics of each measured tensor; those of tied tensors are under the first name.
        why: The reason why a tensor has no statistics.
        same_as: The first name of a tensor that has several.
    """

    __slots__ = ("infos", "numbers", "same_as", "why")

    def __init__(
        self, infos: Mapping[str, TensorInfo], numbers: StatsTable, why: Mapping[str, str], same_as: Mapping[str, str]
    ) -> None:
        """Set the attributes."""
        self.infos = infos
        self.numbers = numbers
        self.why = why
        self.same_as = same_as

    def __getitem__(self, name: str) -> TensorStats:
        """Return the statistics of one tensor."""
        info, same = self.infos[name], self.same_as.get(name, "")
        return TensorStats(info, self.numbers.get(same or name), self.why.get(same or name, ""), same)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in order."""
        return iter(self.infos)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.infos)

    def measured(self) -> StatsTable:
        """Return the numbers of every measured tensor, in order."""
        if not self.same_as:
            return self.numbers
        names = [name for name in self if self.same_as.get(name, name) in self.numbers]
        rows = self.numbers.rows_of(self.same_as.get(name, name) for name in names)
        return StatsTable(names, self.numbers.columns.take(rows))


@dataclass(frozen=True, repr=False)
class StateDictStats(Result):
    """The statistics of each tensor, by key and in the order of the checkpoint. Tied tensors have equal statistics.

    ``quantized`` are the quantised weights by the keys of the checkpoint; their parts are not measured.
    ``checkpoint`` has path, format and size of the tensors that are listed. ``dequantized`` are the weights that are
    measured as numbers, with their schemes and dtypes.

    Example:
        >>> result = ckptkit.stats({"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)})
        >>> result.tensors["a"].numbers.l2, result.total.zero_share
        (5.0, 0.5)
    """

    tensors: MeasuredTensors
    quantized: Quantized = field(default_factory=Quantized)
    checkpoint: CheckpointSummary = NO_CHECKPOINT
    dequantized: tuple[DequantizedWeight, ...] = ()

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return f"{len(self.tensors.measured())} of {len(self.tensors)} tensors measured"

    @property
    def total(self) -> ValueStats:
        """The statistics of all values together; tied tensors count once."""
        return self.tensors.numbers.merged()

    def modules(self, depth: int) -> dict[str, ValueStats]:
        """Return the statistics of each module, by the first ``depth`` parts of its name; tied tensors count once.

        The module of ``encoder.layers.0.weight`` is ``encoder`` at depth 1, and ``encoder.layers.0`` from depth 3 on.

        Example:
            >>> ckptkit.stats("fixtures/lenet_10class.pth").modules(1)["fc3"].count
            850
        """
        require_number(depth, "depth", "an int of at least 0", at_least=0, whole=True)
        once = self.tensors.numbers
        keys_by_module: dict[str, dict[str, None]] = {}
        for key in self.tensors.measured():
            first = self.tensors.same_as.get(key, key)
            keys_by_module.setdefault(module_name(key, depth), {})[first] = None
        return {module: once.take(once.rows_of(keys)).merged() for module, keys in keys_by_module.items()}


def module_name(key: str, depth: int) -> str:
    """Return the first ``depth`` parts of the name of the module that has this key; empty for the model itself."""
    return ".".join(key.split(".")[:-1][:depth])


@takes_rules
def stats(
    checkpoint: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    dequantize: DequantizeLike = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> StateDictStats:
    """Return statistics of the values of each tensor: counts, extremes, moments, norms and a histogram of magnitudes.

    Each tensor is read once, in chunks of bounded size; sums are computed in float64. Quantized and sparse tensors,
    the parts of quantised weights, and dtypes without arithmetic are listed with the reason why they are not
    measured. With ``dequantize``, quantised weights are measured as numbers.

    Args:
        checkpoint: A path, a Checkpoint, a Module or a mapping of tensors. What is opened here is closed at the end.
        rules: Rules that keep, drop and rename keys, or the path of a rule file.
        dequantize: Whether quantised weights are read as numbers, or the dtype of the numbers. Without a dtype it is
            F32, so that nothing is rounded.
        progress: Called with the number of bytes after each chunk.
        executor: Shares the work among its workers, which open ``checkpoint`` by its path, such as a ``RayExecutor``.
            The result is the same to the last bit. Without one, the threads of this process do the work.

    Raises:
        ArgumentError: ``checkpoint`` is not a path, but there is an executor.
        WorkerError: A worker ended before its task was done.
        RuleError: A rule cannot be applied, or computes a new tensor.
        ModelError: ``checkpoint`` is not a state_dict, or a tensor is on the meta device.
        PlanError: ``checkpoint`` has descriptions of tensors, without bytes, or views that repeat a few bytes
            for hours.
        FormatError: The stored bytes do not agree with the header.
        ChangedError: A file changes while it is read.

    Example:
        >>> stats("fixtures/lenet_10class.pth", {"keep": "fc3.*"}).total.count
        850
    """
    require_progress(progress)
    require_shareable(executor, {"checkpoint": checkpoint})
    with opened(checkpoint, "checkpoint") as stored:
        view = as_numbers(stored, dequantize)
        found = view.checkpoint
        sharing = sharing_of(executor, [(checkpoint, stored)])
        measure = _measuring(sharing, dequantize, progress or (lambda _: None))
        result = _stats(found, rules_for(rules, found), measure)
        kept = {info.key for info in result.tensors.infos.values()}
        if view.weights:  # the totals are those of the file, as everywhere
            parts = {key: decoded.weight.parts for key, decoded in view.weights.items()}
            stored_infos = (stored[part] for key in kept for part in parts.get(key, (key,)))
            result = replace(result, checkpoint=CheckpointSummary.of(stored, stored_infos))
        return replace(result, dequantized=tuple(one for one in view.listed if one.key in kept))


def _measuring(
    sharing: Sharing | None, dequantize: DequantizeLike, progress: Progress
) -> Callable[[Checkpoint, Sequence[str]], StatsTable]:
    """Return the function that measures tensors: here, or in the workers of an executor."""

    def measure(found: Checkpoint, keys: Sequence[str]) -> StatsTable:
        if sharing is None:
            with Workers() as workers:
                return measure_values(found, keys, workers, progress)
        from ckptkit.statistics.shared import measure_shared

        is_wanted, dtype = parse_dequantize(dequantize)
        return measure_shared(found, keys, (dtype or "F32") if is_wanted else None, sharing, progress)

    return measure


def _stats(
    found: Checkpoint, rules: Rules, measure: Callable[[Checkpoint, Sequence[str]], StatsTable]
) -> StateDictStats:
    renamed = renamed_keys(rules, found)
    first_of_tie = first_of_ties((found[key] for key in renamed), found.span)
    quantized = quantized_weights(found)
    reasons = {key: why_unsupported(found[key]) for key in renamed}
    if quantized:
        reasons = {key: why or _why_not_numbers(key, quantized) for key, why in reasons.items()}
    measured = [key for key, why in reasons.items() if not why and key not in first_of_tie]
    refuse_endless(found, [found[key] for key in measured])
    with pause_gc():
        numbers = measure(found, measured)
    tensors = MeasuredTensors(
        {name: found[key] for key, name in renamed.items()},
        StatsTable([renamed[key] for key in numbers], numbers.columns),
        {renamed[key]: why for key, why in reasons.items() if why},
        {renamed[key]: renamed[first] for key, first in first_of_tie.items()},
    )
    found.check_unchanged()
    summary = CheckpointSummary.of(found, map(found.__getitem__, renamed))
    return StateDictStats(tensors, quantized, summary)


def stats_of_keys(
    stored: Checkpoint, keys: Iterable[str], *, dequantize: DequantizeLike = False, progress: Progress | None = None
) -> StatsTable:
    """Return the statistics of some tensors of an open checkpoint by key, without those that cannot be measured.

    Raises the errors of ``stats``.
    """
    found = as_numbers(stored, dequantize).checkpoint
    measured = [key for key in dict.fromkeys(keys) if key in found and not why_unsupported(found[key])]
    refuse_endless(found, [found[key] for key in measured])
    with Workers() as workers, pause_gc():
        numbers = measure_values(found, measured, workers, progress or (lambda _: None))
    found.check_unchanged()
    return numbers


def _why_not_numbers(key: str, quantized: Quantized) -> str:
    weight = quantized.by_key.get(key)
    if weight is None:
        return ""
    return f"codes of a weight, quantised as {weight.scheme}" if key == weight.coded else f"part of {weight.scheme}"
