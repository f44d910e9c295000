"""What the values of a tensor that nothing was loaded into look like: torch's own init, zeros, memory never written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["Look", "looks_of"]

_FEW = 16  # fewer numbers tell no distribution
_SURE = 5  # standard errors; by chance alone, two in a million are further off
# Of what networks hold nearly all lies between 2**-60 and 2**40: elsewhere are the bits of something else.
_TINY, _HUGE = -60, 40
_STRAY = 0.005
_FAULTS = {"zero", "constant", "garbage"}


@dataclass(frozen=True, slots=True)
class Look:
    """What values look like: ``kind`` is a word for code, ``said`` one for people with the evidence in it."""

    kind: str  # "fresh", "zero", "constant", "garbage", "other" or "few"
    said: str

    @property
    def faulty(self) -> bool:
        """Whether a weight that shall train would hardly begin like this."""
        return self.kind in _FAULTS


class _Spread(NamedTuple):
    """A distribution that torch fills a new parameter with; ``uniform`` ones end at ``bound``."""

    std: float
    bound: float | None = None

    @property
    def said(self) -> str:
        return f"normal, std {self.std:.4g}" if self.bound is None else f"uniform within ±{self.bound:.4g}"


def looks_of(info: TensorInfo, numbers: ValueStats, module: Module | None) -> Look:
    """Return what a tensor looks like, beside the module that has it, where that is known.

    Evidence is what the numbers say, no more: memory that was never written may hold zeros, or the values of a tensor
    that lay there before, and then looks like those.
    """
    leaf = info.key.rpartition(".")[2]
    if _like_garbage(info, numbers):
        return Look(
            "garbage",
            f"like memory that was never written: from 2^{min(numbers.histogram)} to 2^{max(numbers.histogram)}",
        )
    if numbers.min == numbers.max and numbers.finite == numbers.count:
        return _constant(info, numbers, module, leaf)
    spread = _default(module, leaf)
    if numbers.count < _FEW:
        return Look("few", f"{numbers.count} numbers, too few to tell")
    if spread is not None and _fits(numbers, spread, info):
        return Look("fresh", f"as torch initialises {type(module).__name__}: {spread.said}")
    return Look("other", f"std {numbers.std:.4g}: not torch's own init of it" if spread else f"std {numbers.std:.4g}")


def _like_garbage(info: TensorInfo, numbers: ValueStats) -> bool:
    if not info.dtype.startswith(("F32", "F64", "BF16")) or not numbers.histogram:
        return False
    stray = sum(count for exponent, count in numbers.histogram.items() if not _TINY <= exponent < _HUGE)
    return stray > _STRAY * numbers.count


def _constant(info: TensorInfo, numbers: ValueStats, module: Module | None, leaf: str) -> Look:
    value = numbers.min or 0
    said = f"all {value:g}"
    expected = _CONSTANTS.get(leaf) if module is not None and _is_norm(module) else None
    if expected is not None and value == expected:
        return Look("fresh", f"as torch initialises {type(module).__name__}: {said}")
    if len(info.shape) < 2 or numbers.count == 1:
        return Look("other", said)
    return Look("zero" if value == 0 else "constant", said)


_CONSTANTS: Mapping[str, int] = {
    "weight": 1,
    "bias": 0,
    "running_mean": 0,
    "running_var": 1,
    "num_batches_tracked": 0,
}


def _is_norm(module: Module) -> bool:
    name = type(module).__name__
    return type(module).__module__.startswith("torch.nn.") and name.endswith(
        ("Norm", "Norm1d", "Norm2d", "Norm3d", "SyncBatchNorm")
    )


def _default(module: Module | None, leaf: str) -> _Spread | None:
    """Return what torch fills the parameter ``leaf`` of a module of its own with, where that is one distribution."""
    from torch import nn

    if module is None:
        return None
    weight: Tensor | None = getattr(module, "weight", None)
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and leaf in ("weight", "bias"):  # noqa: SLF001 - their common base
        if weight is None or weight.dim() < 2 or not weight.numel():
            return None
        return _uniform(1 / math.sqrt(math.prod(weight.shape[1:])))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _uniform(1 / math.sqrt(module.hidden_size)) if module.hidden_size else None
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and leaf == "weight" and module.padding_idx is None:
        return _Spread(1.0)
    return None


def _uniform(bound: float) -> _Spread:
    return _Spread(bound / math.sqrt(3), bound)


def _fits(numbers: ValueStats, spread: _Spread, info: TensorInfo) -> bool:
    mean, std, largest = numbers.mean, numbers.std, numbers.abs_max
    if mean is None or std is None or largest is None or numbers.finite < numbers.count:
        return False
    rounding = 0.01 if info.dtype in ("BF16", "F16") else 1e-6
    if spread.bound is not None and largest > spread.bound * (1 + rounding):
        return False
    # The standard error of a standard deviation follows from the fourth moment: 1.8 of a uniform, 3 of a normal one.
    kurtosis = 3.0 if spread.bound is None else 1.8
    error = math.sqrt((kurtosis - 1) / (4 * numbers.count))
    return abs(std / spread.std - 1) <= _SURE * error + rounding and abs(mean) <= spread.std * (
        _SURE / math.sqrt(numbers.count) + rounding
    )
