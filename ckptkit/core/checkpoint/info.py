"""The description of a tensor: dtype, shape, and its place in a storage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.frozen import slot_setters
from ckptkit.core.text import nearest, quoted

__all__ = [
    "UNINITIALISED",
    "TensorInfo",
    "UnknownKeyError",
    "View",
    "is_contiguous",
    "memory_order",
    "row_major",
    "storage_range",
    "under_key",
]

UNINITIALISED = "uninitialised"  # the kind of a tensor of a lazy module, which gets its shape while loading


class View(NamedTuple):
    """The part of a storage that a tensor covers; ``offset`` and ``stride`` count elements, as in torch.

    Two tensors of a checkpoint share memory if their ``storage`` numbers are equal.
    """

    storage: int
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, init=False)
class TensorInfo:
    """The description of a tensor without its values: key, dtype (safetensors code) and shape.

    ``kind`` is ``"dense"`` if the bytes of the tensor can be copied. A tensor of any other kind (``"sparse"``,
    ``"quantized"``, ``"meta"``, ...) is listed but cannot be written. ``stored_bytes`` is the size in bytes for a
    dtype that is not in ``DTYPES``, such as the block types of GGUF.

    Example:
        >>> info = ckptkit.TensorInfo("fc3.weight", "F32", (10, 84))
        >>> str(info), info.elements, info.nbytes
        ('F32 [10, 84]', 840, 3360)
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    view: View | None = None
    kind: str = "dense"
    stored_bytes: int = 0

    def __init__(  # noqa: PLR0917 - the fields of the dataclass, in its order
        self,
        key: str,
        dtype: str,
        shape: tuple[int, ...] | list[int],
        view: View | None = None,
        kind: str = "dense",
        stored_bytes: int = 0,
    ) -> None:
        """Set all fields through their slots, in half the time that the ``__init__`` of a frozen dataclass takes."""
        _set_key(self, key)
        _set_dtype(self, dtype)
        _set_shape(self, tuple(shape) if type(shape) is list else shape)  # as from JSON; a list equals no shape
        _set_view(self, view)
        _set_kind(self, kind)
        _set_stored_bytes(self, stored_bytes)

    @property
    def elements(self) -> int:
        """Return the number of elements, which is the product of the shape."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size of the elements in bytes, stored contiguously."""
        dtype = DTYPES.get(self.dtype)
        return self.stored_bytes if dtype is None else (math.prod(self.shape) * dtype.bits + 7) // 8

    def __str__(self) -> str:
        """Return dtype and shape as every table and message shows them: ``F32 [64, 3]``."""
        return _look(self.dtype, tuple(self.shape), self.kind)


_set_key, _set_dtype, _set_shape, _set_view, _set_kind, _set_stored_bytes = slot_setters(TensorInfo)


@lru_cache(maxsize=1024)
def _look(dtype: str, shape: tuple[int, ...], kind: str) -> str:
    mark = "" if kind == "dense" else f" ({kind})"
    return f"{dtype} {list(shape)}{mark}"


_MOST_COMPARED = 10_000  # keys that are compared with an unknown key, which takes a second


class UnknownKeyError(KeyError):
    """A ``KeyError`` for a key that a checkpoint does not have; its text has the key that was probably meant.

    ``args`` has the key alone, as in every ``KeyError``. The text is made when it is read: a caller that tries many
    keys does not wait for it.
    """

    def __init__(self, key: str, known: Iterable[str] = ()) -> None:
        """Set ``known``, the keys of the checkpoint."""
        super().__init__(key)
        self.known = tuple(known)

    def __str__(self) -> str:
        """Return one sentence."""
        key = str(self.args[0])
        near = nearest(key, self.known) if len(self.known) <= _MOST_COMPARED else None
        return f"the checkpoint has no {quoted(key)}" + (f": did you mean {quoted(near)}?" if near else "")


def under_key(info: TensorInfo, key: str, dtype: str = "") -> TensorInfo:
    """Return the description of the same tensor under another key, and with another dtype if one is given."""
    dtype = dtype or info.dtype
    if key == info.key and dtype == info.dtype:
        return info
    # dataclasses.replace takes three times as long, and the plan of a large model does this for each tensor.
    return TensorInfo(key, dtype, info.shape, info.view, info.kind, info.stored_bytes)


def storage_range(info: TensorInfo) -> tuple[int, int]:
    """Return the bytes of the storage that a view covers: the first byte, and the end (exclusive)."""
    view = info.view
    if view is None or 0 in info.shape:
        return 0, 0
    bits = DTYPES[info.dtype].bits
    last = view.offset
    for size, step in zip(info.shape, view.stride, strict=True):
        last += (size - 1) * step
    return view.offset * bits // 8, ((last + 1) * bits + 7) // 8


def is_contiguous(info: TensorInfo) -> bool:
    """Return whether the elements are stored in row-major order, without gaps."""
    if info.view is None or 0 in info.shape:
        return True
    expected = 1
    for size, step in zip(reversed(info.shape), reversed(info.view.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def memory_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the dims with several elements, from the slowest to the fastest in memory; None with gaps or overlaps.

    Two dense tensors of one shape and one order have their elements at the same places of their memory.
    """
    order = sorted((at for at, size in enumerate(shape) if size > 1), key=lambda at: -stride[at])
    expected = 1
    for at in reversed(order):
        if stride[at] != expected:
            return None
        expected *= shape[at]
    return tuple(order)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
