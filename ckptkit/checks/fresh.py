"""Recognise tensors that no checkpoint was loaded into, from the statistics of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ckptkit.checks.meant import is_meant
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import short_number
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["Judgement", "JudgementKind", "judge_values"]

JudgementKind = Literal["fresh", "zero", "constant", "garbage", "other", "few"]

_FEW = 16  # fewer numbers do not show a distribution
_SURE = 5  # standard errors; by chance alone, at most two in a million tensors exceed them
# Nearly all values of trained networks are between 2**-60 and 2**40; other exponents are bits of something else.
_TINY, _HUGE = -60, 40
_STRAY = 0.005
# The values that torch fills the tensors of a normalisation layer with.
_NORM_VALUES: Mapping[str, int] = {
    "weight": 1,
    "bias": 0,
    "running_mean": 0,
    "running_var": 1,
    "num_batches_tracked": 0,
}
_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # of an attention whose inputs have several sizes


@dataclass(frozen=True, slots=True)
class Judgement:
    """A guess where the values of a tensor come from; ``text`` has the evidence, for messages."""

    kind: JudgementKind
    text: str


class _Spread(NamedTuple):
    """A distribution that torch fills a new parameter with; a uniform distribution ends at ``bound``."""

    std: float
    bound: float | None = None

    @property
    def text(self) -> str:
        if self.bound is None:
            return f"normal, std {short_number(self.std, 4)}"
        return f"uniform within ±{short_number(self.bound, 4)}"


def judge_values(info: TensorInfo, numbers: ValueStats, module: Module | None) -> Judgement:
    """Return where the values of a tensor probably come from; ``module`` is the module that has the tensor, if known.

    The judgement can be wrong: memory that was never written may hold zeros, or the values of an earlier tensor.
    """
    leaf = info.key.rpartition(".")[2]
    if _like_garbage(info, numbers):
        low, high = min(numbers.histogram), max(numbers.histogram)
        return Judgement("garbage", f"like memory that was never written: from 2^{low} to 2^{high}")
    if numbers.min == numbers.max and numbers.finite == numbers.count:
        return _judge_constant(info, numbers, module, leaf)
    spread = _default_spread(module, leaf)
    if numbers.count < _FEW:
        return Judgement("few", f"{numbers.count} numbers, too few to tell")
    if spread is not None and _has_spread(numbers, spread, info):
        return Judgement("fresh", f"as torch initialises {type(module).__name__}: {spread.text}")
    seen = f"std {short_number(numbers.std, 4)}"
    return Judgement("other", f"{seen}, unlike torch's own init" if spread else seen)


def _like_garbage(info: TensorInfo, numbers: ValueStats) -> bool:
    if not info.dtype.startswith(("F32", "F64", "BF16")) or not numbers.histogram:
        return False
    stray = sum(count for exponent, count in numbers.histogram.items() if not _TINY <= exponent < _HUGE)
    return stray > _STRAY * numbers.count


def _judge_constant(info: TensorInfo, numbers: ValueStats, module: Module | None, leaf: str) -> Judgement:
    value = numbers.min or 0
    text = f"all {short_number(value)}"
    expected = _NORM_VALUES.get(leaf) if module is not None and _is_norm(module) else None
    if expected is not None and value == expected:
        return Judgement("fresh", f"as torch initialises {type(module).__name__}: {text}")
    is_vector = sum(size > 1 for size in info.shape) < 2  # as the scales of IA3, which train from one value
    if is_vector or is_meant(info.key, value):
        return Judgement("other", text)
    return Judgement("zero" if value == 0 else "constant", text)


def _is_norm(module: Module) -> bool:
    name = type(module).__name__
    return type(module).__module__.startswith("torch.nn.") and name.endswith(
        ("Norm", "Norm1d", "Norm2d", "Norm3d", "SyncBatchNorm")
    )


def _default_spread(module: Module | None, leaf: str) -> _Spread | None:
    """Return the distribution from which torch initialises the parameter ``leaf`` of ``module``, or None."""
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
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and leaf == "weight":
        rows = module.num_embeddings
        return _Spread(1.0 if module.padding_idx is None else math.sqrt((rows - 1) / rows))  # its row is zeros
    if isinstance(module, nn.MultiheadAttention) and leaf in ("in_proj_weight", *_APART):
        in_proj = getattr(module, leaf)
        return None if in_proj is None else _uniform(math.sqrt(6 / sum(in_proj.shape)))  # xavier_uniform_
    return None


def _uniform(bound: float) -> _Spread:
    return _Spread(bound / math.sqrt(3), bound)


def _has_spread(numbers: ValueStats, spread: _Spread, info: TensorInfo) -> bool:
    mean, std, largest = numbers.mean, numbers.std, numbers.abs_max
    if mean is None or std is None or largest is None or numbers.finite < numbers.count:
        return False
    rounding = 0.01 if info.dtype in ("BF16", "F16") else 1e-6
    if spread.bound is not None and largest > spread.bound * (1 + rounding):
        return False
    # The standard error of a standard deviation follows from the kurtosis: 1.8 for uniform, 3 for normal values.
    kurtosis = 3.0 if spread.bound is None else 1.8
    error = math.sqrt((kurtosis - 1) / (4 * numbers.count))
    return abs(std / spread.std - 1) <= _SURE * error + rounding and abs(mean) <= spread.std * (
        _SURE / math.sqrt(numbers.count) + rounding
    )
