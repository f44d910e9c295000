"""The numbers of a checkpoint: every tensor read once, in pieces; modules and the whole put together from these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.progress import Progress
from ckptkit.core.text import html_table, plural, printable, quoted
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import as_rules
from ckptkit.statistics.accumulator import Accumulator, why_unsupported
from ckptkit.statistics.threads import Workspace
from ckptkit.statistics.value_stats import ValueStats, merge_stats

__all__ = ["StateDictStats", "TensorStats", "module_name", "stats"]


@dataclass(frozen=True, slots=True)
class TensorStats:
    """A tensor and its ``numbers``; they are None where they could not be judged, and ``why`` says why not.

    ``same_as`` is the key of the tensor that this one is, where two keys name one tensor.
    """

    info: TensorInfo
    numbers: ValueStats | None
    why: str = ""
    same_as: str = ""


@dataclass(frozen=True, repr=False)
class StateDictStats:
    """What the numbers of each tensor are, by key in the order of the checkpoint; tied ones share theirs."""

    tensors: Mapping[str, TensorStats]

    def __repr__(self) -> str:
        """Show how much was judged, and never tensor by tensor."""
        judged = sum(tensor.numbers is not None for tensor in self.tensors.values())
        return f"<StateDictStats: {judged} of {len(self.tensors)} tensors judged>"

    @property
    def total(self) -> ValueStats:
        """All numbers together; of tied tensors once."""
        return self._together(self.tensors)

    def modules(self, depth: int) -> dict[str, ValueStats]:
        """Return the numbers below each module, by the first ``depth`` segments of its name; of tied tensors once.

        The module of ``encoder.layers.0.weight`` is ``encoder`` at depth 1 and ``encoder.layers.0`` at 3 and beyond.
        """
        members: dict[str, list[str]] = {}
        for key, tensor in self.tensors.items():
            if tensor.numbers is not None:
                members.setdefault(module_name(key, depth), []).append(key)
        return {module: self._together(keys) for module, keys in members.items()}

    def _together(self, keys: Iterable[str]) -> ValueStats:
        once = {self.tensors[key].same_as or key: self.tensors[key].numbers for key in keys}
        return merge_stats(numbers for numbers in once.values() if numbers is not None)

    def _repr_html_(self) -> str:
        headers = ("key", "", "mean", "std", "min", "max", "l2", "zeros", "NaN", "Inf")
        rows = [(printable(key), str(tensor.info), *_cells(tensor)) for key, tensor in self.tensors.items()]
        judged = sum(tensor.numbers is not None for tensor in self.tensors.values())
        return f"<p>{plural(judged, 'tensor')} of {len(rows):,} judged</p>{html_table(headers, rows)}"


def _cells(tensor: TensorStats) -> Iterator[str]:
    numbers = tensor.numbers
    if numbers is None:
        yield from (f"not judged: {tensor.why}", *[""] * 7)
        return
    for value in (numbers.mean, numbers.std, numbers.min, numbers.max, numbers.l2):
        yield "" if value is None else f"{value:.4g}"
    for count in (numbers.zeros, numbers.nan, numbers.posinf + numbers.neginf):
        yield f"{count:,}"


def module_name(key: str, depth: int) -> str:
    """Return the first ``depth`` segments of the name of the module that a key lies in; empty for the model itself."""
    return ".".join(key.split(".")[:-1][:depth])


def stats(
    checkpoint: StateDictLike,
    rules: Rules | Iterable[str] | Mapping[str, Any] | None = None,
    *,
    progress: Progress | None = None,
) -> StateDictStats:
    """Return what the numbers of each tensor are: counts, extremes, moments, norms and a histogram of magnitudes.

    Each tensor is read once, in pieces, whatever its size; sums are taken in float64. ``checkpoint`` is a Module, a
    Checkpoint or a mapping of tensors. ``rules`` keep, drop and rename. Quantised and sparse tensors, and dtypes that
    torch cannot compute with, are listed with the reason why they are not judged. ``progress`` is told the number of
    bytes after each piece. Raises ``RuleError`` where a rule goes wrong or makes tensors of tensors, ``FormatError``
    where the bytes are not what the header says, and ``ChangedError`` where a file changes meanwhile.
    """
    opened = as_checkpoint(checkpoint, "checkpoint")
    key_map = apply_rules(as_rules(rules), opened)
    if key_map.derived:
        made = quoted(next(iter(key_map.derived)))
        raise RuleError(f"{made} would be made by an operation", hint="write it first, with ckpt remap")
    first = {key: group[0] for group in tied_keys(opened[key] for key in key_map.renamed) for key in group[1:]}
    tensors: dict[str, TensorStats] = {}
    with Workspace() as workspace:
        for key, name in key_map.renamed.items():
            info = opened[key]
            if key in first:
                same = key_map.renamed[first[key]]
                tensors[name] = TensorStats(info, tensors[same].numbers, tensors[same].why, same)
            elif why := why_unsupported(info):
                tensors[name] = TensorStats(info, None, why)
            else:
                tensors[name] = TensorStats(info, _numbers(opened, info, workspace, progress))
    opened.check_unchanged()
    return StateDictStats(tensors)


def _numbers(checkpoint: Checkpoint, info: TensorInfo, workspace: Workspace, progress: Progress | None) -> ValueStats:
    accumulator = Accumulator(info, workspace)
    for chunk in checkpoint.payload(info.key).chunks():
        accumulator.add(chunk)
        if progress is not None:
            progress(len(chunk))
    return accumulator.result()
