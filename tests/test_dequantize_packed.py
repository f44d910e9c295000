"""Packed codes are the numbers that the definition of each scheme gives, bit for bit, in blocks of any size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from ckptkit.errors import CkptkitError, FormatError, PlanError
from ckptkit.values.dequantize.model import Settings
from tests.helpers_dequantize import decoded, decoded_by_rows, dequantized, payload

GOLDEN = load_file("fixtures/packed_weights.safetensors")
Parts = dict[str, torch.Tensor]
Case = tuple[Parts, Settings, list[list[float]]]


def words(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Return random words of 32 bits."""
    return torch.from_numpy(rng.integers(-(1 << 31), 1 << 31, shape, dtype=np.int32))


def scales_of(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Return random scales in F16."""
    return torch.from_numpy(rng.uniform(0.01, 0.1, shape).astype(np.float16))


def codes_of(packed: list[int], bits: int, count: int, *, gap: bool = False) -> list[int]:
    """Return the codes in words of 32 bits by their definition: from the lowest bits, and with gaps only if asked."""
    if gap:
        return [word % (1 << 32) >> bits * place & (1 << bits) - 1 for word in packed for place in range(32 // bits)][
            :count
        ]
    number = sum(word % (1 << 32) << 32 * place for place, word in enumerate(packed))
    return [number >> bits * place & (1 << bits) - 1 for place in range(count)]


def scaled(code: int, zero: int, scale: float) -> float:
    """Return ``(code - zero) * scale`` in float32."""
    return float(np.float32(code - zero) * np.float32(scale))


def gptq(bits: int, order: str, zeros: str, inputs: int = 96) -> Case:
    """Return random parts of GPTQ, and the weight."""
    rng = np.random.default_rng(bits)
    outputs, groups = 64, 3
    parts = {"codes": words(rng, -(-inputs * bits // 32), outputs), "scales": scales_of(rng, groups, outputs)}
    index = [column * groups // inputs for column in range(inputs)]
    if order == "of activations":
        index = rng.permutation(index).tolist()
    if order != "of columns":
        parts["g_idx"] = torch.tensor(index, dtype=torch.int32)
    points = [[1 << bits - 1] * outputs] * groups
    if zeros != "symmetric":
        parts["zeros"] = words(rng, groups, outputs * bits // 32)
        if zeros == "v1":  # a field of all ones would carry into the next one
            parts["zeros"] &= (1 << 31) - 1 - sum(1 << place for place in range(0, 31, bits)) if bits != 3 else 0
        added = int(zeros == "v1")
        points = [[code + added for code in codes_of(row, bits, outputs)] for row in parts["zeros"].tolist()]
    scales = parts["scales"].tolist()
    weight = []
    for output, column in enumerate(parts["codes"].T.tolist()):
        codes = codes_of(column, bits, inputs)
        weight.append(
            [scaled(code, points[g][output], scales[g][output]) for code, g in zip(codes, index, strict=True)]
        )
    return parts, {"bits": bits, "zeros": zeros}, weight


def awq() -> Case:
    """Return random parts of AWQ, and the weight."""
    rng = np.random.default_rng(0)
    inputs, outputs, groups = 24, 40, 3
    parts = {"codes": words(rng, inputs, outputs // 8), "zeros": words(rng, groups, outputs // 8)}
    parts["scales"] = scales_of(rng, groups, outputs)
    places = (0, 4, 1, 5, 2, 6, 3, 7)
    codes, zeros = (
        [[codes_of([row[j // 8]], 4, 8)[places[j % 8]] for j in range(outputs)] for row in parts[name].tolist()]
        for name in ("codes", "zeros")
    )
    scales = parts["scales"].tolist()
    weight = [
        [scaled(codes[i][j], zeros[i * groups // inputs][j], scales[i * groups // inputs][j]) for i in range(inputs)]
        for j in range(outputs)
    ]
    return parts, {}, weight


def rows(bits: int, form: str) -> Case:
    """Return random parts of packed rows, and the weight."""
    rng = np.random.default_rng(bits)
    gap, height, columns, groups = form == "with gaps", 5, 42, 3
    each = 32 // bits
    width, high = (-(-n // each) if gap else -(-n * bits // 32) for n in (columns, height))
    parts = {"codes": words(rng, height, width), "scales": scales_of(rng, height, groups)}
    index = [column * groups // columns for column in range(columns)]
    if form == "of activations":
        index = rng.permutation(index).tolist()
        parts["g_idx"] = torch.tensor(index, dtype=torch.int32)
    points = [[1 << bits - 1] * groups] * height
    if form != "symmetric":
        parts["zeros"] = words(rng, high, groups)
        columns_of_zeros = [codes_of(column, bits, height, gap=gap) for column in parts["zeros"].T.tolist()]
        points = [list(row) for row in zip(*columns_of_zeros, strict=True)]
    scales = parts["scales"].tolist()
    weight = [
        [
            scaled(code, points[r][g], scales[r][g])
            for code, g in zip(codes_of(row, bits, columns, gap=gap), index, strict=True)
        ]
        for r, row in enumerate(parts["codes"].tolist())
    ]
    return parts, {"bits": bits, "shape": (height, columns), "dense": not gap}, weight


def four_bits(shape: tuple[int, ...], *, nested: bool) -> Case:
    """Return random parts of a weight with a book, and the weight."""
    rng = np.random.default_rng(0)
    count = int(np.prod(shape))
    blocks = -(-count // 32)
    parts = {
        "codes": torch.from_numpy(rng.integers(0, 256, (-(-count // 2), 1), dtype=np.uint8)),
        "quant_map": torch.from_numpy(rng.uniform(-1, 1, 16).astype(np.float32)),
        "absmax": torch.from_numpy(rng.uniform(0, 1, blocks).astype(np.float32)),
    }
    settings: dict[str, int | float | tuple[int, ...]] = {"shape": shape, "blocksize": 32}
    scales = list(parts["absmax"].numpy())
    if nested:
        parts["absmax"] = torch.from_numpy(rng.integers(0, 256, blocks, dtype=np.uint8))
        parts["nested_quant_map"] = torch.from_numpy(rng.uniform(-1, 1, 256).astype(np.float32))
        parts["nested_absmax"] = torch.from_numpy(rng.uniform(0, 1, -(-blocks // 4)).astype(np.float32))
        settings |= {"nested_blocksize": 4, "nested_offset": 0.25}
        book, outer = parts["nested_quant_map"].numpy(), parts["nested_absmax"].numpy()
        scales = [book[code] * outer[at // 4] + np.float32(0.25) for at, code in enumerate(parts["absmax"].tolist())]
    packed = parts["codes"].reshape(-1).tolist()
    book = parts["quant_map"].numpy()
    numbers = [book[packed[at // 2] >> (0 if at % 2 else 4) & 15] * scales[at // 32] for at in range(count)]
    return parts, settings, np.array(numbers, np.float32).reshape(shape).tolist()


def int4() -> Case:
    """Return random parts of ``Int4Tensor`` of torchao, and the weight: signed codes times scales plus offsets."""
    rng = np.random.default_rng(4)
    rows, groups, size = 5, 3, 16
    parts = {
        "codes": torch.from_numpy(rng.integers(-128, 128, (rows, groups * size // 2), dtype=np.int8)),
        "scales": scales_of(rng, groups, rows),
        "zeros": torch.from_numpy(rng.standard_normal((groups, rows)).astype(np.float16)),
    }
    scales, offsets = parts["scales"].tolist(), parts["zeros"].tolist()
    weight = []
    for r, row in enumerate(parts["codes"].tolist()):
        codes = [(half + 8) % 16 - 8 for byte in row for half in (byte % 16, byte % 256 // 16)]
        groups_of = [(c // size, code) for c, code in enumerate(codes)]
        weight.append([float(np.float32(scaled(code, 0, scales[g][r])) + np.float32(offsets[g][r]))
                       for g, code in groups_of])  # fmt: skip
    return parts, {"form": "int4", "group_size": size}, weight


def float6(kind: str) -> Case:
    """Return random parts of an MX tensor of 6-bit floats, and the weight by the definition of these floats."""
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 64, (4, 64), dtype=np.uint8)
    exponents = rng.integers(118, 130, (4, 2), dtype=np.uint8)
    mantissa, bias = (3, 1) if kind == "e2m3" else (2, 3)

    def number(code: int) -> float:
        exponent, fraction = code % 32 >> mantissa, code % (1 << mantissa) / (1 << mantissa)
        size = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        return -size if code >= 32 else size

    weight = [
        [number(code) * 2.0 ** (exponents[r][c // 32].item() - 127) for c, code in enumerate(row)]
        for r, row in enumerate(codes.tolist())
    ]
    parts = {"codes": torch.from_numpy(codes), "scales": torch.from_numpy(exponents)}
    return parts, {"form": "mxfp6", "kind": kind, "group_size": 32}, weight


CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    **{
        f"GPTQ of {bits} bits, {zeros}, in the order {order}": ("gptq", partial(gptq, bits, order, zeros))
        for bits, order, zeros in [
            (2, "of columns", "v2"), (3, "of activations", "v2"), (4, "of activations", "v1"),
            (4, "of columns", "symmetric"),
            (8, "of groups", "v1"), (3, "of columns", "v1"),
        ]
    },
    "AWQ": ("awq", awq),
    "int4 of torchao": ("torchao", int4),
    "mxfp6, E2M3": ("torchao", partial(float6, "e2m3")),
    "mxfp6, E3M2": ("torchao", partial(float6, "e3m2")),
    **{
        f"rows of {bits} bits, {form}": ("packed rows", partial(rows, bits, form))
        for bits, form in [
            (1, "symmetric"), (2, "asymmetric"), (3, "asymmetric"), (3, "with gaps"), (4, "of activations"),
            (5, "symmetric"),
            (6, "with gaps"), (7, "asymmetric"), (8, "asymmetric"),
        ]
    },
    **{
        f"a book, {list(shape)}{', nested' * nested}": ("bitsandbytes 4bit", partial(four_bits, shape, nested=nested))
        for shape in [(8, 64), (7, 33), (3, 5, 10), (1,), (41, 3)]
        for nested in (False, True)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_packed_codes_are_the_numbers_of_their_definition(name: str) -> None:
    """Whole and in blocks of rows, the bits are those of arithmetic in float32, number by number."""
    family, make = CASES[name]
    parts, settings, expected = make()
    weight = torch.tensor(expected, dtype=torch.float32)
    assert torch.equal(decoded(family, parts, settings=settings), weight)
    for count in (1, 3):
        assert torch.equal(decoded_by_rows(family, parts, settings, count), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", ["v1", "v2"])
def test_gptq_is_what_gptqmodel_computes(bits: int, zeros: str) -> None:
    """GPTQModel packed these weights, and multiplied in F16: so both are equal after one rounding."""
    found = {name.partition(".")[2]: part for name, part in GOLDEN.items() if name.startswith(f"gptq{bits}.")}
    parts = {"codes": found["qweight"], "scales": found["scales"], "zeros": found[zeros], "g_idx": found["g_idx"]}
    weight = decoded("gptq", parts, torch.float16, {"bits": bits, "zeros": zeros})
    assert torch.equal(weight, found["weight"])


def test_awq_is_what_gptqmodel_computes() -> None:
    """GPTQModel packed these weights too."""
    parts = {"codes": GOLDEN["awq.qweight"], "scales": GOLDEN["awq.scales"], "zeros": GOLDEN["awq.qzeros"]}
    assert torch.equal(decoded("awq", parts, torch.float16), GOLDEN["awq.weight"])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_is_what_mlx_computes(bits: int, tmp_path: Path) -> None:
    """A configuration can name the bits of one layer. In F16, MLX also rounds the product before it adds the bias."""
    arrays = {f"a.{name}": GOLDEN[f"mlx{bits}.{name}"].numpy() for name in ("weight", "scales", "biases")}
    arrays["a.weight"] = arrays["a.weight"].view(np.uint32)
    path = write(
        tmp_path, {}, {"quant_method": "mlx", "group_size": 32, "bits": 7, "a": {"group_size": 32, "bits": bits}}
    )
    save_arrays(arrays, path)
    assert torch.equal(dequantized(path)["a.weight"], GOLDEN[f"mlx{bits}.expected"])


def state(value: object) -> torch.Tensor:
    """Return the quant_state that bitsandbytes writes of a value."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def nf4() -> Parts:
    """Return the tensors of a weight of 5 rows and 7 columns."""
    parts, _, _ = four_bits((5, 7), nested=False)
    ready = {"w": parts["codes"], "w.absmax": parts["absmax"], "w.quant_map": parts["quant_map"]}
    return {**ready, "w.quant_state.bitsandbytes__nf4": state({"shape": [5, 7], "blocksize": 32, "dtype": "bfloat16"})}


def named(parts: Parts, **names: str) -> Parts:
    """Return the parts under the names that a file has."""
    return {f"w.{name}": parts[role] for role, name in names.items() if role in parts}


def gptq_file() -> Parts:
    """Return the tensors of GPTQ of 4 bits with g_idx and zero points."""
    return named(gptq(4, "of activations", "v2")[0], codes="qweight", scales="scales", zeros="qzeros", g_idx="g_idx")


def columns_file() -> Parts:
    """Return the tensors of GPTQ of 4 bits without g_idx."""
    return {key: part for key, part in gptq_file().items() if not key.endswith("g_idx")}


def rows_file() -> Parts:
    """Return the tensors of packed rows of 4 bits."""
    parts = rows(4, "asymmetric")[0]
    shape = {"w.weight_shape": torch.tensor([5, 42])}
    return named(parts, codes="weight_packed", scales="weight_scale", zeros="weight_zero_point") | shape


def scaled_file() -> Parts:
    """Return the tensors of int8 of compressed-tensors."""
    return {"w.weight": torch.ones(4, 6, dtype=torch.int8), "w.weight_scale": torch.ones(4, 1)}


def int8_file() -> Parts:
    """Return the tensors of int8 of bitsandbytes."""
    return {
        "w.weight": torch.ones(4, 6, dtype=torch.int8),
        "w.SCB": torch.ones(4),
        "w.weight_format": torch.tensor(0).byte(),
    }


NAN = float("nan")
STATE = "w.quant_state.bitsandbytes__nf4"
BROKEN: dict[str, tuple[Callable[[], Parts], Parts, str]] = {
    "scales of blocks too few": (nf4, {"w.absmax": torch.ones(1)}, "'w.absmax' is F32 [1], and must have 2 elements"),
    "a scale that is NaN": (nf4, {"w.absmax": torch.tensor([1, NAN])}, "'w.absmax' has 1 of 2 values that are NaN"),
    "a book too short": (nf4, {"w.quant_map": torch.ones(15)}, "'w.quant_map' is F32 [15], and must be [16]"),
    "codes too few": (nf4, {"w": torch.zeros(17, 1, dtype=torch.uint8)}, "35 codes of a weight of [5, 7] are 18 bytes"),
    "no JSON": (nf4, {STATE: torch.zeros(3, dtype=torch.uint8)}, f"'{STATE}' is not valid JSON"),
    "no shape": (nf4, {STATE: state({"blocksize": 32})}, f"'{STATE}' has a shape of None"),
    "a bad blocksize": (nf4, {STATE: state({"shape": [5, 7], "blocksize": "9"})}, f"'{STATE}' has a blocksize of 9"),
    "a group that is not there": (gptq_file, {"w.g_idx": torch.full((96,), 3).int()}, "'w.g_idx' has 96 of 96 values"),
    "few zero points": (gptq_file, {"w.qzeros": torch.zeros(3, 7).int()}, "4 bits, as the configuration says, do not"),
    "scales of other columns": (rows_file, {"w.weight_scale": torch.ones(5, 4)}, "says which columns of [5, 42]"),
    "a shape of other codes": (rows_file, {"w.weight_shape": torch.tensor([5, 4000])}, "no way of packing codes"),
    "a negative shape": (rows_file, {"w.weight_shape": torch.tensor([5, -4])}, "has the values [5, -4]"),
    "zero points of other rows": (rows_file, {"w.weight_zero_point": torch.zeros(2, 3).int()}, "and must be [1, 3]"),
    "scales of other rows": (int8_file, {"w.SCB": torch.ones(3)}, "'w.SCB' is F32 [3], and must have 4 elements"),
    "odd groups": (
        columns_file,
        {"w.qzeros": torch.zeros(5, 8).int(), "w.scales": torch.ones(5, 64)},
        "nothing says which of 96 columns a group has",
    ),
    "much too large a state": (nf4, {STATE: torch.zeros(70_000, dtype=torch.uint8)}, "too large to describe a weight"),
    "an unknown layout": (int8_file, {"w.weight_format": torch.tensor(9).byte()}, "'w.weight_format' is 9"),
}  # fmt: skip
CONFIGS = {
    gptq_file: {"quant_method": "gptq", "bits": 4},
    columns_file: {"quant_method": "gptq", "bits": 4},
    rows_file: {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4}}}},
}


def write(folder: Path, tensors: Parts, section: object) -> Path:
    """Write a file, and a configuration beside it."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if section is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    return folder / "model.safetensors"


@pytest.mark.parametrize("name", BROKEN)
def test_broken_parts_are_errors_that_name_the_tensor(name: str, tmp_path: Path) -> None:
    """Whether the header shows it or only the values, one line names the weight, the part and the reason."""
    make, broken, text = BROKEN[name]
    path = write(tmp_path, make() | broken, CONFIGS.get(make))
    with pytest.raises(FormatError) as caught:
        dequantized(path)
    assert text in str(caught.value)
    assert "'w" in str(caught.value)


FORMS: dict[str, tuple[Callable[[], Parts], Parts, object, str]] = {
    "a layout of a GPU": (int8_file, {"w.weight_format": torch.tensor(2).byte()}, None, "in the layout col_turing"),
    "Marlin": (gptq_file, {}, {"quant_method": "gptq", "checkpoint_format": "marlin"}, "in the layout marlin"),
    "planes": (gptq_file, {}, {"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_p"}, "in planes of bits"),
    "scaled inputs": (scaled_file, {"w.pre_quant_scale": torch.ones(6)}, None, "multiplied by 'w.pre_quant_scale'"),
    "another method": (gptq_file, {}, {"quant_method": "other", "bits": 4}, "zero points of the method other"),
    "no configuration": (gptq_file, {}, None, "without a configuration that says what its zero points mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_are_not_decoded_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Nothing is guessed."""
    make, changed, section, text = FORMS[name]
    with pytest.raises(PlanError) as caught:
        dequantized(write(tmp_path, make() | changed, section))
    assert text in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_decoded_as_its_configuration_says(bits: int, form: str | None, tmp_path: Path) -> None:
    """The format says whether 1 was subtracted from zero points. Shapes say how many bits, if nothing else does."""
    found = {name.partition(".")[2]: part for name, part in GOLDEN.items() if name.startswith(f"gptq{bits}.")}
    tensors = {f"a.{name}": found[name] for name in ("qweight", "scales", "g_idx")}
    section = {"quant_method": "gptq", "desc_act": True} | ({"checkpoint_format": form} if form else {"bits": bits})
    tensors["a.qzeros"] = found["v2" if form == "gptq_v2" else "v1"]
    weights = dequantized(write(tmp_path, tensors, section), "F16")
    assert list(weights) == ["a.weight"]
    assert torch.equal(weights["a.weight"], found["weight"])


@pytest.mark.parametrize(
    ("packing", "zeros"), [("auto_round:auto_gptq", "v1"), ("auto_round", "v2"), ("auto_round:gptqmodel", "v2")]
)
def test_zero_points_of_auto_round_are_those_of_its_packing_format(packing: str, zeros: str, tmp_path: Path) -> None:
    """Asymmetric codes are decoded where the format says whether 1 was subtracted, and refused where it does not."""
    found = {name.partition(".")[2]: part for name, part in GOLDEN.items() if name.startswith("gptq4.")}
    tensors = {f"a.{name}": found[name] for name in ("qweight", "scales", "g_idx")} | {"a.qzeros": found[zeros]}
    section = {"quant_method": "auto-round", "bits": 4, "sym": False, "packing_format": packing}
    assert torch.equal(dequantized(write(tmp_path, tensors, section), "F16")["a.weight"], found["weight"])
    with pytest.raises(PlanError, match=r"AutoRound \(packing_format auto_round:other\) that are not symmetric"):
        dequantized(write(tmp_path, tensors, section | {"packing_format": "auto_round:other"}))


def test_a_code_of_more_than_six_bits_is_an_error() -> None:
    """No 6-bit float has it; the line names the part."""
    parts, settings, _ = float6("e2m3")
    parts["codes"][1, 3] = 64
    with pytest.raises(FormatError, match="codes in a block that are above 63"):
        decoded("torchao", parts, settings=settings)


def test_symmetric_zero_points_need_no_configuration(tmp_path: Path) -> None:
    """Zero points that are all in the middle of the range are those of symmetric codes, in both forms."""
    parts = gptq(4, "of activations", "symmetric")
    tensors = named(parts[0], codes="qweight", scales="scales", g_idx="g_idx")
    for code in (0x77777777, -0x77777778):
        tensors["w.qzeros"] = torch.full((3, 8), code, dtype=torch.int32)
        assert torch.equal(dequantized(write(tmp_path, tensors, None))["w.weight"], torch.tensor(parts[2]))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    """A weight without its book is not decoded."""
    tensors = nf4()
    del tensors["w.quant_map"]
    with pytest.raises(CkptkitError, match=r"'w' cannot be dequantised: it lacks 'w\.quant_map'"):
        dequantized(write(tmp_path, tensors, None))


def test_only_the_weights_that_were_read_last_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are read whole are forgotten after some other weights, and read again with the same result."""
    monkeypatch.setattr("ckptkit.values.dequantize.payload._MOST_HELD", 0)
    parts, settings, _ = gptq(4, "of activations", "v2")
    several = [payload("gptq", parts, settings=settings) for _ in range(4)]
    read = [b"".join(map(bytes, one.chunks())) for one in several]
    assert [one._held.made is None for one in several] == [True, True, False, False]
    assert b"".join(map(bytes, several[0].chunks())) == read[0] == read[3]


def long_rows() -> dict[str, tuple[str, Parts, Any]]:
    """Return the parts of weights with rows of 10,080 numbers, of schemes that pack several codes in a byte."""
    rng = np.random.default_rng(7)
    columns, groups = 10_080, 105
    index = torch.from_numpy(rng.integers(0, groups, columns, dtype=np.int32))
    packed = {"scales": scales_of(rng, 2, groups), "zeros": words(rng, 1, groups)}
    halves = {"scales": scales_of(rng, 2, groups), "biases": scales_of(rng, 2, groups)}
    points = {"scales": scales_of(rng, 2 * groups), "zeros": scales_of(rng, 2 * groups)}
    integers = torch.from_numpy(rng.integers(-128, 128, (2, columns), dtype=np.int8))
    scales = tuple(map(float, range(1, columns + 1)))
    shape: dict[str, Any] = {"shape": (2, columns), "dense": True}
    return {
        "rows of 3 bits": ("packed rows", packed | {"codes": words(rng, 2, 945)}, shape | {"bits": 3}),
        "rows of 4 bits in the order of activations": (
            "packed rows", packed | {"codes": words(rng, 2, 1260), "g_idx": index}, shape | {"bits": 4},
        ),
        "MLX": ("mlx", halves | {"codes": words(rng, 2, 1575).view(torch.uint32)}, {"bits": 5, "group_size": 96}),
        "floats of 4 bits": (
            "torchao", {"codes": torch.from_numpy(rng.integers(0, 256, (2, columns // 2), dtype=np.uint8)),
                        "scales": torch.from_numpy(rng.integers(110, 140, (2, columns // 32), dtype=np.uint8))},
            {"form": "mxfp4"},
        ),
        "HQQ": (
            "hqq", points | {"codes": torch.from_numpy(rng.integers(0, 256, (columns, 1), dtype=np.uint8))},
            {"shape": (2, columns), "packing": "4bit_u8", "axis": 1, "dtype": "float16"},
        ),
        "torch": (
            "affine", {"codes": torch._make_per_tensor_quantized_tensor(integers, 1.0, 0)},
            {"scales": scales, "zeros": (3,) * columns, "axis": 1},
        ),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "name", ["rows of 3 bits", "rows of 4 bits in the order of activations", "MLX", "floats of 4 bits", "HQQ", "torch"]
)
def test_a_long_row_of_packed_codes_is_decoded_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is as long as a row, and the numbers are those of whole rows, also if a part ends within a byte."""
    family, parts, settings = long_rows()[name]
    whole = decoded(family, parts, settings=settings)
    monkeypatch.setattr("ckptkit.values.dequantize.payload.PIECE", 4096)
    made = payload(family, parts, settings=settings)
    pieces = [bytes(piece) for piece in made.chunks()]
    assert [len(piece) // 4 for piece in pieces] == [4096, 4096, 1888] * 2
    assert b"".join(pieces) == whole.numpy().tobytes()
    part = bytearray(4 * 3000)
    made.read_range(4 * 13_001, memoryview(part))
    assert bytes(part) == whole.flatten()[13_001:16_001].numpy().tobytes()
