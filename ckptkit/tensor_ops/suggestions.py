"""Operations that turn the shape of a tensor in a checkpoint into the shape that a model expects."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ckptkit.core.text import plural
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.mismatch import MISMATCH_NAMES
from ckptkit.tensor_ops.moving import Permute, Reshape, Slice, Transpose
from ckptkit.tensor_ops.operation import Operation, Shape, grid_text
from ckptkit.tensor_ops.resizing import ConvInChannels, Pad, ResizePosEmbed

__all__ = ["suggest", "suggestions"]

_Suggestion = tuple[Operation, str]  # the operation, and a sentence about its effect
# The rows of a table of relative positions are offsets, not positions, so a grid of positions does not describe them.
_POSITIONS = re.compile(r"(?:^|[._])(?:pos|position|positional|positions|wpe)(?:[._]|$)")
_RELATIVE = re.compile(r"(?:^|[._])rel(?:ative)?(?:[._]|$)")
_PREFIXES = (1, 0, 2, 5)  # a class token; none; with distillation; with four registers
# The permutations of kernels with one, two and three dimensions from the order of Keras and Flax to torch's order.
_FROM_CHANNELS_LAST = {3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}
_MOST_CHANNELS = 4  # of an image; more channels are the width of an inner layer
_NUMBERS = ("no", "one", "two", "three", "four", "five")


def _resize_2d(found: Shape, expected: Shape, key: str) -> _Suggestion | None:
    if not _are_positions(found, expected, key):
        return None
    for prefix in _PREFIXES:
        old, new = (shape[-2] - prefix for shape in (found, expected))
        if old > 0 and new > 0 and math.isqrt(old) ** 2 == old and math.isqrt(new) ** 2 == new:
            old_grid, new_grid = (math.isqrt(old),) * 2, (math.isqrt(new),) * 2
            kept = f", {_NUMBERS[prefix]} prefix token{'s' if prefix > 1 else ''} kept" if prefix else ""
            operation = ResizePosEmbed(new_grid, old_grid, prefix)
            return operation, f"a {grid_text(old_grid)} grid becomes {grid_text(new_grid)}{kept}"
    return None


def _resize_1d(found: Shape, expected: Shape, key: str) -> _Suggestion | None:
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


def _conv_in(found: Shape, expected: Shape, _: str) -> _Suggestion | None:
    if len(found) < 3 or _differing_dim(found, expected) != 1 or not expected[1] or not 0 < found[1] <= _MOST_CHANNELS:
        return None
    operation = ConvInChannels(expected[1])
    how = "summed" if operation.sums else f"repeated and scaled by {found[1]}/{expected[1]}"
    return operation, f"{plural(found[1], 'input channel')} become {expected[1]}, {how}"


def _transpose(found: Shape, expected: Shape, _: str) -> _Suggestion | None:
    if len(found) != 2 or expected != found[::-1]:
        return None
    return Transpose(), "the two dims are exchanged"


def _permute(found: Shape, expected: Shape, _: str) -> _Suggestion | None:
    dims = _FROM_CHANNELS_LAST.get(len(found), ())
    if not dims or len(expected) != len(found) or expected != tuple(found[dim] for dim in dims):
        return None
    return Permute(dims), "a kernel stored with its channels last becomes torch's"


def _reshape(found: Shape, expected: Shape, _: str) -> _Suggestion | None:
    if not _regrouped(found, expected):
        return None
    return Reshape(expected), "the same elements in the same order, with the dims grouped in another way"


def _regrouped(first: Shape, second: Shape) -> bool:
    """Return whether one shape only joins or divides neighbouring dims of the other; sizes of 1 do not count."""
    finer, coarser = sorted(([size for size in shape if size != 1] for shape in (first, second)), key=len, reverse=True)
    at = 0
    for size in coarser:
        product = 1
        while product < size and at < len(finer) and finer[at]:
            product *= finer[at]
            at += 1
        if product != size:
            return False
    return at == len(finer)


def _slice(found: Shape, expected: Shape, _: str) -> _Suggestion | None:
    dim = _differing_dim(found, expected)
    if dim is None or found[dim] < expected[dim]:
        return None
    return Slice(dim, 0, expected[dim]), f"the first {expected[dim]:,} of {found[dim]:,} {_rows(dim)} are kept"


def _pad(fill: str) -> Callable[[Shape, Shape, str], _Suggestion | None]:
    how = {"zeros": "of zeros", "mean": "of their mean", "normal": "drawn with their mean and deviation"}[fill]

    def pad(found: Shape, expected: Shape, _: str) -> _Suggestion | None:
        dim = _differing_dim(found, expected)
        if dim is None or found[dim] > expected[dim] or (not found[dim] and fill != "zeros"):
            return None
        more = expected[dim] - found[dim]
        return Pad(expected[dim], dim, fill), f"{more:,} {_rows(dim)} {how} are added after the first {found[dim]:,}"

    return pad


def _rows(dim: int) -> str:
    return "rows" if dim == 0 else f"along dim {dim}"


def _differing_dim(found: Shape, expected: Shape) -> int | None:
    """Return the only dim that differs between two shapes, or None where no dim or several dims differ."""
    if len(found) != len(expected):
        return None
    dims = [dim for dim, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    return dims[0] if len(dims) == 1 else None


# If several operations apply, the first is the best.
_SUGGESTERS: Mapping[str, Callable[[Shape, Shape, str], _Suggestion | None]] = MappingProxyType(
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


def suggest(name: str, found: Shape, expected: Shape, key: str) -> Operation | None:
    """Return the operation called ``name`` that turns the shape ``found`` into ``expected``, or None.

    ``key`` distinguishes position embeddings from other tensors. A reshape only joins or divides neighbouring dims.
    Raises ``RuleError`` for a name that is not among ``MISMATCH_NAMES``.
    """
    if name not in _SUGGESTERS:
        raise RuleError(f"{name!r} is not an operation for a mismatch", hint=f"one of {', '.join(MISMATCH_NAMES)}")
    suggestion = _SUGGESTERS[name](found, expected, key)
    return None if suggestion is None else suggestion[0]


def suggestions(found: Shape, expected: Shape, key: str) -> tuple[tuple[str, str], ...]:
    """Return each name for which ``suggest`` returns an operation, with a sentence about its effect, best first."""
    tried = ((name, suggester(found, expected, key)) for name, suggester in _SUGGESTERS.items())
    found_names = [(name, suggestion[1]) for name, suggestion in tried if suggestion is not None]
    # A table of text positions can have a square number of rows by chance; only the key shows positions of images.
    if len(found) == 2 and [name for name, _ in found_names[:2]] == ["resize_pos_embed", "resize_pos_embed_1d"]:
        grid = _SUGGESTERS["resize_pos_embed"](found, expected, key)
        prefixed = grid is not None and isinstance(grid[0], ResizePosEmbed) and grid[0].prefix > 0
        if not prefixed and not re.search("vis|image|patch", key):
            found_names[:2] = found_names[1::-1]
    return tuple(found_names)
