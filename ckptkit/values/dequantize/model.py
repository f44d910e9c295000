"""What a decoder is: a description of one quantised weight that turns the bytes of its parts into float32 numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.values.dequantize.magnitudes import Magnitudes
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "E8M0",
    "FP8",
    "BrokenPartError",
    "Decoder",
    "ElementwiseDecoder",
    "Setting",
    "Settings",
    "UnknownFormError",
    "floats_of",
    "half_dtype",
    "require_part",
    "setting_int",
]

E8M0 = frozenset({"F8_E8M0", "U8"})  # powers of two, also where a file has no dtype for them
FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

Setting: TypeAlias = int | float | str | bool | tuple[int, ...]
Settings: TypeAlias = Mapping[str, Setting]


class BrokenPartError(Exception):
    """Raised where a part of a quantised weight cannot be a part of it; the caller makes a sentence with its name.

    ``role`` is the part, and ``reason`` continues a sentence that begins with its key: ``has 3 NaN``.
    """

    def __init__(self, role: str, reason: str) -> None:
        """Set the fields."""
        super().__init__(f"{role} {reason}")
        self.role = role
        self.reason = reason


class UnknownFormError(Exception):
    """Raised for a form of a scheme that no decoder reads. Its text follows the name of the scheme: ``in planes``.

    ``hint`` is a way out that comes before that of the scheme.
    """

    def __init__(self, form: str, hint: str = "") -> None:
        """Set the fields."""
        super().__init__(form)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Decoder(ABC):
    """One quantised weight: its parts by role, and how blocks of its rows become float32 numbers.

    A subclass is a frozen dataclass. The function that makes it checks the dtypes and shapes of its parts, and raises
    ``BrokenPartError``; so a wrong shape is found from the headers. The parts in ``streamed`` are read by rows, and all
    others are read whole, once. ``multiple`` is the number of rows at whose multiples a block can begin.
    ``has_scales_in_codes`` is true if only ``decode`` finds scales that are NaN or infinite.

    The arithmetic is that of float32, and each number depends on its own codes and companions only. So results do not
    depend on the blocks. The caller rounds them to another dtype, once.
    """

    parts: Mapping[str, TensorInfo]
    streamed: ClassVar[tuple[str, ...]] = ("codes",)
    has_scales_in_codes: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""

    @property
    def recorded(self) -> str | None:
        """The code of the dtype that the scheme says the weight had, or None."""
        return None

    @property
    def multiple(self) -> int:
        """The number of rows at whose multiples a block begins; the last block can end anywhere."""
        return 1

    @property
    def rows_together(self) -> int:
        """The number of rows that are made from the same bytes, which are then read once for all of their blocks."""
        return 1

    @property
    def grid(self) -> tuple[int, int]:
        """The weight as a matrix in row-major order: the number of its rows and of its columns."""
        shape = self.shape
        return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)

    def range_of(self, role: str, first: int, last: int) -> tuple[int, int]:
        """Return the first byte and the number of bytes of a streamed part for the rows from ``first`` to ``last``."""
        info, rows = self.parts[role], self.grid[0]
        width = info.nbytes // rows if rows else 0
        return first * width, (last - first) * width

    def infinite_codes(self, streamed: Mapping[str, memoryview]) -> int:  # noqa: ARG002 - few schemes have such codes
        """Return how many of the codes stand for NaN or inf, whatever their scales are."""
        return 0

    @abstractmethod
    def prepare(self, whole: Mapping[str, memoryview]) -> Any:
        """Return what ``decode`` needs of the parts that are not streamed, given their bytes.

        Raises ``BrokenPartError`` for a value that such a part cannot have: NaN in scales, a zero point out of range.
        """

    def magnitudes(self, held: Any) -> Magnitudes | None:  # noqa: ARG002 - few parts tell them
        """Return those of all products of finite codes and scales; None unless what ``prepare`` returned tells them."""
        return None

    @abstractmethod
    def decode(  # noqa: PLR0917 - a range, its bytes and its place
        self,
        first: int,
        last: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Fill ``out``, a contiguous matrix, with the rows from ``first`` to ``last``.

        ``streamed`` has the bytes of ``range_of``, and ``held`` is what ``prepare`` returned. Several threads share
        ``held``; scratch memory is from ``workers.buffer``.
        """


class ElementwiseDecoder(Decoder):
    """A decoder of numbers that are decoded alone, so that some columns of a long row need little memory."""

    __slots__ = ()

    @property
    def splits_rows(self) -> bool:
        """Whether ``decode_columns`` is called for rows that are long."""
        return True

    def range_in_row(self, role: str, row: int, start: int, stop: int) -> tuple[int, int]:
        """Return the first byte and the number of bytes of a streamed part for some columns of a row."""
        begin, width = self.range_of(role, row, row + 1)
        low = start * width // self.grid[1]
        return begin + low, -(-stop * width // self.grid[1]) - low

    def decode(  # noqa: PLR0917 - as the method of ``Decoder``
        self,
        first: int,
        last: int,  # noqa: ARG002 - ``out`` has as many rows
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Decode all columns of the rows."""
        self.decode_columns(first, 0, streamed, held, out, workers)

    @abstractmethod
    def decode_columns(  # noqa: PLR0917 - a place, its bytes and its numbers
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Fill ``out``, a matrix, with the columns from ``start`` on, an even number, of the rows from ``row`` on.

        ``streamed`` has the bytes of ``range_in_row``, or those of whole rows.
        """


def require_part(
    parts: Mapping[str, TensorInfo],
    role: str,
    dtypes: Sequence[str] | frozenset[str],
    shape: Sequence[int] | None = None,
) -> TensorInfo:
    """Return a part; raise ``BrokenPartError`` unless it is there with one of these dtypes, and this shape if given."""
    info = parts.get(role)
    if info is None:
        raise BrokenPartError(role, "is missing")
    if info.dtype not in dtypes:
        raise BrokenPartError(role, f"is {info}, and not {' or '.join(sorted(dtypes))}")
    if shape is not None and info.shape != tuple(shape):
        raise BrokenPartError(role, f"is {info}, and must be {list(shape)}")
    return info


def half_dtype(scales: TensorInfo) -> str | None:
    """Return the dtype of scales that have 16 bits, which is that of the weight; other scales do not tell it."""
    return scales.dtype if scales.dtype in {"F16", "BF16"} else None


def setting_int(settings: Settings, name: str, default: int | None = None) -> int:
    """Return a setting that is an integer above 0; raise ``BrokenPartError`` for any other."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BrokenPartError("codes", f"cannot be decoded: {name} is {value!r}, and not an integer above 0")
    return value


def floats_of(role: str, info: TensorInfo, data: memoryview, workers: Workers | None = None) -> npt.NDArray[np.float32]:
    """Return a part that holds numbers as a float32 array of its shape; raise ``BrokenPartError`` for NaN and inf."""
    import numpy as np

    from ckptkit.values.casting import cast_bytes

    code = "F8_E8M0" if info.dtype == "U8" else info.dtype
    assert code in DTYPES  # noqa: S101 - ``require`` has checked it
    made = cast_bytes(data, code, "F32", workers or Workers(1))
    numbers: npt.NDArray[np.float32] = np.frombuffer(bytes(made), np.float32).reshape(info.shape)
    bad = numbers.size - int(np.count_nonzero(np.isfinite(numbers)))
    if bad:
        reason = f"has {bad:,} of {numbers.size:,} values that are NaN or infinite"
        raise BrokenPartError(role, reason)
    return numbers
