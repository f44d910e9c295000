"""Statistics computed from bytes equal those that torch and math compute over the whole tensor in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptkit import stats
from ckptkit.core.checkpoint import Access, Checkpoint, Description, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.torch_bridge import as_checkpoint, torch_dtype
from ckptkit.statistics.columns import StatsTable
from ckptkit.statistics.measured import measure_values
from ckptkit.statistics.value_stats import ValueStats
from ckptkit.values.extremes import Extremes, extremes_of
from ckptkit.values.float_formats import FLOAT_FORMATS
from ckptkit.values.kernels import why_unsupported
from ckptkit.values.workers import Workers
from tests.features import FLOAT4, has_dtype
from tests.helpers_formats import bits, random_tensor

F4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SUPPORTED = [code for code in DTYPES if has_dtype(code) and not code.startswith(("Q", "BITS"))]


@dataclass(frozen=True)
class Chunked:
    """Bytes in chunks of ``step``, in one buffer that is filled again for each chunk."""

    data: bytes
    step: int

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[memoryview]:
        buffer = bytearray(self.step)
        for start in range(0, len(self.data), self.step):
            part = self.data[start : start + self.step]
            buffer[: len(part)] = part
            yield memoryview(buffer)[: len(part)]


def stats_of(info: TensorInfo, data: bytes, step: int = 1 << 22, threads: int = 2) -> ValueStats:
    payload = Chunked(data, step)
    checkpoint = Checkpoint({info.key: info}, Access(lambda _: payload), Description("a", "test"))
    with Workers(threads) as workers:
        return measure_values(checkpoint, [info.key], workers, lambda _: None)[info.key]


def described(tensor: torch.Tensor) -> TensorInfo:
    return as_checkpoint({"w": tensor}, "test")["w"]


def numbers_in(tensor: torch.Tensor) -> list[float]:
    """Return every number of a tensor as an exact Python number."""
    if tensor.dtype in FLOAT4:
        signed = [*F4, *(-value for value in F4)]
        return [signed[half] for byte in bits(tensor) for half in (byte & 15, byte >> 4)]
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype is torch.bool:
        return [float(byte != 0) for byte in bits(flat)]
    return list((flat.to(torch.float64) if flat.is_floating_point() else flat).tolist())


def exponent_of(value: float) -> int:
    return math.frexp(float(value))[1] - 1


def check(found: ValueStats, values: list[float], code: str) -> None:
    """Assert that counts are exact and that moments differ from exact sums by a few roundings at most."""
    finite = [value for value in values if math.isfinite(value)]
    assert found.count == len(values)
    assert found.finite == len(finite)
    assert found.nan == sum(map(math.isnan, values))
    assert (found.posinf, found.neginf) == (values.count(math.inf), values.count(-math.inf))
    assert found.zeros == sum(value == 0 for value in values)
    assert (found.min, found.max) == (min(finite, default=None), max(finite, default=None))
    assert found.abs_max == max(map(abs, finite), default=None)
    assert found.constant == (values[0] if values and len(set(values)) == 1 and finite else None)
    part = {"C32": "F16", "C64": "F32", "C128": "F64"}.get(code, code)
    dtype = getattr(torch, DTYPES[part].torch_name)
    floating = dtype.is_floating_point and part != "F8_E8M0"
    smallest = 1.0 if part == "F4" else torch.finfo(dtype).smallest_normal if floating else 0.0
    assert found.subnormal == sum(0 < abs(value) < smallest for value in finite)
    lowest = {"F32": -127, "BF16": -127, "F64": -1023}.get(part, -9999)
    bins = Counter(max(exponent_of(value), lowest) for value in finite if value)
    assert found.histogram == bins
    if not finite:
        assert (found.mean, found.std, found.l1, found.l2) == (None, None, None, None)
        return
    assert found.mean is not None
    assert found.std is not None
    scale = max(map(abs, finite))
    mean = math.fsum(finite) / len(finite)
    squares = math.fsum((float(value) - mean) ** 2 for value in finite)
    std = math.sqrt(squares / len(finite))
    assert found.mean == pytest.approx(mean, rel=1e-14, abs=1e-14 * scale)
    assert found.std == pytest.approx(std, rel=1e-9, abs=1e-15 * scale)
    assert found.l1 == pytest.approx(math.fsum(map(abs, map(float, finite))), rel=1e-13)
    assert found.l2 == pytest.approx(math.sqrt(math.fsum(float(value) ** 2 for value in finite)), rel=1e-13)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("code", SUPPORTED)
def test_every_dtype(code: str) -> None:
    """The statistics of random bits, with NaN, infinities and unused codes, agree with exact arithmetic."""
    dtype = getattr(torch, DTYPES[code].torch_name)
    tensor = random_tensor(dtype, (4002,))
    if code in ("F64", "C128"):  # squares of the full range are beyond float64, in torch as well
        tensor = torch.where(tensor.abs() < 1e100, tensor, torch.tensor(math.nan).to(dtype))
        tensor = torch.where((tensor.abs() > 1e-100) | tensor.isnan(), tensor, torch.zeros((), dtype=dtype))
    check(stats_of(described(tensor), bits(tensor)), numbers_in(tensor), code)


@pytest.mark.parametrize("code", [code for code in FLOAT_FORMATS if DTYPES[code].bits <= 16 and has_dtype(code)])
@pytest.mark.parametrize("order", ["shuffled", "sorted"])
def test_the_extremes_of_every_number(code: str, order: str) -> None:
    """Every bit pattern, in runs of 1 to 97 numbers, has torch's counts and extremes; sorted, runs have one sign."""
    dtype, count = torch_dtype(code), 1 << DTYPES[code].bits
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    patterns = shuffled if order == "shuffled" else torch.arange(count)
    numbers = patterns.to(torch.uint8 if count == 256 else torch.int16).view(dtype)
    starts = [0, *(start for start in accumulate(n % 97 + 1 for n in range(300)) if start < count)]
    with Workers(1) as workers:
        found = extremes_of(bits(numbers), code, workers, starts).rows()
    smallest = torch.finfo(dtype).smallest_normal
    for one, start, end in zip(found, starts, [*starts[1:], count], strict=True):
        run = numbers[start:end].double()
        finite = run[run.isfinite()].tolist()
        counts = run.isnan(), run == math.inf, run == -math.inf, run == 0, (run != 0) & (run.abs() < smallest)
        nan, posinf, neginf, zeros, subnormal = (int(marks.sum()) for marks in counts)
        low, high = min(finite, default=None), max(finite, default=None)
        assert one == Extremes(len(run), nan, posinf, neginf, zeros, subnormal, low, high)


def test_no_dtype_is_forgotten() -> None:
    """A dtype without statistics has a reason; every other dtype of the table is tested above."""
    reasons = {code: why_unsupported(TensorInfo("w", code, (2,))) for code in DTYPES}
    assert sorted(code for code, reason in reasons.items() if not reason and has_dtype(code)) == sorted(SUPPORTED)
    assert reasons["F6_E2M3"] == "ckptkit has no arithmetic for F6_E2M3"
    assert why_unsupported(TensorInfo("w", "F4", (3,)))
    for kind in ("sparse", "quantized", "meta", "subclass"):
        assert why_unsupported(TensorInfo("w", "F32", (2,), kind=kind)) == f"{kind} tensor"


SPECIAL = [0.0, -0.0, 1.0, -1.5, 3e38, -1e-40, 1e-45, 65504.0, 6e-8, math.nan, math.inf, -math.inf]


@settings(max_examples=50)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), max_size=40),
    st.integers(1, 9),
)
def test_any_floats_in_any_chunks(dtype: torch.dtype, values: list[float], step: int) -> None:
    """Chunks of any size, even those that split a number, give the same result as all bytes at once."""
    tensor = torch.tensor(values, dtype=dtype)
    info, data = described(tensor), bits(tensor)
    found = stats_of(info, data)
    check(found, numbers_in(tensor), info.dtype)
    assert stats_of(info, data, step) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32], ids=str)
@pytest.mark.parametrize("count", [32767, 32768, 131071, 131072, 131073, 400_001])
def test_pieces_of_threads_add_up(dtype: torch.dtype, count: int) -> None:
    """Splitting a tensor for the threads loses no number, counts none twice, and rounds no more than float64."""
    tensor = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 1000).to(dtype)
    if dtype.is_floating_point:
        tensor[[0, 131072 % count, -1]] = torch.tensor([math.nan, math.inf, 0.0], dtype=dtype)
    found = stats_of(described(tensor), bytes(tensor.view(torch.uint8).numpy()))
    wide = tensor.to(torch.float64)
    finite = wide[wide.isfinite()]
    assert (found.count, found.nan, found.posinf) == (count, int(wide.isnan().sum()), int((wide == math.inf).sum()))
    assert found.zeros == int((wide == 0).sum())
    assert (found.min, found.max) == (finite.min().item(), finite.max().item())
    assert found.mean == pytest.approx(finite.mean().item(), rel=1e-11)
    assert found.std == pytest.approx(finite.std(correction=0).item(), rel=1e-12)
    assert found.l1 == pytest.approx(finite.abs().sum().item(), rel=1e-12)
    assert found.l2 == pytest.approx(torch.linalg.vector_norm(finite).item(), rel=1e-12)
    assert sum(found.histogram.values()) == len(finite) - found.zeros


def test_a_large_mean_does_not_hide_the_deviation() -> None:
    """A deviation of a ten-millionth of the mean is exact to the last digits, over pieces with different means."""
    steps = torch.arange(300_000, dtype=torch.float64)
    tensor = 1e8 + (steps % 7) + (steps > 150_000) * 3
    found = stats_of(described(tensor), bits(tensor))
    assert found.std == pytest.approx((tensor - 1e8).std(correction=0).item(), rel=1e-12)
    assert found.mean == pytest.approx(1e8 + (tensor - 1e8).mean().item(), rel=1e-15)


@pytest.mark.parametrize("center", [0.0, 1e-3, 3.0, -1e6, 1e12], ids=str)
@pytest.mark.parametrize("special", [0, 1, 499, 1000], ids=str)
def test_nan_and_inf_do_not_change_moments(center: float, special: int) -> None:
    """NaN and Inf, few or many, do not change the moments of the other numbers, whatever their mean."""
    tensor = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + center
    tensor[7] = 0.0
    tensor[-20:] *= -1
    tensor[torch.randperm(1000, generator=torch.Generator().manual_seed(4))[:special]] = math.nan
    tensor[::5] = torch.where(tensor[::5].isnan(), -math.inf, tensor[::5])
    check(stats_of(described(tensor), bits(tensor)), numbers_in(tensor), "F64")
    narrow = tensor.float()
    check(stats_of(described(narrow), bits(narrow)), numbers_in(narrow), "F32")


@pytest.mark.parametrize("code", ["F32", "BF16", "F16", "F8_E4M3", "I32"])
def test_threads_chunks_and_neighbours_do_not_show(code: str, tmp_path: Path) -> None:
    """The result has the same bits with one thread or four, from chunks of any size, and from a file."""
    tensor = (torch.randn(1_200_001, generator=torch.Generator().manual_seed(1)) * 9).to(
        getattr(torch, DTYPES[code].torch_name)
    )
    data, info = bits(tensor), described(tensor)
    expected = stats_of(info, data, threads=1)
    assert stats_of(info, data, threads=4) == expected
    assert stats_of(info, data, step=999_999) == expected
    save_file({"a": tensor[:7].clone(), "b": tensor[7:20].clone(), "w": tensor}, tmp_path / "f")
    found = stats(tmp_path / "f").tensors
    assert found["w"].numbers == expected
    assert found["b"].numbers == stats_of(described(tensor[7:20]), bits(tensor[7:20]))


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.int64, [2**63 - 1, -(2**63), 5]),
        (torch.int64, [2**53 + 1, 2**53 + 3]),
        (torch.uint64, [2**64 - 1, 2**63, 0]),
        (torch.uint32, [2**32 - 1, 7]),
        (torch.uint16, [2**16 - 1, 7]),
    ],
    ids=str,
)
def test_integers_keep_their_extremes(dtype: torch.dtype, values: list[int]) -> None:
    """The smallest and the largest integer are exact, even beyond the precision of float64."""
    tensor = torch.tensor(values, dtype=dtype)
    found = stats_of(described(tensor), bits(tensor))
    assert (found.min, found.max) == (min(values), max(values))
    assert found.zeros == values.count(0)


def test_overflow_of_float64_gives_inf() -> None:
    """If the sum and the squares overflow, the mean is finite and the deviation infinite, as in torch."""
    tensor = torch.tensor([1.7e308, 1.7e308, 1.7e308, -1e308], dtype=torch.float64)
    for step in (32, 8):
        found = stats_of(described(tensor), bits(tensor), step)
        assert found.mean == pytest.approx(1.025e308, rel=1e-12)
        assert (found.std, found.l1, found.l2) == (math.inf, math.inf, math.inf)
        assert (found.min, found.max) == (-1e308, 1.7e308)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, 0.1)
    found = stats_of(described(tensor), bits(tensor))
    check(found, numbers_in(tensor), "F32")
    assert found.zero_share == 0


def test_a_constant_has_no_deviation() -> None:
    """A tensor of one number is constant and has a deviation of exactly 0; a tensor of two numbers is not constant."""
    tensor = torch.full((100_003,), 0.1)
    found = stats_of(described(tensor), bits(tensor))
    assert (found.constant, found.std, found.mean) == (tensor[0].item(), 0.0, tensor[0].item())
    tensor[5] = math.nan
    assert stats_of(described(tensor), bits(tensor)).constant is None


@given(st.lists(st.lists(st.sampled_from(SPECIAL[:6]) | st.floats(-1e6, 1e6), max_size=9), max_size=5))
@settings(max_examples=50)
def test_merged_stats_equal_those_of_one_tensor(parts: list[list[float]]) -> None:
    """Merged statistics of several tensors equal the statistics of one tensor with all their numbers."""
    tensors = [torch.tensor(part, dtype=torch.float64) for part in parts]
    found = StatsTable.of({str(at): stats_of(described(x), bits(x)) for at, x in enumerate(tensors)}).merged()
    check(found, [value for part in parts for value in part], "F64")


def test_columns_keep_every_number() -> None:
    """Statistics in columns are those that were put in, also where numbers are beyond float64, or none is finite."""
    named = {
        "large": stats_of(described(x := torch.tensor([2**63 - 1, -(2**63), 2**53 + 1])), bits(x)),
        "floats": stats_of(described(x := torch.tensor([1.5, -0.0, math.inf, 1e-45])), bits(x)),
        "nothing finite": stats_of(described(x := torch.tensor([math.nan, -math.inf])), bits(x)),
        "bytes": stats_of(described(x := torch.tensor([3, 0, 255], dtype=torch.uint8)), bits(x)),
        "empty": stats_of(described(x := torch.zeros(0)), bits(x)),
    }
    table = StatsTable.of(named)
    assert table == named
    assert list(map(type, astuple(table["large"]))) == list(map(type, astuple(named["large"])))
    backwards = table.take(table.rows_of(reversed(named)))
    assert list(backwards.items()) == list(reversed(named.items()))
    assert backwards.merged() == table.merged()
    assert table.merged().max == 2**63 - 1
    assert type(table.merged().min) is int
