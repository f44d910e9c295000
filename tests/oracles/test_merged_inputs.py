"""Merges of what libraries write: Stable Diffusion with block weights, snapshots of a run, and an adapter of PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit

pytestmark = pytest.mark.filterwarnings("ignore")
State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

CHANNELS = (8, 16, 16, 16)  # of the four levels of the U-Net, which are 320, 640, 1280 and 1280 in version 1.5
TEXT = 12  # numbers of each token of the text
BLOCK_WEIGHTS = """
version = 1
method = "linear"
only = ["model.diffusion_model.*"]
on_missing = "error"
[[input]]
name = "A"
path = "a.safetensors"
[[input]]
name = "B"
path = "b.safetensors"
[[set]]
keys = "model.diffusion_model.input_blocks.{i:int}.*"
inputs.A.weight = { over = "i", values = [1, 0.9, 0.7, 0.5, 0.3, 0.1, 0, 0, 0, 0, 0, 0] }
inputs.B.weight = { over = "i", values = [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1, 1, 1, 1, 1, 1] }
[[set]]
keys = "model.diffusion_model.middle_block.*"
inputs = { A = { weight = 0.5 }, B = { weight = 0.5 } }
[[set]]
keys = "model.diffusion_model.output_blocks.{i:int}.*"
inputs = { A = { weight = 0.2 }, B = { weight = 0.8 } }
[[set]]
keys = "model.diffusion_model.*"
inputs = { A = { weight = 0.5 }, B = { weight = 0.5 } }
"""
INPUT_BLOCKS = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1, 1, 1, 1, 1, 1)  # the weights of B
OTHERS = {"middle_block": 0.5, "output_blocks": 0.8, "time_embed": 0.5, "out": 0.5}


def stable_diffusion(seed: int) -> State:
    """Return a checkpoint with the names of Stable Diffusion 1.5 and small shapes, in F16."""
    torch.manual_seed(seed)
    state = {f"model.diffusion_model.{name}": torch.randn(shape) / 8 for name, shape in unet().items()}
    for name in ("first_stage_model.encoder.conv_in", "cond_stage_model.transformer.text_model.final_layer_norm"):
        state[f"{name}.weight"] = torch.randn(8)
    embeddings = "cond_stage_model.transformer.text_model.embeddings"
    ids = torch.arange(77)[None]
    return {**{key: value.half() for key, value in state.items()}, f"{embeddings}.position_ids": ids}


def unet() -> Shapes:
    """Return the names and shapes of the parameters of a U-Net of Stable Diffusion 1.5."""
    first, time = CHANNELS[0], 4 * CHANNELS[0]
    made: Shapes = {"time_embed.0": (time, first), "time_embed.2": (time, time), "input_blocks.0.0": (first, 4, 3, 3)}
    skipped, now, number = [first], first, 1
    for level, wanted in enumerate(CHANNELS):
        for _ in range(2):
            made |= residual(f"input_blocks.{number}.0", now, wanted)
            made |= attention(f"input_blocks.{number}.1", wanted) if level < 3 else {}
            now, number = wanted, number + 1
            skipped.append(now)
        if level < 3:
            made[f"input_blocks.{number}.0.op"] = (now, now, 3, 3)
            number += 1
            skipped.append(now)
    made |= residual("middle_block.0", now, now) | attention("middle_block.1", now)
    made |= residual("middle_block.2", now, now)
    for number in range(12):
        level, wanted = 3 - number // 3, CHANNELS[3 - number // 3]
        made |= residual(f"output_blocks.{number}.0", now + skipped.pop(), wanted)
        made |= attention(f"output_blocks.{number}.1", wanted) if level < 3 else {}
        if number % 3 == 2 and level:
            made[f"output_blocks.{number}.{2 if level < 3 else 1}.conv"] = (wanted, wanted, 3, 3)
        now = wanted
    made |= {"out.0": (now,), "out.2": (4, now, 3, 3)}
    without_bias = ("to_q", "to_k", "to_v")
    biases = {f"{name}.bias": shape[:1] for name, shape in made.items() if not name.endswith(without_bias)}
    return {f"{name}.weight": shape for name, shape in made.items()} | biases


def residual(name: str, given: int, wanted: int) -> Shapes:
    made: Shapes = {
        "in_layers.0": (given,), "in_layers.2": (wanted, given, 3, 3), "emb_layers.1": (wanted, 4 * CHANNELS[0]),
        "out_layers.0": (wanted,), "out_layers.3": (wanted, wanted, 3, 3),
        **({} if given == wanted else {"skip_connection": (wanted, given, 1, 1)}),
    }  # fmt: skip
    return {f"{name}.{part}": shape for part, shape in made.items()}


def attention(name: str, width: int) -> Shapes:
    square = (width, width)
    block: Shapes = {f"norm{number}": (width,) for number in (1, 2, 3)}
    block |= {"ff.net.0.proj": (8 * width, width), "ff.net.2": (width, 4 * width)}
    for part, read in (("attn1", width), ("attn2", TEXT)):
        block |= {f"{part}.to_q": square, f"{part}.to_k": (width, read), f"{part}.to_v": (width, read)}
        block[f"{part}.to_out.0"] = square
    made: Shapes = {f"transformer_blocks.0.{part}": shape for part, shape in block.items()}
    made |= {"norm": (width,), "proj_in": (*square, 1, 1), "proj_out": (*square, 1, 1)}
    return {f"{name}.{part}": shape for part, shape in made.items()}


def test_stable_diffusion_with_block_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks have the weights of their numbers, all else is that of A, and diffusers opens the U-Net."""
    diffusers = pytest.importorskip("diffusers")
    files = pytest.importorskip("diffusers.loaders.single_file_utils")
    monkeypatch.chdir(tmp_path)
    a, b = stable_diffusion(0), stable_diffusion(1)
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    Path("blocks.toml").write_text(BLOCK_WEIGHTS)
    plan = ckptkit.plan_recipe("blocks.toml")
    ckptkit.execute(plan, plan.paths, "out.safetensors", verify=True)
    merged = load_file("out.safetensors")
    assert merged.keys() == a.keys()
    for key, tensor in merged.items():
        part, _, rest = key.removeprefix("model.diffusion_model.").partition(".")
        weight = INPUT_BLOCKS[int(rest.partition(".")[0])] if part == "input_blocks" else OTHERS.get(part, 0)
        expected = (1 - weight) * a[key].double() + weight * b[key].double()
        assert tensor.dtype == a[key].dtype
        torch.testing.assert_close(tensor.double(), expected, rtol=4.89e-4, atol=3e-8)  # half a unit of F16
        if weight in {0, 1}:
            assert torch.equal(tensor, b[key] if weight else a[key]), key
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=CHANNELS, norm_num_groups=4, cross_attention_dim=TEXT, attention_head_dim=4
    )
    converted = files.convert_ldm_unet_checkpoint(dict(merged), dict(model.config))
    model.load_state_dict({key: value.float() for key, value in converted.items()})
    made = model(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, TEXT))
    assert made.sample.isfinite().all()


@pytest.mark.parametrize(("which", "numbers"), [("", range(1, 11)), ("last = 5\nevery = 2\n", (2, 4, 6, 8, 10))])
def test_a_soup_of_snapshots_is_the_average_that_torch_makes(
    which: str, numbers: range | tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for number in range(1, 11):
        optimizer.zero_grad()
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
        torch.save(model.state_dict(), f"step_{number * 100}.pt")
        if number in numbers:
            averaged.update_parameters(model)
    Path("soup.toml").write_text(f'method = "average"\nnon_float = "max"\n[[input]]\npath = "step_*.pt"\n{which}')
    plan = ckptkit.plan_recipe("soup.toml")
    assert list(plan.paths) == [f"step_{number * 100}" for number in numbers]
    ckptkit.execute(plan, plan.paths, "soup.pt", verify=True)
    soup = torch.load("soup.pt", weights_only=True)
    expected = averaged.module.state_dict()
    assert soup.pop("1.num_batches_tracked") == 10
    del expected["1.num_batches_tracked"]
    torch.testing.assert_close(soup, expected)


def test_an_adapter_is_an_input_as_peft_merges_it(tmp_path: Path) -> None:
    """The weights of PEFT in float32 are merged with another model, and rounded to BF16 once."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=False)
    for name in ("base", "other"):
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / name)
    base, other = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("base", "other")
    )
    modules = ["q_proj", "down_proj"]
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    folded, rest = adapted.merge_and_unload().state_dict(), other.state_dict()
    inputs = [
        {"path": f"{tmp_path}/base", "lora": f"{tmp_path}/adapter", "weight": 0.75},
        {"path": f"{tmp_path}/other", "weight": 0.25},
    ]
    for method, given, expected in (
        ("passthrough", [{key: inputs[0][key] for key in ("path", "lora")}], folded),
        ("linear", inputs, {key: 0.75 * tensor.double() + 0.25 * rest[key] for key, tensor in folded.items()}),
    ):
        plan = ckptkit.plan_recipe({"method": method, "input": given})
        ckptkit.execute(plan, plan.paths, tmp_path / f"{method}.safetensors", verify=True)
        made = load_file(tmp_path / f"{method}.safetensors")
        assert made.keys() == expected.keys()
        assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
        assert [key for key, tensor in made.items() if not torch.equal(tensor, expected[key].bfloat16())] == []
