"""Codes and companions are recognised as one quantised weight, and ordinary tensors never are.

The tensors are built by hand with the names, dtypes and shapes that each library writes; the libraries themselves need
no installation.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ckptkit import diff, open_checkpoint, run_checks, stats
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import FormatError
from ckptkit.quantized import ANCHOR_DTYPES, Quantized, quantized_weights
from ckptkit.quantized.configuration import Configuration, read_configuration
from ckptkit.quantized.table import SCHEMES
from tests.helpers_cli import run_ckpt
from tests.helpers_gguf import gguf_file, info

State = dict[str, Tensor]

F8 = torch.float8_e4m3fn
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # older versions of torch keep the exponents as integers
I8, U8, I32, I64 = torch.int8, torch.uint8, torch.int32, torch.int64
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor of this dtype and shape."""
    return torch.zeros(shape).to(dtype)  # not every torch can fill a tensor of float8


def found_in(state: State) -> Quantized:
    """Return the quantised weights in a state_dict."""
    return quantized_weights(as_checkpoint(state, "found"))


def saved(directory: Path, state: State, config: object = None, name: str = "config.json") -> Quantized:
    """Return the quantised weights of a file in a directory with a configuration file."""
    path = directory / "model.safetensors"
    save_file(state, path)
    if config is not None:
        (directory / name).write_text(json.dumps(config))
    with open_checkpoint(path) as checkpoint:
        return quantized_weights(checkpoint)


def _bitsandbytes(kind: str, dtype: torch.dtype = U8, *, nested: bool = True) -> State:
    described = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]}
    described |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0} if nested else {}
    state = {
        "weight": of(dtype, 4096 // dtype.itemsize, 1),
        "weight.absmax": of(U8 if nested else F32, 128),
        "weight.quant_map": of(F32, 16),
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(described).encode()), dtype=U8),
    }
    return state | ({"weight.nested_absmax": of(F32, 1), "weight.nested_quant_map": of(F32, 256)} if nested else {})


QUANTIZED: dict[str, tuple[str, State]] = {
    "fp8, blocks": ("fp8", {"weight": of(F8, 256, 256), "weight_scale_inv": of(F32, 2, 2)}),
    "fp8, exponents": ("fp8", {"weight": of(F8, 256, 256), "weight_scale_inv": of(E8M0, 2, 2)}),
    "fp8, input": ("fp8", {"weight": of(F8, 8, 8), "weight_scale": of(F32, 1), "input_scale": of(F32, 1)}),
    "fp8, rows": ("fp8", {"weight": of(torch.float8_e5m2, 8, 4), "weight_scale": of(BF16, 8, 1)}),
    "fp8, DeepSeek's own names": ("fp8", {"weight": of(F8, 256, 256), "scale": of(F32, 2, 2)}),
    "fp8, ComfyUI": ("fp8 (ComfyUI)", {"weight": of(F8, 8, 8), "scale_weight": of(F32), "scale_input": of(F32)}),
    "fp8, Mistral": ("fp8 (Mistral)", {"weight": of(F8, 8, 8), "qscale_weight": of(BF16), "qscale_act": of(BF16)}),
    "nvfp4, modelopt": (
        "nvfp4",
        {"weight": of(U8, 8, 16), "weight_scale": of(F8, 8, 2), "weight_scale_2": of(F32), "input_scale": of(F32)},
    ),
    "nvfp4, compressed-tensors": (
        "nvfp4 (compressed-tensors)",
        {"weight_packed": of(U8, 8, 16), "weight_scale": of(F8, 8, 2), "weight_global_scale": of(F32, 1)},
    ),
    "mxfp4, compressed-tensors": (
        "mxfp4 (compressed-tensors)", {"weight_packed": of(U8, 8, 16), "weight_scale": of(U8, 8, 1)},
    ),
    "mxfp4, other libraries": ("mxfp4", {"weight": of(U8, 8, 16), "weight_scale": of(U8, 8, 1)}),
    "pack-quantized": (
        "int (compressed-tensors)",
        {"weight_packed": of(I32, 8, 4), "weight_scale": of(BF16, 8, 1), "weight_shape": of(I64, 2)},
    ),
    "pack-quantized, all parts": (
        "int (compressed-tensors)",
        {"weight_packed": of(I32, 8, 4), "weight_scale": of(BF16, 8, 2), "weight_shape": of(I64, 2),
         "weight_zero_point": of(I32, 1, 2), "weight_g_idx": of(I32, 32)},
    ),
    "int8": ("int8", {"weight": of(I8, 8, 4), "weight_scale": of(BF16, 8, 1), "weight_zero_point": of(I8, 8, 1)}),
    "bitsandbytes nf4": ("bitsandbytes nf4", _bitsandbytes("nf4")),
    "bitsandbytes fp4": ("bitsandbytes fp4", _bitsandbytes("fp4", nested=False)),
    "bitsandbytes, codes in BF16": ("bitsandbytes nf4", _bitsandbytes("nf4", BF16)),
    "bitsandbytes int8": ("bitsandbytes int8", {"weight": of(I8, 8, 4), "SCB": of(F32, 8), "weight_format": of(U8)}),
    "GPTQ": (
        "GPTQ int4",
        {"qweight": of(I32, 16, 64), "qzeros": of(I32, 1, 8), "scales": of(F16, 1, 64), "g_idx": of(I32, 128)},
    ),
    "GPTQ without g_idx": (
        "GPTQ int4", {"qweight": of(I32, 16, 64), "qzeros": of(I32, 1, 8), "scales": of(F16, 1, 64)},
    ),
    "AWQ": ("AWQ", {"qweight": of(I32, 128, 8), "qzeros": of(I32, 1, 8), "scales": of(F16, 1, 64)}),
    "HQQ": (
        "HQQ",
        {"W_q": of(U8, 64, 64), "scale": of(F16, 128, 1), "zero": of(F16, 128, 1), "nbits": of(I32), "axis": of(I32)},
    ),
    "EETQ": ("EETQ", {"weight": of(I8, 8, 4), "weight_scales": of(F16, 4)}),
    "quanto int8": (
        "quanto",
        {"weight._data": of(I8, 8, 4), "weight._scale": of(F32, 8, 1), "input_scale": of(F32), "output_scale": of(F32)},
    ),
    "quanto int4": (
        "quanto", {"weight._data._data": of(U8, 4, 4), "weight._scale": of(F32, 8, 1), "weight._shift": of(F32, 8, 1)},
    ),
    "torchao": (
        "torchao",
        {"_weight_qdata": of(I8, 8, 4), "_weight_scale": of(F32, 8, 1), "_weight_zero_point": of(I8, 8, 1)},
    ),
    "torchao, older names": ("torchao float8", {"weight:qdata": of(F8, 8, 4), "weight:scale": of(F32, 8, 1)}),
    "AQLM": ("AQLM", {"codes": of(I8, 8, 4, 2), "codebooks": of(F16, 2, 256, 1, 8), "scales": of(F16, 8, 1, 1, 1)}),
    "MLX": ("MLX", {"weight": of(torch.uint32, 8, 4), "scales": of(BF16, 8, 1), "biases": of(BF16, 8, 1)}),
    "fp8, TensorRT-LLM": (
        "fp8 (TensorRT-LLM)",
        {"weight": of(F8, 8, 8), "weights_scaling_factor": of(F32, 1), "activation_scaling_factor": of(F32, 1)},
    ),
    "fp8, the bound of inputs": (
        "fp8", {"weight": of(F8, 8, 8), "weight_scale": of(F32, 8, 1), "input_scale_ub": of(F32, 1)},
    ),
    "int8, TensorRT-LLM": ("int8", {"weight": of(I8, 8, 4), "per_channel_scale": of(F16, 4)}),
    "int8, gpt-fast": ("int8", {"weight": of(I8, 8, 4), "scales": of(BF16, 8)}),
    "int4, gpt-fast": (
        "int4 (tinygemm)", {"weight": of(I32, 8, 4, 32, 4), "scales_and_zeros": of(BF16, 2, 64, 2)},
    ),
    "sparse": (
        "sparse (compressed-tensors)",
        {"weight.compressed": of(BF16, 64), "weight.bitmask": of(U8, 16, 1), "weight.shape": of(I64, 2),
         "weight.row_offsets": of(I64, 16)},
    ),
    "sparse fp8": (
        "sparse (compressed-tensors)",
        {"compressed": of(F8, 8, 4), "bitmask": of(U8, 8, 1), "shape": of(I64, 2), "weight_scale": of(F32, 1)},
    ),
    "GPTQ, symmetric": ("GPTQ", {"qweight": of(I32, 16, 64), "scales": of(F16, 1, 64), "g_idx": of(I32, 128)}),
    "Marlin": ("GPTQ (Marlin)", {"B": of(I32, 8, 128), "s": of(F16, 1, 64), "workspace": of(I32, 16)}),
    "HQQ, codes in BF16": (
        "HQQ", {"W_q": of(BF16, 64, 64), "scale": of(F16, 128, 1), "zero": of(F16, 128, 1), "nbits": of(I32)},
    ),
    "SVDQuant, int4": ("SVDQuant", {"qweight": of(I32, 16, 32), "wscales": of(BF16, 1, 64), "wzeros": of(BF16, 1, 64)}),
    "SVDQuant": (
        "SVDQuant",
        {"qweight": of(I8, 8, 4), "wscales": of(BF16, 1, 8), "smooth_factor": of(BF16, 8), "proj_up": of(BF16, 8, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "parts"), QUANTIZED.values(), ids=QUANTIZED)
def test_parts_are_one_weight(scheme: str, parts: State) -> None:
    """The parts of a scheme are one weight, named like the weight, and other tensors are not part of the weight."""
    others = {"norm.weight": of(F32, 8), "layers.0.q.bias": of(F32, 8), "layers.1.q.weight": of(BF16, 8, 8)}
    state = others | {f"layers.0.q.{name}": tensor for name, tensor in parts.items()}
    quantized = found_in(state)
    (weight,) = quantized.weights
    assert (weight.key, weight.scheme, weight.missing) == ("layers.0.q.weight", scheme, ())
    assert weight.parts == tuple(key for key in state if key not in others)
    assert weight.coded in weight.parts
    assert quantized.by_key == dict.fromkeys(weight.parts, weight)


def test_experts_of_a_layer_can_be_one_tensor() -> None:
    """Fused experts have other names: the scale follows the name of the parameter."""
    state = {
        "experts.gate_up_proj": of(F8, 2, 256, 256), "experts.gate_up_proj_scale_inv": of(F32, 2, 2, 2),
        "experts.down_proj_blocks": of(U8, 2, 8, 4, 16), "experts.down_proj_scales": of(U8, 2, 8, 4),
        "experts.down_proj_bias": of(BF16, 2, 8),
        "mlp.mlp1_weight.blocks": of(U8, 2, 8, 4, 16), "mlp.mlp1_weight.scales": of(U8, 2, 8, 4),
        "moe.up": of(U8, 2, 64, 8), "moe.up_weight_scale": of(F8, 2, 64, 1), "moe.up_weight_scale_2": of(F32, 2),
    }  # fmt: skip
    assert [(weight.key, weight.scheme, len(weight.parts)) for weight in found_in(state).weights] == [
        ("experts.gate_up_proj", "fp8", 2),
        ("experts.down_proj", "mxfp4", 2),
        ("mlp.mlp1_weight", "mxfp4", 2),
        ("moe.up", "nvfp4", 3),
    ]


def test_keys_at_the_root_have_no_module() -> None:
    """The parts of a single layer, without a module name before them, are found too."""
    assert [weight.key for weight in found_in(QUANTIZED["GPTQ"][1]).weights] == ["weight"]


ORDINARY: dict[str, State] = {
    "a parameter named like a scale": {"weight": of(F32, 8, 8), "weight_scale": of(F32, 1), "input_scale": of(F32, 1)},
    "fp8 with a learned scale": {"weight": of(F8, 8, 8), "scale": of(BF16, 8)},
    "bfloat16 with a scale": {"weight": of(BF16, 8, 8), "weight_scale_inv": of(F32, 1, 1), "scale": of(BF16, 8)},
    "fp8 without scales": {"weight": of(F8, 8, 8), "bias": of(BF16, 8), "norm": of(F8, 8)},
    "learned tensors named like GPTQ": {"qweight": of(F32, 8, 8), "qzeros": of(F32, 8), "scales": of(F32, 8)},
    "integers named like scales": {"scales": of(I32, 4), "codes": of(I64, 8), "zero_point": of(I64, 1)},
    "integer buffers": {"weight": of(I64, 8, 8), "index": of(I32, 4), "mask": of(U8, 8, 8), "count": of(I64)},
    "integers that have only a bias": {"weight": of(I8, 8, 8), "bias": of(F32, 8)},
    "parts of two modules": {"qweight": of(I32, 16, 64), "k.scales": of(F16, 1, 64), "k.qzeros": of(I32, 1, 8)},
    "a vector quantiser": {"codebooks": of(F32, 2, 256, 8), "codes": of(F32, 8, 4), "scales": of(F32, 8)},
    "bytes in blocks": {"pos_blocks": of(U8, 8, 4), "pos_scales": of(U8, 8), "m.blocks": of(U8, 8), "m.scales": of(U8)},
    "fp8 vectors with a scale": {"logit": of(F8, 1), "logit_scale": of(F32, 1), "gamma": of(F8, 8)},
    "indices of a vector quantiser": {"indices": of(I32, 8), "centroids.weight": of(F32, 16, 4)},
    "indices beside a scale": {"relative_position_index": of(I32, 9, 9), "weight": of(I32, 9), "scale": of(F32, 9)},
    "a learned scale of a norm": {"weight": of(F32, 8), "scale": of(F32, 8), "zero": of(F32, 8)},
}  # fmt: skip


@pytest.mark.parametrize("state", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_tensors_are_not_quantised(state: State) -> None:
    """A name alone makes no companion, and a dtype alone makes no codes."""
    assert not found_in({f"layers.0.q.{name}": tensor for name, tensor in state.items()})


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {},
    "ignore": ["lm_head", "re:.*gate$"],
}  # fmt: skip
GPTQ = {key: tensor for key, tensor in QUANTIZED["GPTQ"][1].items() if key != "g_idx"}
CODES = of(F8, 256, 256)

CONFIGURED: dict[str, tuple[State, object, str, list[tuple[str, str, tuple[str, ...]]]]] = {
    "the method names the library": (
        {"q.weight": of(F8, 8, 8), "q.weight_scale": of(F32, 1)}, {"quantization_config": COMPRESSED}, "config.json",
        [("q.weight", "fp8 (compressed-tensors)", ())],
    ),
    "in the configuration of the text model": (
        {"q.weight": of(F8, 8, 8), "q.weight_scale": of(F32, 1)},
        {"text_config": {"quantization_config": COMPRESSED}}, "config.json",
        [("q.weight", "fp8 (compressed-tensors)", ())],
    ),
    "modelopt's own file": (
        {"q.weight": of(F8, 8, 8), "q.weight_scale": of(F32)},
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head*"]}},
        "hf_quant_config.json", [("q.weight", "fp8 (modelopt)", ())],
    ),
    "no scale, but the configuration asks for one": (
        {"q.weight": CODES, "lm_head.weight": of(F8, 8, 8), "norm.weight": of(BF16, 8)}, {"quantization_config": FP8},
        "config.json", [("q.weight", "fp8", ("q.weight_scale_inv",))],
    ),
    "a scale without its weight": (
        {"q.weight_scale_inv": of(F32, 2, 2), "norm.weight": of(BF16, 8)}, {"quantization_config": FP8}, "config.json",
        [("q.weight", "fp8", ("q.weight",))],
    ),
    "a scale without its weight, explained by modelopt's own file": (
        {"q.weight_scale": of(F32), "norm.weight": of(BF16, 8)}, {"quantization": {"quant_algo": "FP8"}},
        "hf_quant_config.json", [("q.weight", "fp8 (modelopt)", ("q.weight",))],
    ),
    "the number of bits": (
        {"q.weight_packed": of(I32, 8, 4), "q.weight_scale": of(BF16, 8, 1), "q.weight_shape": of(torch.int64, 2)},
        {"quantization_config": COMPRESSED | {"config_groups": {"0": {"weights": {"num_bits": 4}}}}}, "config.json",
        [("q.weight", "int4 (compressed-tensors)", ())],
    ),
    "modules that stay plain": (
        {"lm_head.weight": of(F8, 8, 8), "layers.0.mlp.gate.weight": of(F8, 8, 8)}, {"quantization_config": COMPRESSED},
        "config.json", [],
    ),
    "codes without scales": (
        {"q.qweight": of(I32, 16, 64), "q.qzeros": of(I32, 1, 8)}, {"bits": 4, "desc_act": False, "group_size": 128},
        "quantize_config.json", [("q.weight", "GPTQ int4", ("q.scales",))],
    ),
    "no configuration": ({"q.qweight": of(I32, 16, 64), "q.qzeros": of(I32, 1, 8)}, None, "config.json", []),
    "another configuration": ({"q.weight": CODES}, {"quantization": {"quant_method": "gptq"}}, "config.json", []),
    "a configuration that is not JSON": ({"q.weight": CODES}, "fp8", "config.json", []),
    "other weights have all parts": (
        {f"0.{name}": part for name, part in GPTQ.items()} | {"1.qweight": of(I32, 16, 64), "2.qzeros": of(I32, 1, 8)},
        None, "config.json",
        [("0.weight", "GPTQ int4", ()), ("1.weight", "GPTQ", ("1.qzeros", "1.scales")),
         ("2.weight", "GPTQ", ("2.qweight", "2.scales"))],
    ),
    "only some fp8 weights have scales": (
        {"0.weight": CODES, "0.weight_scale": of(F32, 1), "1.weight": of(F8, 8, 8)}, None, "config.json",
        [("0.weight", "fp8", ())],
    ),
    "bitsandbytes without its code book": (
        {f"q.{key}": tensor for key, tensor in _bitsandbytes("nf4").items() if key != "weight.quant_map"}, None,
        "config.json", [("q.weight", "bitsandbytes nf4", ("q.weight.quant_map",))],
    ),
    "bitsandbytes without its state": (
        {f"q.{key}": tensor for key, tensor in _bitsandbytes("nf4").items() if "quant_state" not in key},
        {"quantization_config": {"load_in_4bit": True}}, "config.json",
        [("q.weight", "bitsandbytes nf4", ("q.weight.quant_state.bitsandbytes__nf4",))],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("state", "config", "name", "expected"), CONFIGURED.values(), ids=CONFIGURED)
def test_the_configuration_decides_between_schemes_and_shows_missing_parts(
    tmp_path: Path, state: State, config: object, name: str, expected: list[tuple[str, str, tuple[str, ...]]]
) -> None:
    """The configuration names the library, and shows that codes lack a part; modules that it excludes stay plain."""
    found = saved(tmp_path, state, config, name).weights
    assert sorted((weight.key, weight.scheme, weight.missing) for weight in found) == expected


def fp8_model(directory: Path) -> Path:
    """Write a plain layer and a quantised layer, and a configuration that leaves the first layer plain."""
    torch.manual_seed(0)
    plain = {"layers.0.q.weight": torch.randn(8, 8), "layers.0.q.bias": torch.randn(8)}
    coded = {
        "layers.1.q.weight": torch.randn(8, 8).to(F8), "layers.1.q.weight_scale_inv": torch.ones(1, 1),
        "layers.1.q.bias": torch.randn(8),
    }  # fmt: skip
    saved(directory, plain | coded, {"quantization_config": FP8 | {"modules_to_not_convert": ["layers.0"]}})
    return directory / "model.safetensors"


def test_show_says_which_weights_are_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page and the tree have a line for each scheme, and the JSON document has the parts of each weight."""
    path = fp8_model(tmp_path)
    for options in ([], ["--tree"], ["--keep", "layers.1.*"]):
        assert run_ckpt(capsys, "show", path, *options).out.splitlines()[1] == (
            "quantised as fp8: 1 weight in 2 tensors"
        )
    parts = ["layers.1.q.weight_scale_inv", "layers.1.q.weight"]  # safetensors writes wide dtypes first
    weights = [{"key": "layers.1.q.weight", "scheme": "fp8", "parts": parts}]
    assert json.loads(run_ckpt(capsys, "show", path, "--json").out)["quantized"] == weights
    assert json.loads(run_ckpt(capsys, "show", path, "--json", "--drop", "layers.1.*").out)["quantized"] == []
    assert json.loads(run_ckpt(capsys, "stats", path, "--json").out)["quantized"] == weights


def test_a_list_says_how_many_weights_are_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A column has the schemes of each checkpoint, and the document too."""
    save_file(_bitsandbytes("nf4", nested=False), tmp_path / "q.safetensors")
    save_file({"w": of(F32, 2)}, tmp_path / "plain.safetensors")
    paths = (tmp_path / "q.safetensors", tmp_path / "plain.safetensors")
    assert "bitsandbytes nf4 ×1" in run_ckpt(capsys, "show", *paths).out
    rows = json.loads(run_ckpt(capsys, "show", *paths, "--json").out)["checkpoints"]
    assert [row["quantized"] for row in rows] == [{"bitsandbytes nf4": 1}, {}]


def test_stats_measure_no_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Codes and scales are listed with the reason why they are not measured, and do not count in the total."""
    path = fp8_model(tmp_path)
    with open_checkpoint(path) as checkpoint:
        found = stats(checkpoint, ["layers.1.*=second.*"])
    assert found.total.count == 64 + 8 + 8
    assert found.tensors["second.q.weight"].why == "codes of a weight, quantised as fp8"
    assert found.tensors["second.q.weight_scale_inv"].why == "part of fp8"
    assert "quantised as fp8: 1 weight in 2 tensors" in run_ckpt(capsys, "stats", path).out


def findings_of(state: State) -> dict[str, str]:
    """Return the key of the first finding of each code, without the notes that every file has."""
    report = run_checks(state)
    return {finding.code: finding.key for finding in report.findings if finding.code != "not-scanned"}


def test_check_reports_nothing_about_healthy_parts(tmp_path: Path) -> None:
    """Nothing is said about equal codes, zeros, several dtypes and plain layers; a note names the quantised weights."""
    with open_checkpoint(fp8_model(tmp_path)) as checkpoint:
        codes = {finding.code for finding in run_checks(checkpoint).findings}
    assert codes == {"quantized", "no-checksum", "not-scanned"}
    equal = {f"layers.{n}.q.{name}": part for n in range(4) for name, part in _bitsandbytes("nf4", BF16).items()}
    assert findings_of(equal) == {"quantized": "layers.0.q.weight"}
    for name, (_, parts) in QUANTIZED.items():
        ones = {f"q.{key}": torch.ones(part.shape).to(part.dtype) for key, part in parts.items()}
        assert run_checks(ones, ignore="broken-part").ok, name  # some parts hold JSON or offsets


def test_check_reports_nan_in_scales_and_in_fp8() -> None:
    """NaN and Inf in scales are broken parts, those in fp8 codes are real, and other codes can have any bits."""
    scale = {"q.weight": of(F8, 8, 8), "q.weight_scale": torch.tensor([torch.inf])}
    assert findings_of(scale) == {"quantized": "q.weight", "broken-part": "q.weight_scale"}
    codes = {"q.weight": torch.full((8, 8), torch.nan).to(F8), "q.weight_scale": torch.ones(1)}
    assert findings_of(codes) == {"quantized": "q.weight", "nan": "q.weight"}
    any_bits = _bitsandbytes("nf4", BF16) | {"weight": torch.full((2048, 1), torch.nan, dtype=BF16)}
    assert findings_of(any_bits) == {"quantized": "weight"}


def test_check_reports_missing_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A quantised weight without its scale is an error that names the missing key."""
    saved(tmp_path, {"q.weight": CODES}, {"quantization_config": FP8})
    ran = run_ckpt(capsys, "check", tmp_path / "model.safetensors")
    assert ran.code == 1
    assert "error: 'q.weight' is quantised as fp8, but lacks 'q.weight_scale_inv'" in ran.out
    shard = tmp_path / "model.safetensors"
    ran = run_ckpt(capsys, "check", shard.rename(tmp_path / "model-00001-of-00002.safetensors"))
    assert ran.code == 0
    assert "note: 'q.weight' is quantised as fp8, but lacks 'q.weight_scale_inv'" in ran.out
    assert "another shard may have it: check the index or the directory" in ran.out


PLAIN: State = {"m.q.weight": of(F32, 256, 256), "m.q.bias": of(F32, 256)}
DIFFERENT: dict[str, tuple[State, State, str, bool]] = {
    "fp8 in place of numbers": (
        PLAIN, {"m.q.weight": CODES, "m.q.weight_scale_inv": of(F32, 2, 2), "m.q.bias": of(F32, 256)}, "found", True,
    ),
    "numbers in place of fp8": ({"m.q.weight": CODES, "m.q.weight_scale_inv": of(F32, 2, 2)}, PLAIN, "expected", True),
    "codes of another shape": (
        PLAIN, {f"m.q.{name}": part for name, part in _bitsandbytes("nf4").items()}, "found", False,
    ),
    "codes of another name": (PLAIN, {f"m.q.{name}": part for name, part in GPTQ.items()}, "found", True),
    "two schemes": (
        {"m.q.weight": of(I8, 8, 4), "m.q.SCB": of(F32, 8)},
        {"m.q.weight": of(I8, 8, 4), "m.q.weight_scale": of(BF16, 8, 1)}, "both", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("symmetric", "lacking"), [(False, ["a", "b", "c"]), (True, []), (None, ["c"])])
def test_zero_points_are_expected_where_codes_are_not_symmetric(
    symmetric: bool | None, lacking: list[str], tmp_path: Path
) -> None:
    """The configuration says so; if there is none, the other weights do. Without zero points, numbers are wrong."""
    zeros = [] if symmetric is False else ["a", "b"]
    state = {
        f"{name}.{part}": tensor.clone()
        for name in "abc"
        for part, tensor in QUANTIZED["int8"][1].items()
        if part != "weight_zero_point" or name in zeros
    }
    group = {"weights": {"num_bits": 8, "symmetric": symmetric}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}}
    found = saved(tmp_path, state, None if symmetric is None else config)
    missing = {weight.key: weight.missing for weight in found.weights if weight.missing}
    assert missing == {f"{name}.weight": (f"{name}.weight_zero_point",) for name in lacking}
    codes = [one.code for one in run_checks(tmp_path / "model.safetensors").findings if one.severity == "error"]
    assert codes == ["missing-part"] * len(lacking)


@pytest.mark.parametrize("gone", ["qdata", "zero_point"])
def test_the_metadata_of_torchao_names_the_parts(gone: str, tmp_path: Path) -> None:
    """A weight without its codes is not left out in silence, and one without its zero points is not other numbers."""
    names = ["qdata", "scale", "zero_point"]
    described = json.dumps({"_type": "Int8Tensor", "_data": {"block_size": [1, 4]}, "_tensor_data_names": names})
    parts = {f"{name}.{part}": one.clone() for name in "ab" for part, one in QUANTIZED["torchao"][1].items()}
    del parts[f"b._weight_{gone}"]
    save_file(parts, tmp_path / "m.safetensors", dict.fromkeys(("a.weight", "b.weight", "left.out"), described))
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        weights = quantized_weights(checkpoint).weights
    assert {weight.scheme for weight in weights} == {"torchao int8"}
    missing = [(weight.key, weight.missing) for weight in weights]
    assert missing == [("a.weight", ()), ("b.weight", (f"b._weight_{gone}",))]
    with pytest.raises(FormatError, match=rf"'b\.weight' cannot be dequantised: it lacks 'b\._weight_{gone}'"):
        diff(tmp_path / "m.safetensors", tmp_path / "m.safetensors", dequantize=True)


@pytest.mark.parametrize(("expected", "found", "side", "loads"), DIFFERENT.values(), ids=DIFFERENT)
def test_diff_matches_no_codes_with_numbers(
    expected: State, found: State, side: str, *, loads: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes and numbers are not matched, and a hint says so; ``loads`` says what ``load_state_dict`` would do."""
    result = diff(expected, {f"model.{key}": tensor for key, tensor in found.items()}, ["model.*=*"])
    (weight,) = result.quantized
    assert (weight.key, weight.side, result.loads) == ("m.q.weight", side, loads)
    assert "m.q.weight" not in {pair.key for pair in (*result.matched, *result.dtype_mismatched)}
    assert (result.different, result.loads_strict) == (True, False)
    assert "codes for numbers" in result.hints[-1].message
    for name, state in (("expected", expected), ("found", found)):
        save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / name)
    ran = run_ckpt(capsys, "diff", tmp_path / "expected", tmp_path / "found")
    assert ran.code == 1
    assert f"quantised as {weight.weight.scheme}, " in ran.out
    assert "1 quantised differently" in ran.out
    document = json.loads(run_ckpt(capsys, "diff", tmp_path / "expected", tmp_path / "found", "--json").out)
    assert [(row["key"], row["side"]) for row in document["quantized"]] == [("m.q.weight", side)]
    assert document["hints"][-1]["rename"] is None


@pytest.mark.parametrize(("scheme", "parts"), QUANTIZED.values(), ids=QUANTIZED)
def test_diff_of_equal_schemes_is_silent(scheme: str, parts: State) -> None:
    """Two sides with the same parts match, also where a part that is not needed is absent."""
    assert not diff(parts, parts).different, scheme
    fewer = {name: part for name, part in parts.items() if name != "input_scale"}
    assert diff(parts, fewer).quantized == diff(fewer, parts).quantized == ()


def test_check_like_reports_weights_that_only_one_side_has_quantised() -> None:
    """``check --like`` has an error with the way to a plain weight."""
    found = {"q.weight": CODES, "q.weight_scale": of(F32, 1)}
    report = run_checks(found, like={"q.weight": of(F32, 256, 256)})
    (finding,) = [finding for finding in report.findings if finding.code == "quantized-mismatched"]
    assert finding.key == "q.weight"
    assert "FineGrainedFP8Config(dequantize=True)" in finding.hint


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_one_tensor_can_hold_codes_and_scales(tmp_path: Path) -> None:
    """The blocks of GGUF and the quantised tensors of torch are weights with one part."""
    path = tmp_path / "m.gguf"
    infos = [info("q", (256,), 12), info("w", (4,), 0, 160)]
    path.write_bytes(gguf_file(infos, data=bytes(160) + bytes(16)))
    torch.save({"q": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, tmp_path / "m.pt")
    for name, scheme in (("m.gguf", "GGUF Q4_K"), ("m.pt", "torch QI8")):
        with open_checkpoint(tmp_path / name) as checkpoint:
            (weight,) = quantized_weights(checkpoint).weights
        assert (weight.key, weight.scheme, weight.parts, weight.coded) == ("q", scheme, ("q",), "q")


class Int8Tensor(Tensor):
    """A tensor of a class that says that it belongs to torchao, which needs no installation here."""

    __module__ = "torchao.quantization"


def test_live_tensors_of_torchao_are_quantised() -> None:
    """The class of a live tensor shows its scheme, and other classes of tensors show none."""
    live = {"q.weight": of(BF16, 8, 8).as_subclass(Int8Tensor), "q.bias": of(BF16, 8)}
    assert [(weight.key, weight.scheme) for weight in found_in(live).weights] == [("q.weight", "torchao")]
    plain = {"q.weight": of(BF16, 8, 8), "q.bias": of(BF16, 8)}
    for expected, found in ((plain, live), (live, plain)):
        assert diff(expected, found).quantized
    assert not found_in({"q.weight": of(BF16, 8, 8).as_subclass(Unquantised)})


class Unquantised(Tensor):
    """A tensor of another class."""


def test_the_quick_test_of_dtypes_is_complete() -> None:
    """No scheme has an anchor of a dtype that the quick test does not know."""
    assert {dtype for scheme in SCHEMES for dtype in scheme.anchor.dtypes} == ANCHOR_DTYPES


def configured(directory: Path, ignored: list[str]) -> Configuration:
    """Return the configuration of a file that leaves some modules plain."""
    saved(directory, {"w": of(F32, 1)}, {"quantization_config": FP8 | {"modules_to_not_convert": ignored}})
    with open_checkpoint(directory / "model.safetensors") as checkpoint:
        return read_configuration(checkpoint)


def test_a_hostile_configuration_costs_little(tmp_path: Path) -> None:
    """A regular expression of a configuration is never evaluated, and only a few patterns are."""
    for ignored in (["re:(a|a)*b"], [f"x*{number}*y" for number in range(100)]):
        assert configured(tmp_path, ignored).leaves_plain("layers.0.q.weight")
    clear = configured(tmp_path, ["lm_head", "re:.*mlp\\.gate$", "visual*", "a." * 5000])
    plain = ("lm_head.weight", "model.lm_head.weight", "layers.0.mlp.gate.weight", "visual.blocks.0.q.weight")
    assert [key for key in plain if not clear.leaves_plain(key)] == []
    quantised = ("layers.0.mlp.gate_proj.weight", "my_lm_head.weight", "a." * 100_000)
    assert [key for key in quantised if clear.leaves_plain(key)] == []
