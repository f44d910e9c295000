"""Statistics of one tensor from its bytes, chunk by chunk; the caller reads the bytes.

Each piece gets its own mean and sum of squares in float64, and an exact sum combines the pieces. So a large mean costs
no accuracy, and the size of the chunks and the order of the threads do not change the result.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Final

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import tensor_of_bytes, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.statistics.threads import Workspace
from ckptkit.statistics.value_stats import Moments, ValueStats, exact_sum, merge_moments

if TYPE_CHECKING:
    import torch

__all__ = ["Accumulator", "why_unsupported"]

_MAX_PARTS = 4096
# The sum of squared distances from the mean is the sum of squares minus count * mean ** 2. If at least this share
# remains, the subtraction loses at most 5 of 53 bits, and no second pass over the distances is needed.
_MIN_SHARE_LEFT = 1 / 32
_PARTS: Final = {"C32": "F16", "C64": "F32", "C128": "F64"}
_FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})
_INTEGERS: Final = frozenset({"U16", "I16", "U32", "I32", "U64", "I64"})
_COUNTED: Final = frozenset({"BOOL", "U8", "I8", "F4", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"})
# The exponent of the smallest normal number of each dtype that has subnormal numbers.
_MIN_EXPONENT: Final = {"F4": 0, "F8_E4M3": -6, "F8_E5M2": -14, "F8_E4M3FNUZ": -7, "F8_E5M2FNUZ": -15,
                        "F16": -14, "BF16": -126, "F32": -126, "F64": -1022}  # fmt: skip
_F4_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def why_unsupported(info: TensorInfo) -> str:
    """Return why statistics of a tensor cannot be computed; an empty string if they can."""
    if info.kind != "dense":
        return f"{info.kind} tensor"
    if info.dtype == "F4" and info.elements % 2:
        return "an odd number of F4 elements, which are stored two to a byte"
    if info.dtype in _COUNTED | _FLOATS | _INTEGERS or info.dtype in _PARTS:
        return ""
    return f"torch has no arithmetic for {info.dtype}"


class Accumulator:
    """Compute the statistics of one tensor from the bytes of its ``Payload``.

    Chunks may have any size and may split a number; the accumulator does not hold on to them. Chunks must come in
    order, unless every chunk begins and ends between two numbers.
    """

    def __init__(self, info: TensorInfo, workspace: Workspace) -> None:
        """Prepare for the bytes of ``info``; raise ``ValueError`` if ``why_unsupported`` gives a reason."""
        import torch

        if reason := why_unsupported(info):
            raise ValueError(f"{quoted(info.key)}: {reason}")
        code = _PARTS.get(info.dtype, info.dtype)
        self._workspace = workspace
        self._dtype: torch.dtype = torch.uint8 if code in _COUNTED else torch_dtype(code)
        self._collector: _Counts | _Sums = _Counts(code) if code in _COUNTED else _Sums(code, workspace)
        self._rest = b""

    def add(self, chunk: bytes | bytearray | memoryview) -> None:
        """Add the next bytes; afterwards the caller may reuse their buffer."""
        width = self._dtype.itemsize
        data = self._rest + bytes(chunk) if self._rest else chunk
        whole = len(data) - len(data) % width
        self._rest = bytes(data[whole:])
        if whole:
            raw = tensor_of_bytes(data[:whole])
            if raw.data_ptr() % width:
                raw = raw.clone()
            self._workspace.share(self._collector.add, raw.view(self._dtype))

    def result(self) -> ValueStats:
        """Return the statistics of all numbers added so far."""
        return self._collector.result()


class _Counts:
    """Statistics of numbers of at most 8 bits, computed from a count of each of the 256 codes."""

    def __init__(self, code: str) -> None:
        import torch

        self.code = code
        self.lock = threading.Lock()
        self.counts = torch.zeros(256, dtype=torch.int64, device="cpu")

    def add(self, codes: Tensor) -> None:
        import torch

        counts = torch.bincount(codes, minlength=256)
        with self.lock:
            self.counts += counts

    def result(self) -> ValueStats:
        pairs = [(value, times) for value, times in zip(self._values(), self._times(), strict=True) if times]
        finite = [(value, times) for value, times in pairs if math.isfinite(value)]
        count = sum(times for _, times in finite)
        mean = exact_sum(value * times for value, times in finite) / max(count, 1)
        squares = exact_sum(times * (value - mean) ** 2 for value, times in finite)
        l1 = exact_sum(abs(value) * times for value, times in finite)
        smallest = 2.0 ** _MIN_EXPONENT[self.code] if self.code in _MIN_EXPONENT else 0.0
        bins: dict[int, int] = {}
        for value, times in finite:
            if value:
                exponent = math.frexp(value)[1] - 1
                bins[exponent] = bins.get(exponent, 0) + times
        return ValueStats(
            sum(times for _, times in pairs),
            sum(times for value, times in pairs if math.isnan(value)),
            sum(times for value, times in pairs if value == math.inf),
            sum(times for value, times in pairs if value == -math.inf),
            sum(times for value, times in pairs if value == 0),
            sum(times for value, times in finite if 0 < abs(value) < smallest),
            min((value for value, _ in finite), default=None),
            max((value for value, _ in finite), default=None),
            Moments(count, mean, squares, l1),
            dict(sorted(bins.items())),
        )

    def _values(self) -> list[float]:
        import torch

        if self.code == "F4":
            return list(_F4_VALUES)
        if self.code == "BOOL":
            return [0.0] + [1.0] * 255
        if self.code == "F8_E8M0":  # powers of two; not every torch has a dtype for them
            return [2.0 ** (code - 127) for code in range(255)] + [math.nan]
        codes = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
        values = codes.view(torch_dtype(self.code))
        numbers: list[float] = (values if self.code in ("U8", "I8") else values.to(torch.float64)).tolist()
        return numbers

    def _times(self) -> list[int]:
        counts: list[int] = self.counts.tolist()
        if self.code != "F4":
            return counts
        return [sum(counts[half::16]) + sum(counts[16 * half : 16 * half + 16]) for half in range(16)]


class _Sums:
    """Statistics of numbers of more than 8 bits, computed from sums, extremes and a count of each exponent."""

    def __init__(self, code: str, workspace: Workspace) -> None:
        import torch

        self.code = code
        self.workspace = workspace
        self.lock = threading.Lock()
        # F32 represents every F16 and BF16 exactly, and its exponent tells which of them are subnormal.
        wide = code in _INTEGERS or code == "F64"
        self.work = torch.float64 if wide else torch.float32
        self.bits, self.mantissa, self.bias = (torch.int64, 52, 1023) if wide else (torch.int32, 23, 127)
        self.exponents = torch.zeros(2 * self.bias + 2, dtype=torch.int64, device="cpu")
        self.parts: list[Moments] = []
        self.count = self.nan = self.posinf = self.zeros = 0
        self.low: float | None = None
        self.high: float | None = None

    def add(self, stored: Tensor) -> None:
        import torch

        count = stored.numel()
        work = stored if stored.dtype is self.work else self.workspace.buffer("work", self.work, count).copy_(stored)
        exponents = self._exponents(work)
        zeros = count - int(torch.count_nonzero(work)) if exponents[0] else 0
        special = int(exponents[-1])  # NaN and infinities have the largest exponent
        nan = int(torch.count_nonzero(work.isnan())) if special else 0
        posinf = int(torch.count_nonzero(work == math.inf)) if nan < special else 0
        part, low, high = self._moments_and_extremes(stored, work, special)
        with self.lock:
            self.count += count
            self.nan += nan
            self.posinf += posinf
            self.zeros += zeros
            self.exponents += exponents
            self.low = min((bound for bound in (self.low, low) if bound is not None), default=None)
            self.high = max((bound for bound in (self.high, high) if bound is not None), default=None)
            self.parts += [part] if part else []
            if len(self.parts) == _MAX_PARTS:
                self.parts = [merge_moments(self.parts)]

    def _exponents(self, work: Tensor) -> Tensor:
        import torch

        shifted = self.workspace.buffer("bits", self.bits, work.numel())
        torch.bitwise_right_shift(work.view(self.bits), self.mantissa, out=shifted)
        if self.bits is torch.int64:
            fields = self.workspace.buffer("fields", torch.int16, work.numel()).copy_(shifted.bitwise_and_(2047))
        else:
            fields = self.workspace.buffer("fields", torch.uint8, work.numel()).copy_(shifted)  # drops the sign bit
        return torch.bincount(fields, minlength=len(self.exponents))

    def _moments_and_extremes(
        self, stored: Tensor, work: Tensor, special: int
    ) -> tuple[Moments | None, float | None, float | None]:
        import torch

        if special == work.numel():
            return None, None, None
        if not special:
            low, high = self._extremes(stored, work)
            return self._moments(work, low, high, work.numel()), low, high
        # Zeros in place of NaN and Inf change no sum, and no extreme if the numbers have both signs.
        finite = torch.nan_to_num(work, 0.0, 0.0, 0.0, out=self.workspace.buffer("finite", self.work, work.numel()))
        low, high = self._extremes(finite, finite)
        part = self._moments(finite, low, high, work.numel() - special) if low < 0 < high else None
        if part is None:
            finite = work[work.isfinite()]
            low, high = self._extremes(finite, finite)
            part = self._moments(finite, low, high, finite.numel())
        return part, low, high

    def _extremes(self, stored: Tensor, work: Tensor) -> tuple[float, float]:
        import torch

        if self.code not in _INTEGERS:
            low, high = torch.aminmax(work)
            return low.item(), high.item()
        if self.code != "U64":
            low, high = torch.aminmax(stored.to(torch.int64))
            return low.item(), high.item()
        low, high = torch.aminmax(stored.view(torch.int64) ^ -(2**63))  # int64 values in the order of the uint64 values
        return int(low) + 2**63, int(high) + 2**63

    def _moments(self, work: Tensor, low: float, high: float, finite: int) -> Moments:
        """Return the moments of ``finite`` numbers; all other numbers in ``work`` are zeros."""
        import torch

        if low == high:
            return Moments(finite, float(low), 0.0, abs(float(low)) * finite)
        wide = self.workspace.buffer("wide", torch.float64, work.numel()).copy_(work)
        total = wide.sum().item()
        mean = total / finite if math.isfinite(total) else (wide / finite).sum().item()
        power = torch.dot(wide, wide).item()
        squares = power - finite * mean * mean
        if not squares > _MIN_SHARE_LEFT * power:
            numbers = wide if finite == wide.numel() else wide[wide != 0]
            apart = torch.sub(numbers, mean, out=self.workspace.buffer("apart", torch.float64, numbers.numel()))
            squares = torch.dot(apart, apart).item() + (finite - numbers.numel()) * mean * mean
        one_sign = low >= 0 or high <= 0
        return Moments(finite, mean, squares, abs(total) if one_sign else wide.abs_().sum().item())

    def result(self) -> ValueStats:
        exponents: list[int] = self.exponents.tolist()
        small = exponents[0] - self.zeros
        bins = {-self.bias: small} if small else {}
        bins |= {index - self.bias: exponents[index] for index in self.exponents[1:-1].nonzero()[:, 0].add(1).tolist()}
        normal = _MIN_EXPONENT.get(self.code, -self.bias) + self.bias
        return ValueStats(
            self.count,
            self.nan,
            self.posinf,
            exponents[-1] - self.nan - self.posinf,
            self.zeros,
            sum(exponents[:normal]) - self.zeros if normal else 0,
            self.low,
            self.high,
            merge_moments(self.parts),
            bins,
        )
