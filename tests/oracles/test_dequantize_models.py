"""A model that a library has quantised computes the same after --dequantize as after that library dequantised it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from tests.helpers_cli import run_ckpt

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

State = dict[str, torch.Tensor]


def library(name: str) -> Any:
    """Return a module of a library, or skip the test if the library is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def loaded(path: Path, **options: Any) -> Any:
    """Return the model in a directory, in BF16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu", **options).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a small model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def bitsandbytes(plain: Path, path: Path, **options: Any) -> State:
    """Quantise with bitsandbytes into ``path``, and return the weights that transformers makes of them."""
    library("bitsandbytes")
    from transformers import BitsAndBytesConfig

    loaded(plain, quantization_config=BitsAndBytesConfig(**options)).save_pretrained(path)
    state: State = loaded(path).dequantize().state_dict()
    return state


def torchao(plain: Path, path: Path, name: str, **options: Any) -> State:
    """Quantise with torchao into ``path``, and return the weights that ``dequantize`` makes of them."""
    quantization = library("torchao.quantization")
    from transformers import TorchAoConfig

    if name == "IntxWeightOnlyConfig":
        options["granularity"] = quantization.PerGroup(32)
    config = TorchAoConfig(getattr(quantization, name)(**options))
    loaded(plain, quantization_config=config).save_pretrained(path)
    state = {}
    for key, tensor in loaded(path).state_dict().items():
        state[key] = tensor.dequantize() if hasattr(tensor, "qdata") else tensor
    return state


def compressed_tensors(plain: Path, path: Path, form: str, **options: Any) -> State:
    """Quantise with compressed-tensors into ``path``, and return the weights that it decompresses."""
    quantization, compressors = library("compressed_tensors.quantization"), library("compressed_tensors.compressors")
    ranges = library("compressed_tensors.quantization.utils")
    model = loaded(plain)
    inputs = None
    if form != "pack-quantized":
        kind = options.get("type", "int")
        inputs = quantization.QuantizationArgs(num_bits=8, strategy="token", dynamic=True, type=kind)
    arguments = quantization.QuantizationArgs(**options)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=inputs)
    config = quantization.QuantizationConfig(
        config_groups={"group": scheme}, ignore=["lm_head"], format=form, quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            continue
        weight = module.weight.reshape(len(module.weight), -1, options.get("group_size", module.weight.shape[1]))
        low, high = weight.amin(-1), weight.amax(-1)
        if options["strategy"] == "block":
            tall, wide = options["block_structure"]
            blocks = torch.nn.functional.pad(
                module.weight, (0, -module.weight.shape[1] % wide, 0, -module.weight.shape[0] % tall)
            )
            blocks = blocks.reshape(blocks.shape[0] // tall, tall, -1, wide)
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        scale, zero = ranges.calculate_qparams(low, high, arguments)
        module.weight_scale.data = scale.to(torch.bfloat16).reshape(module.weight_scale.shape)
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape).to(
                module.weight_zero_point.dtype
            )
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    compressor.decompress_model(model)
    state: State = model.state_dict()
    return state


FOUR_BITS: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
INTEGERS: dict[str, Any] = {"symmetric": True}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
CASES: dict[str, tuple[Callable[..., State], dict[str, Any]]] = {
    "nf4": (bitsandbytes, FOUR_BITS | {"bnb_4bit_quant_type": "nf4"}),
    "nf4, nested": (bitsandbytes, FOUR_BITS | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "fp4": (bitsandbytes, FOUR_BITS | {"bnb_4bit_quant_type": "fp4"}),
    "codes stored as BF16": (bitsandbytes, FOUR_BITS | {"bnb_4bit_quant_storage": torch.bfloat16}),
    "int8": (bitsandbytes, {"load_in_8bit": True}),
    "Int8Tensor": (torchao, {"name": "Int8WeightOnlyConfig"}),
    "Int8Tensor, dynamic": (torchao, {"name": "Int8DynamicActivationInt8WeightConfig"}),
    "IntxUnpackedToInt8Tensor": (torchao, {"name": "IntxWeightOnlyConfig", "weight_dtype": torch.int8}),
    "Float8Tensor": (torchao, {"name": "Float8WeightOnlyConfig"}),
    "4 bits in groups": (
        compressed_tensors, INTEGERS | {"form": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32},
    ),
    "4 bits, asymmetric": (
        compressed_tensors,
        {"form": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "3 bits": (compressed_tensors, INTEGERS | {"form": "pack-quantized", "num_bits": 3, "strategy": "channel"}),
    "8 bits": (compressed_tensors, INTEGERS | {"form": "int-quantized", "num_bits": 8, "strategy": "channel"}),
    "fp8": (compressed_tensors, FP8 | {"form": "float-quantized", "strategy": "channel"}),
    "fp8 in blocks": (
        compressed_tensors, FP8 | {"form": "float-quantized", "strategy": "block", "block_structure": [64, 64]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_dequantised_model_computes_the_same(
    name: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All logits are equal bit for bit, and the configuration of the output names no quantisation."""
    quantise, options = CASES[name]
    expected = loaded(plain)
    state = quantise(plain, tmp_path / "quantised", **options)
    missing = expected.load_state_dict(
        {key: state[key].to(torch.bfloat16) for key in expected.state_dict() if key in state}
    )
    assert not missing.missing_keys
    output = tmp_path / "plain" / "model.safetensors"
    output.parent.mkdir()
    words = ("--dequantize", "--dtype", "BF16", "--carry", "--verify")
    ran = run_ckpt(capsys, "convert", tmp_path / "quantised", "-o", output, *words)
    assert ran.code == 0, ran.err
    model = loaded(output.parent)
    assert getattr(model.config, "quantization_config", None) is None
    tokens = torch.arange(1, 33).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("name", ["nf4", "nf4, nested", "fp8", "fp8 in blocks"])
def test_a_quantised_model_is_merged_as_numbers(name: str, plain: Path, tmp_path: Path) -> None:
    """The numbers that the library makes, with the plain model, rounded to BF16; the output is opened as plain."""
    quantise, options = CASES[name]
    state = quantise(plain, tmp_path / "quantised", **options)
    inputs = [
        {"path": f"{tmp_path}/quantised", "dequantize": True, "weight": 0.75},
        {"path": f"{plain}", "weight": 0.25},
    ]
    plan = ckptkit.plan_recipe({"method": "linear", "out_dtype": "BF16", "input": inputs})
    output = tmp_path / "merged" / "model.safetensors"
    output.parent.mkdir()
    ckptkit.execute(plan, plan.paths, output, carry=True, verify=True)
    model, other = loaded(output.parent), loaded(plain).state_dict()
    assert getattr(model.config, "quantization_config", None) is None
    for key, tensor in model.state_dict().items():
        expected = 0.75 * state[key].float() + 0.25 * other[key].float()
        torch.testing.assert_close(tensor.float(), expected, rtol=2**-7, atol=2**-9)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
