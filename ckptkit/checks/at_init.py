"""Find the tensors of a checkpoint that have the values of a new model: never trained, or left so by a merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptkit.checks.fresh import judge_values
from ckptkit.checks.structure import FLOATS
from ckptkit.comparison import KeyPair
from ckptkit.core.torch_types import Module
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["Untrained", "find_untrained", "module_of"]

_MIN_VALUES = 1024  # smaller samples are too often alike by chance
_SIGMAS = 4.0
_MIN_IN_BIN = 10


@dataclass(frozen=True, slots=True)
class Untrained:
    """Keys of the model whose tensors in the checkpoint look as in a new model, in the order of the model.

    Attributes:
        keys: The tensors of modules that look untrained.
        constant: Other tensors that have one value throughout, the one that the new model has too.
        is_whole: Whether no tensor has other values, as where a new model was saved.
    """

    keys: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    is_whole: bool = False


def find_untrained(
    pairs: Iterable[KeyPair],
    found: Mapping[str, ValueStats],
    new: Mapping[str, ValueStats],
    model: Module | None,
) -> Untrained:
    """Return which tensors of a checkpoint have the values of a new model. This is evidence, not proof.

    A tensor is compared with a new model, and with what torch fills such a module with. A bias, or another tensor that
    alone proves nothing, follows the rest of its module.

    Args:
        pairs: The tensors of the checkpoint that fill a tensor of the model.
        found: The statistics of the tensors in the checkpoint, by the keys of the model.
        new: The statistics of a new model, or of the part of it that is known. A tensor that is equal there may be one
            that the model is built with, trained already; then only torch's own initialisation counts.
        model: The model, whose values do not matter.
    """
    fresh, trained, unclear, constant, vectors = set[str](), set[str](), set[str](), [], set[str]()
    order: list[str] = []
    for pair in pairs:
        numbers, key = found.get(pair.key), pair.key
        if (
            numbers is None
            or not numbers.count
            or pair.expected.shape != pair.found.shape
            or pair.found.kind != "dense"
        ):
            continue
        order.append(key)
        if sum(size > 1 for size in pair.expected.shape) < 2:
            vectors.add(key)
        built = new.get(key)
        if numbers.constant is not None:
            unclear.add(key)
            if built is not None and built.constant == numbers.constant and numbers.count > 1 and _is_float(pair):
                constant.append(key)
        elif not _is_float(pair):
            unclear.add(key)
        elif built is not None and _looks_new(pair, numbers, built):
            fresh.add(key)
        else:
            kind = judge_values(pair.expected, numbers, None if model is None else module_of(model, key)).kind
            (fresh if kind == "fresh" else unclear if kind == "few" else trained).add(key)
    trained_modules = {_parent(key) for key in trained}
    # A vector has few numbers: it can be as in a new model by chance where the matrix beside it is trained.
    fresh -= {key for key in fresh & vectors if _parent(key) in trained_modules}
    modules = {_parent(key) for key in fresh} - trained_modules
    untrained = fresh | {key for key in unclear if _parent(key) in modules}
    return Untrained(
        tuple(key for key in order if key in untrained),
        tuple(key for key in constant if key not in untrained),
        not trained,
    )


def module_of(model: Module, key: str) -> Module | None:
    """Return the module of a model that has the tensor at ``key``, or None where there is none."""
    try:
        return model.get_submodule(_parent(key))
    except (AttributeError, RuntimeError):  # torch.jit refuses the call
        return None


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def _is_float(pair: KeyPair) -> bool:
    return pair.found.dtype in FLOATS


def _looks_new(pair: KeyPair, found: ValueStats, new: ValueStats) -> bool:
    """Return whether values fit those of a new model, and are not the same values."""
    is_same = (found.count, found.zeros, found.min, found.max) == (new.count, new.zeros, new.min, new.max)
    if found.finite != found.count or (is_same and found.histogram == new.histogram):
        return False
    return _have_one_distribution(found, new, same_dtype=pair.found.dtype == pair.expected.dtype)


def _have_one_distribution(found: ValueStats, fresh: ValueStats, *, same_dtype: bool) -> bool:
    """Return whether the mean, the deviation and the histogram differ as little as those of two samples."""
    count = found.count
    if count < _MIN_VALUES or fresh.count != count or not found.std or not fresh.std:
        return False
    if found.mean is None or fresh.mean is None:
        return False
    error = math.sqrt(2 / count)
    if abs(found.mean - fresh.mean) > _SIGMAS * max(found.std, fresh.std) * error:
        return False
    # The standard error of a normal distribution; no common initialisation has a larger error.
    if abs(math.log(found.std / fresh.std)) > _SIGMAS * error / math.sqrt(2):
        return False
    return not same_dtype or _have_one_histogram(found.histogram, fresh.histogram)


def _have_one_histogram(found: Mapping[int, int], fresh: Mapping[int, int]) -> bool:
    """Return whether a chi-squared test finds no difference between two histograms of equally many numbers."""
    bins = [(found.get(exponent, 0), fresh.get(exponent, 0)) for exponent in found.keys() | fresh.keys()]
    full = [(count, fresh_count) for count, fresh_count in bins if count + fresh_count >= _MIN_IN_BIN]
    squared = sum((count - fresh_count) ** 2 / (count + fresh_count) for count, fresh_count in full)
    return squared <= len(full) + _SIGMAS * math.sqrt(2 * len(full))
