"""The numbers of ``compare_values`` are those of torch in float64, for every dtype, length, and number of threads."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ckptkit
from ckptkit import ValueDiff, ValueDifference, compare_values
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.inputs import CheckpointLike
from ckptkit.rules.model import RulesLike
from ckptkit.values import difference
from ckptkit.values.difference import reading
from ckptkit.values.workers import Workers
from tests.features import FLOAT4, has_dtype
from tests.helpers_gguf import gguf_file, info
from tests.helpers_outputs import dtype_of, tensor_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning"),
]
KNOWN = sorted(code for code in CASTABLE if has_dtype(code))
FLOATS = [code for code in KNOWN if code.startswith(("F", "BF"))]
LONG = 20_001  # elements: more than two of the blocks below
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks and pieces short, so that short tensors have several; the numbers of a tensor are of its blocks."""
    for module in (difference, reading):
        monkeypatch.setattr(module, "BLOCK", 1 << 13)
    monkeypatch.setattr(reading, "_SMALL", 1 << 10)
    monkeypatch.setattr(reading, "_PIECE", 1 << 15)


def only(expected: Tensor, found: Tensor, **tolerances: float) -> ValueDifference:
    """Return the difference of two tensors that differ."""
    result = compare_values({"w": expected}, {"w": found}, **tolerances)  # type: ignore[arg-type]
    assert (result.compared, result.equal, result.skipped) == (1, 0, ())
    (difference,) = result.different
    return difference


def norm(numbers: Tensor) -> float:
    """Return the norm in 80 bits, of which no square overflows."""
    return float(np.sqrt((numbers.numpy().astype(np.longdouble) ** 2).sum()))


def wide(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, complex ones in two, in float64; torch widens some dtypes only by steps."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex128))
    narrow = tensor.is_floating_point() and tensor.itemsize == 1
    return (tensor.float() if narrow else tensor).double().flatten()


def pair_of(code: str, count: int, *, finite: bool) -> tuple[Tensor, Tensor]:
    """Return random bits, and those bits with one of them flipped in a fifth of the numbers; or smaller numbers."""
    expected = tensor_of(code, (count,), 3)
    bits = tensor_of("U8", (expected.nbytes,), 4)
    if code == "BOOL":
        return expected, expected ^ (bits < 50)
    steps = torch.where(bits < 50, torch.tensor(1, dtype=torch.uint8) << (bits % 8), torch.tensor(0, dtype=torch.uint8))
    found = (expected.view(torch.uint8) ^ steps).view(expected.dtype)
    if finite:
        numbers = torch.randn(count, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
        change = numbers * 0.2 * (bits[:count] < 100)
        expected, found = (side.to(dtype_of(code)) for side in (numbers, numbers + change))
    return expected, found


@pytest.mark.parametrize("count", [1, 37, LONG])
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "any bits"])
@pytest.mark.parametrize("code", KNOWN)
def test_numbers_are_those_of_torch(code: str, count: int, *, finite: bool) -> None:
    """Counts are exact, and sums of the elements that are finite on both sides are those in float64."""
    expected, found = pair_of(code, count, finite=finite)
    parts = 2 if expected.is_complex() else 1
    one, other = wide(expected), wide(found)
    bits = (expected.view(torch.uint8) != found.view(torch.uint8)).reshape(count, -1).any(1)
    if not bits.any():
        assert compare_values({"w": expected}, {"w": found}).equal == 1
        return
    result = only(expected, found)
    both = (one.isfinite() & other.isfinite()).reshape(count, parts).all(1)
    assert result.changed_elements == int(bits.sum())
    assert result.changed == result.changed_elements / count
    nan, inf = (
        [mark(side).reshape(count, parts).any(1) for side in (one, other)] for mark in (torch.isnan, torch.isinf)
    )
    assert (result.nan.expected, result.nan.found) == tuple(int(marks.sum()) for marks in nan)
    assert (result.inf.expected, result.inf.found) == tuple(int(marks.sum()) for marks in inf)
    odd = bits & ~both & ~(nan[0] & nan[1])
    assert result.nonfinite == int(odd.sum())
    mask = both.repeat_interleave(parts)
    one, other = one.where(mask, torch.tensor(0.0)), other.where(mask, torch.tensor(0.0))
    change = (other - one).reshape(count, parts)
    distance = torch.hypot(change[:, 0], change[:, -1]) if parts == 2 else change[:, 0].abs()
    if odd.any():
        assert (result.max_abs, result.place) == (INF, (int(odd.int().argmax()),))
    else:
        assert result.max_abs == pytest.approx(float(distance.max()), rel=1e-15)
        assert result.place is not None
        assert distance[result.place[0]] == distance.max()
    near = 1e-6 if code in FLOATS and code != "F64" else 1e-12
    assert (result.mean_abs is None) == (not both.any())
    if result.mean_abs is None or result.rel_l2 is None:
        return
    assert result.mean_abs == pytest.approx(float(distance.sum() / both.sum()), rel=near, abs=0)
    norms = norm(one), norm(other)
    far = norm(other - one)
    is_beyond = far == INF or (far > 0 and not norms[0])
    assert result.rel_l2 == pytest.approx(INF if is_beyond else far / (norms[0] or 1), rel=near, abs=0)
    assert (result.cosine is None) == (0.0 in norms)
    if result.cosine is not None and INF not in norms:
        product = (one.numpy().astype(np.longdouble) * other.numpy()).sum()
        assert result.cosine == pytest.approx(float(product / norms[0] / norms[1]), abs=1e-6)


@pytest.mark.parametrize("code", [code for code in FLOATS if code not in ("F32", "F64")])
@pytest.mark.parametrize("count", [1000, LONG])
def test_units_in_the_last_place_are_steps_between_numbers(code: str, count: int) -> None:
    """The distance is that of the ranks among all finite numbers of the dtype, of which -0.0 and 0.0 are one."""
    dtype = dtype_of(code)
    width = {1: np.uint8, 2: np.uint16}[dtype.itemsize]
    everything = torch.from_numpy(np.arange(1 << 8 * dtype.itemsize, dtype=width).view(np.uint8)).view(dtype)
    values = wide(everything)
    numbers = torch.from_numpy(np.unique(values[values.isfinite()].numpy()))
    expected, found = pair_of(code, count, finite=False)
    one, other = wide(expected), wide(found)
    both = one.isfinite() & other.isfinite()
    ranks = [torch.searchsorted(numbers, side[both]) for side in (one, other)]
    assert only(expected, found).max_ulp == int((ranks[0] - ranks[1]).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, LONG])
@pytest.mark.parametrize("start", [1.0, -1.0, 3e-39, 1e-3])
def test_units_of_wide_floats(dtype: torch.dtype, count: int, start: float) -> None:
    """Five steps of ``torch.nextafter`` are five units, also between subnormal numbers and across zero."""
    expected = torch.zeros(count, dtype=dtype)
    expected[-1] = found = torch.tensor(start, dtype=dtype)
    for _ in range(5):
        found = found.nextafter(torch.tensor(-INF, dtype=dtype))
    other = expected.clone()
    other[-1] = found
    assert only(expected, other).max_ulp == 5
    least = torch.tensor(0.0, dtype=dtype).nextafter(torch.tensor(1.0, dtype=dtype))
    expected[-1], other[-1] = least, -least
    assert only(expected, other).max_ulp == 2
    expected[-1], other[-1] = 0.0, -0.0
    result = only(expected, other)
    assert (result.max_ulp, result.max_abs, result.changed_elements, result.place) == (0, 0.0, 1, (count - 1,))


@pytest.mark.parametrize("count", [2, LONG])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e18, 1e38])
def test_squares_beyond_float32_are_exact(scale: float, count: int) -> None:
    """Subnormal numbers and numbers whose squares are beyond the dtype have the norms of float64."""
    expected = torch.full((count,), scale)
    found = expected * 1.5 if scale > 1e-40 else expected * 2
    result = only(expected, found)
    one, other = expected.double(), found.double()
    assert result.rel_l2 == pytest.approx(float((other - one).norm() / one.norm()), rel=1e-9)
    assert result.mean_abs == pytest.approx(float((other - one).mean()), rel=1e-6)
    assert result.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("count", [2, LONG])
def test_the_ends_of_a_dtype(count: int) -> None:
    """A difference beyond the dtype is a number still, and infinities of both signs are told from it."""
    largest = torch.finfo(torch.float32).max
    expected, found = torch.zeros(count), torch.zeros(count)
    expected[-1], found[-1] = largest, -largest
    result = only(expected, found)
    assert (result.max_abs, result.nonfinite, result.rel_l2, result.cosine) == (2 * largest, 0, 2.0, -1.0)
    expected[-1], found[-1] = INF, -INF
    result = only(expected, found)
    assert (result.max_abs, result.nonfinite, result.place, result.values) == (INF, 1, (count - 1,), ("inf", "-inf"))
    assert (result.inf.expected, result.inf.found, result.rel_l2, result.cosine) == (1, 1, 0.0, None)


def test_tolerances_of_zero_compare_numbers() -> None:
    """As in ``torch.allclose``, -0.0 is 0.0 then; without tolerances, bits count."""
    zeros = torch.zeros(2)
    assert compare_values({"w": zeros}, {"w": -zeros}, rtol=0, atol=0).all_equal
    assert not compare_values({"w": zeros}, {"w": zeros + 1e-45}, rtol=0).all_equal
    assert only(zeros, -zeros).changed == 1.0


def test_nan_is_never_equal_by_accident() -> None:
    """A NaN equals a NaN of the same bits, and differs from a number, from infinity, and from a NaN of other bits."""
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert compare_values({"w": quiet}, {"w": quiet.clone()}).equal == 1
    for value in (1.0, INF, 0.0):
        for pair in ((quiet, torch.tensor([value])), (torch.tensor([value]), quiet)):
            result = only(*pair)
            assert (result.max_abs, result.nonfinite, result.mean_abs, result.rel_l2) == (INF, 1, None, None)
    result = only(quiet, other)
    assert (result.max_abs, result.nonfinite, result.changed_elements) == (0.0, 0, 1)
    swapped = only(torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]))
    assert (swapped.nan.expected, swapped.nan.found, swapped.nonfinite) == (1, 1, 2)


def test_zero_norms() -> None:
    """The relative change of a tensor of zeros is inf, and a tensor of zeros has no direction."""
    result = only(torch.zeros(3), torch.tensor([0.0, 3.0, 4.0]))
    assert (result.rel_l2, result.cosine, result.mean_abs) == (INF, None, 7 / 3)
    result = only(torch.tensor([3.0, 4.0]), torch.zeros(2))
    assert (result.rel_l2, result.cosine) == (1.0, None)
    assert only(torch.zeros(2), -torch.zeros(2)).rel_l2 == 0.0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    """A scalar has the place (), and tensors without elements are equal."""
    expected = torch.ones(shape)
    assert compare_values({"w": expected}, {"w": expected.clone()}).equal == 1
    if expected.numel():
        assert only(expected, expected + 1).place == (0,) * len(shape)


@pytest.mark.parametrize(("dtype", "values"), [(torch.uint64, (0, 2**64 - 1)), (torch.int64, (-(2**63), 2**63 - 1))])
@pytest.mark.parametrize("count", [1, LONG])
def test_integers_are_exact(dtype: torch.dtype, values: tuple[int, int], count: int) -> None:
    """The largest difference of integers is an int, also where float64 and the dtype itself cannot hold it."""
    one, other = (np.zeros(count, str(dtype).removeprefix("torch.")) for _ in values)
    one[-1], other[-1] = values
    for pair in ((one, other), (other, one)):
        result = only(*map(torch.from_numpy, pair))
        assert (result.max_abs, result.place, result.max_ulp) == (2**64 - 1, (count - 1,), None)
    other[-1] = one[-1] + one.dtype.type(1)
    assert only(*map(torch.from_numpy, (one, other))).max_abs == 1


@pytest.mark.parametrize("code", [code for code in KNOWN if code != "F8_E8M0" and not code.startswith("U")])
@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 0.0), (0.0, 1e-3), (1e-2, 1e-3), (0.1, 0.5)])
def test_tolerances_are_those_of_torch(code: str, rtol: float, atol: float) -> None:
    """Elements with other bits are beyond where ``torch.isclose`` says so to the last digit; integers are exact."""
    pairs = [pair_of(code, 999, finite=finite) for finite in (True, False)]
    expected, found = (torch.cat(sides) for sides in zip(*pairs, strict=True))
    if code.startswith("F8"):
        close = torch.isclose(found.float(), expected.float(), rtol, atol)
    elif code.startswith(("I", "BOOL")):
        numbers = zip(expected.tolist(), found.tolist(), strict=True)
        close = torch.tensor([abs(other - one) <= atol + rtol * abs(one) for one, other in numbers])
    else:
        close = torch.isclose(found, expected, rtol, atol)
    bits = (expected.view(torch.uint8) != found.view(torch.uint8)).reshape(len(expected), -1).any(1)
    beyond = int((bits & ~close).sum())
    result = compare_values({"w": expected}, {"w": found}, rtol=rtol, atol=atol)
    (difference,) = (*result.different, *result.within)
    assert difference.beyond == beyond
    assert len(result.within) == (beyond == 0)
    assert (result.rtol, result.atol) == (rtol, atol)


@pytest.mark.parametrize("after", ["F16", "BF16", "F32", "F64", "F8_E4M3", "I32", "C64"])
@pytest.mark.parametrize("before", ["F16", "BF16", "F32", "F8_E5M2", "I64", "BOOL"])
def test_found_is_cast_as_torch_casts(before: str, after: str) -> None:
    """Tensors of two dtypes are compared in the dtype of expected; a NaN that a cast gives equals every NaN."""
    found = torch.tensor(
        [0.1, -2.0, 3.7, 0.0, 200.0, NAN if before[0] in "FB" and before != "BOOL" and after[0] != "I" else 1]
    )
    found = found.to(dtype_of(before)).repeat(700)
    expected = found.to(dtype_of(after))
    assert compare_values({"w": expected}, {"w": found}).equal == 1
    five = torch.tensor([5.0]).to(expected.dtype)
    bits = expected.clone().view(torch.uint8).reshape(len(expected), -1)
    bits[7] = five.view(torch.uint8)
    expected = bits.flatten().view(expected.dtype)
    result = only(expected, found)
    assert (result.place, result.changed_elements) == ((7,), 1)


@pytest.mark.parametrize("code", ["F32", "BF16", "F64", "I16", "C64", "F8_E5M2"])
def test_results_depend_on_neither_pieces_nor_threads(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers come out with any length of the pieces, any number of threads, and any neighbours."""
    shapes = {"a": LONG * 4, "b": 30, "c": LONG, "d": 7}
    pairs = {key: pair_of(code, count, finite=key != "c") for key, count in shapes.items()}
    expected, found = ({key: pair[side] for key, pair in pairs.items()} for side in (0, 1))
    expected["a"][: LONG * 2] = found["a"][: LONG * 2]
    wanted = compare_values(expected, found)
    assert wanted.equal == 0
    monkeypatch.setattr(reading, "_PIECE", 1)
    assert compare_values(expected, found) == wanted
    monkeypatch.setattr(reading, "_PIECE", 1 << 30)
    monkeypatch.setattr(Workers, "__init__", _with_threads(Workers.__init__, 1))
    assert compare_values(expected, found) == wanted
    for key in shapes:
        (alone,) = compare_values({key: expected[key]}, {key: found[key]}).different
        assert alone in wanted.different


def _with_threads(init: object, threads: int) -> object:
    def made(self: Workers) -> None:
        init(self, threads)  # type: ignore[operator]

    return made


@pytest.mark.skipif(not FLOAT4, reason="this torch has no float4")
def test_float4_has_two_numbers_in_a_byte() -> None:
    """The lower half of a byte is the first element."""
    one, two = (
        torch.tensor(data, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for data in ([0x21, 2], [0x21, 0x32])
    )
    result = only(one, two)
    assert (result.place, result.values, result.max_abs, result.max_ulp) == ((3,), ("0.0", "1.5"), 1.5, 3)


def test_one_file_against_another_format(tmp_path: Path) -> None:
    """A live model, a .pt and a .safetensors of the same weights are equal."""
    from safetensors.torch import save_model

    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_model(model, str(tmp_path / "a.safetensors"))
    sides: list[CheckpointLike] = [model, tmp_path / "a.pt", tmp_path / "old.pt", tmp_path / "a.safetensors"]
    for one in sides:
        for other in sides:
            assert compare_values(one, other).all_equal


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    """Keys that are one tensor on the expected side are one, unless found has two different tensors there."""
    weight = torch.ones(3)
    tied = {"a": weight, "b": weight, "c": torch.ones(2)}
    result = compare_values(tied, {"a": weight + 1, "b": weight + 1, "c": torch.ones(2)})
    assert [(one.key, one.names) for one in result.different] == [("a", ("a", "b"))]
    assert (result.compared, result.equal, result.keys) == (2, 1, ("a", "b", "c"))
    result = compare_values(tied, {"a": weight + 1, "b": weight.clone(), "c": torch.ones(2)})
    assert [(one.key, one.names) for one in result.different] == [("a", ("a",))]
    result = compare_values({"a": weight, "b": weight.clone()}, tied, ["c=d"])
    assert (result.compared, result.equal) == (2, 2)
    torch.save(tied, tmp_path / "tied.pt")
    assert compare_values(tmp_path / "tied.pt", tied).compared == 2


@pytest.mark.parametrize("is_file", [True, False])
def test_a_conjugate_view_is_another_tensor(tmp_path: Path, *, is_file: bool) -> None:
    """A conjugate view has the memory of its base and other values; two equal such views are compared once each."""
    base = torch.tensor([1 + 2j, 3 - 1j])
    sides: list[CheckpointLike] = [{"a": base, "b": base}, {"a": base, "b": base.conj()}]
    for number, side in enumerate(sides):
        torch.save(side, tmp_path / f"{number}.pt")
    if is_file:
        sides = [tmp_path / "0.pt", tmp_path / "1.pt"]
    for one, other in (sides, sides[::-1]):
        result = compare_values(one, other)
        assert (result.compared, [one.names for one in result.different]) == (2, [("b",)])
    result = compare_values(sides[1], sides[1])
    assert (result.compared, result.equal) == (2, 2)


def test_a_cast_makes_no_complex_numbers_equal_that_have_one_nan() -> None:
    """After a cast two NaNs are equal, but not a complex number with a NaN and one with the same NaN elsewhere."""
    one, same = (torch.tensor([complex(NAN, 1.0)], dtype=dtype) for dtype in (torch.complex64, torch.complex128))
    assert compare_values({"w": one}, {"w": same}).all_equal
    assert only(one, torch.tensor([complex(1.0, NAN)], dtype=torch.complex128)).changed_elements == 1
    assert only(one, torch.tensor([complex(NAN, 2.0)], dtype=torch.complex128)).changed_elements == 1


def test_a_complex_number_is_true_if_one_part_is_not_zero() -> None:
    """The cast to bool looks at both parts, as torch does."""
    found = torch.tensor([0j, 1j, -0.0 + 0j, 1, complex(0.0, NAN), 1e-320j], dtype=torch.complex128)
    assert compare_values({"w": found.to(torch.bool)}, {"w": found}).all_equal


SPLIT = {"rule": [{"from": "w", "to": ["q", "k"], "op": {"split": {"dim": 0, "sizes": [1, 3]}}}]}
WEIGHT = torch.arange(12.0).reshape(4, 3)
RULES: dict[str, tuple[RulesLike, dict[str, Tensor]]] = {
    "renamed": (["w=v"], {"v": WEIGHT}),
    "transposed": ({"rule": [{"from": "w", "to": "v", "op": "transpose"}]}, {"v": WEIGHT.T}),
    "split": (SPLIT, {"q": WEIGHT[:1], "k": WEIGHT[1:]}),
}


@pytest.mark.parametrize("name", RULES)
def test_through_rules(name: str) -> None:
    """What rules make is compared, each part of a split too."""
    rules, made = RULES[name]
    expected = {key: value.clone() for key, value in made.items()}
    assert compare_values(expected, {"w": WEIGHT}, rules).all_equal
    last = list(expected)[-1]
    expected[last][-1, -1] += 1
    (worst,) = compare_values(expected, {"w": WEIGHT}, rules).different
    assert (worst.key, worst.found.key, worst.max_abs) == (last, "w", 1.0)


def test_what_cannot_be_compared_is_told() -> None:
    """A sparse tensor is skipped with the reason, and then the sides are not called equal."""
    sparse = torch.eye(2).to_sparse()
    result = compare_values({"s": sparse, "w": torch.ones(1)}, {"s": sparse, "w": torch.ones(1)})
    assert [(one.key, one.reason) for one in result.skipped] == [("s", "a sparse tensor")]
    assert (result.compared, result.equal, result.all_equal, result.keys) == (1, 1, False, ("w",))


def test_blocks_of_gguf_are_compared_as_stored(tmp_path: Path) -> None:
    """Equal blocks are equal numbers; where blocks differ, only this is said. Another block type is not compared."""
    for name, kinds in {"a": "88", "b": "88", "c": "82"}.items():
        data = [bytes(34), bytes([name == "b"]) * (34 if kinds[1] == "8" else 18)]
        infos = [info("w", (32,), int(kinds[0])), info("v", (32,), int(kinds[1]), 64)]
        (tmp_path / f"{name}.gguf").write_bytes(gguf_file(infos, data=data[0].ljust(64, b"\0") + data[1]))
    one, other, third = (tmp_path / f"{name}.gguf" for name in "abc")
    same = compare_values(one, one)
    assert (same.all_equal, same.compared, same.as_stored) == (True, 2, ("w", "v"))
    result = compare_values(one, other, ["v=v"])
    assert [(one.key, one.rel_l2, one.changed) for one in result.different] == [("v", None, None)]
    assert result.equal == 1
    assert [(one.key, one.reason) for one in compare_values(one, third).skipped] == [("v", "a quantized tensor")]


def test_the_worst_are_first() -> None:
    """NaN and infinities are first, then the largest relative change, then the names; last what was all zero."""
    expected = {key: torch.ones(4) for key in "abcd"} | {key: torch.zeros(4) for key in "0123"}
    found = {
        "a": torch.ones(4) * 1.1,
        "b": torch.tensor([1.0, 1, 1, NAN]),
        "c": torch.ones(4) * 2,
        "d": torch.ones(4) * 2,
        "0": torch.tensor([NAN, 0, 0, 0]),
        **{str(i): torch.ones(4) * i for i in (1, 2)},
        "3": torch.ones(4) * 1,
    }
    result: ValueDiff = ckptkit.compare_values(expected, found)
    assert [one.key for one in result.different] == ["0", "b", "c", "d", "a", "2", "1", "3"]
