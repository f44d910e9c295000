"""Which operation turns a shape that a checkpoint has into the one that a model wants."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ckptkit.core.text import plural
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.moving import Permute, Reshape, Slice, Transpose
from ckptkit.tensor_ops.operation import Operation, Shape, times
from ckptkit.tensor_ops.resizing import ConvInChannels, Pad, ResizePosEmbed

__all__ = ["MISMATCH_NAMES", "suggest", "suggestions"]

_Fit = tuple[Operation, str]
# Relative positions are tables of offsets: their rows are no positions, and are resized otherwise.
_POSITIONS = re.compile(r"(?:^|[._])(?:pos|position|positional|positions|wpe)(?:[._]|$)")
_RELATIVE = re.compile(r"(?:^|[._])rel(?:ative)?(?:[._]|$)")
_PREFIXES = (1, 0, 2, 5)  # a class token; none; with distillation; with four registers
# How Keras and Flax store the kernels of one, two and three dimensions, seen from torch's order.
_FROM_CHANNELS_LAST = {3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}
_MOST_CHANNELS = 4  # of an image: more are the width of a layer inside
_NUMBERS = ("no", "one", "two", "three", "four", "five")


def _resize_2d(found: Shape, expected: Shape, key: str) -> _Fit | None:
    if not _are_positions(found, expected, key):
        return None
    for prefix in _PREFIXES:
        old, new = (shape[-2] - prefix for shape in (found, expected))
        if old > 0 and new > 0 and math.isqrt(old) ** 2 == old and math.isqrt(new) ** 2 == new:
            one, other = (math.isqrt(old),) * 2, (math.isqrt(new),) * 2
            kept = f", {_NUMBERS[prefix]} prefix token{'s' if prefix > 1 else ''} kept" if prefix else ""
            return ResizePosEmbed(other, one, prefix), f"a {times(one)} grid becomes {times(other)}{kept}"
    return None


def _resize_1d(found: Shape, expected: Shape, key: str) -> _Fit | None:
    if not _are_positions(found, expected, key) or not found[-2] or not expected[-2]:
        return None
    old, new = found[-2], expected[-2]
    return ResizePosEmbed((new,), (old,)), f"{plural(old, 'position')} in a row become {new:,}"


def _are_positions(found: Shape, expected: Shape, key: str) -> bool:
    same = len(found) == len(expected) and found[-1:] == expected[-1:] and found[:-2] == expected[:-2]
    return (
        same
        and (len(found) == 2 or (len(found) == 3 and found[0] == 1))
        and found[-1] > 0
        and _POSITIONS.search(key) is not None
        and _RELATIVE.search(key) is None
    )


def _conv_in(found: Shape, expected: Shape, _: str) -> _Fit | None:
    if len(found) < 3 or _different(found, expected) != 1 or not expected[1] or not 0 < found[1] <= _MOST_CHANNELS:
        return None
    operation = ConvInChannels(expected[1])
    how = "summed" if operation.sums else f"repeated and scaled by {found[1]}/{expected[1]}"
    return operation, f"{plural(found[1], 'input channel')} become {expected[1]}, {how}"


def _transpose(found: Shape, expected: Shape, _: str) -> _Fit | None:
    if len(found) != 2 or expected != found[::-1]:
        return None
    return Transpose(), "its two dims are exchanged"


def _permute(found: Shape, expected: Shape, _: str) -> _Fit | None:
    dims = _FROM_CHANNELS_LAST.get(len(found), ())
    if not dims or len(expected) != len(found) or expected != tuple(found[dim] for dim in dims):
        return None
    return Permute(dims), "a kernel stored with its channels last becomes torch's"


def _reshape(found: Shape, expected: Shape, _: str) -> _Fit | None:
    if not _regrouped(found, expected):
        return None
    return Reshape(expected), "the same elements in the same order, their dims grouped otherwise"


def _regrouped(one: Shape, other: Shape) -> bool:
    """Return whether one shape only joins neighbouring dims of the other, or divides them; sizes of 1 come and go."""
    finer, coarser = sorted(([size for size in shape if size != 1] for shape in (one, other)), key=len, reverse=True)
    at = 0
    for size in coarser:
        product = 1
        while product < size and at < len(finer) and finer[at]:
            product *= finer[at]
            at += 1
        if product != size:
            return False
    return at == len(finer)


def _slice(found: Shape, expected: Shape, _: str) -> _Fit | None:
    dim = _different(found, expected)
    if dim is None or found[dim] < expected[dim]:
        return None
    return Slice(dim, 0, expected[dim]), f"the first {expected[dim]:,} of {found[dim]:,} {_rows(dim)} are kept"


def _pad(fill: str) -> Callable[[Shape, Shape, str], _Fit | None]:
    how = {"zeros": "of zeros", "mean": "of their mean", "normal": "drawn as they are spread"}[fill]

    def fit(found: Shape, expected: Shape, _: str) -> _Fit | None:
        dim = _different(found, expected)
        if dim is None or found[dim] > expected[dim] or (not found[dim] and fill != "zeros"):
            return None
        more = expected[dim] - found[dim]
        return Pad(expected[dim], dim, fill), f"{more:,} {_rows(dim)} {how} are added to the {found[dim]:,} there are"

    return fit


def _rows(dim: int) -> str:
    return "rows" if dim == 0 else f"along dim {dim}"


def _different(found: Shape, expected: Shape) -> int | None:
    """Return the one dim in which two shapes differ, or None."""
    if len(found) != len(expected):
        return None
    dims = [dim for dim, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    return dims[0] if len(dims) == 1 else None


# Best first, where several fit.
_FITS: Mapping[str, Callable[[Shape, Shape, str], _Fit | None]] = MappingProxyType(
    {
        "resize_pos_embed": _resize_2d,
        "resize_pos_embed_1d": _resize_1d,
        "conv_in_channels": _conv_in,
        "transpose": _transpose,
        "permute": _permute,
        "reshape": _reshape,
        "slice": _slice,
        "pad_mean": _pad("mean"),
        "pad_normal": _pad("normal"),
        "pad": _pad("zeros"),
    }
)
MISMATCH_NAMES = tuple(sorted(_FITS))


def suggest(name: str, found: Shape, expected: Shape, key: str) -> Operation | None:
    """Return the operation of that name that turns the shape ``found`` into ``expected``, or None.

    Position embeddings are told by their ``key``; a reshape only joins or divides neighbouring dims. Raises
    ``RuleError`` for a name that is not among ``MISMATCH_NAMES``.
    """
    if name not in _FITS:
        raise RuleError(f"{name!r} mends no mismatch", hint=f"one of {', '.join(MISMATCH_NAMES)}")
    fit = _FITS[name](found, expected, key)
    return None if fit is None else fit[0]


def suggestions(found: Shape, expected: Shape, key: str) -> tuple[tuple[str, str], ...]:
    """Return the names for which ``suggest`` has an operation, each with what it would do, best first."""
    fits = ((name, fit(found, expected, key)) for name, fit in _FITS.items())
    made = [(name, fit[1]) for name, fit in fits if fit is not None]
    # A table of one row a token has a grid only by chance, unless its name says that it is an image's.
    if len(found) == 2 and [name for name, _ in made[:2]] == ["resize_pos_embed", "resize_pos_embed_1d"]:
        grid = _FITS["resize_pos_embed"](found, expected, key)
        prefixed = grid is not None and isinstance(grid[0], ResizePosEmbed) and grid[0].prefix > 0
        if not prefixed and not re.search("vis|image|patch", key):
            made[:2] = made[1::-1]
    return tuple(made)
