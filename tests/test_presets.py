"""Each preset gives exactly the keys and shapes of the other library, and the opposite preset restores every bit."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import execute, plan_remap, preset_names, preset_rules
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.errors import RuleError
from ckptkit.rules.parse import parse_rules
from ckptkit.rules.presets import preset_text
from tests.helpers_cli import run_ckpt
from tests.helpers_outputs import same_state, tensor_of
from tests.naming import bert, gpt2, llama, resnet, vit
from tests.naming.resnet import Shapes

State = dict[str, torch.Tensor]
HEADS, KV, WIDTH = 4, 2, 16
SIZES = {"patch": 2, "patches": 9, "classes": 5}


@dataclass(frozen=True)
class Pairing:
    """Two lists of names for one model, and the presets between them."""

    forward: str
    backward: str
    old: Shapes
    new: Shapes
    variables: dict[str, int] = field(default_factory=dict)


def _resnet(**options: bool) -> Pairing:
    sizes = ((2, 1, 1, 1), 4, 5) if options["bottleneck"] else ((2, 2, 1, 1), 4, 5)
    old, new = (make(*sizes, bottleneck=options["bottleneck"]) for make in (resnet.torchvision, resnet.detectron2))
    return Pairing("resnet-torchvision-to-detectron2", "resnet-detectron2-to-torchvision", old, new)


LAYERS = 12  # more than ten, so that an order by text would show
PAIRS: dict[str, Pairing] = {
    "resnet bottleneck": _resnet(bottleneck=True),
    "resnet basic": _resnet(bottleneck=False),
    "bert": Pairing(
        "bert-hf-to-original",
        "bert-original-to-hf",
        bert.hf(LAYERS, WIDTH, 24, 30, 10),
        bert.original(LAYERS, WIDTH, 24, 30, 10),
    ),
    "gpt2": Pairing(
        "gpt2-hf-to-nanogpt",
        "gpt2-nanogpt-to-hf",
        gpt2.hf(LAYERS, WIDTH, 30, 10),
        gpt2.nanogpt(LAYERS, WIDTH, 30, 10),
    ),
    "llama": Pairing(
        "llama-meta-to-hf",
        "llama-hf-to-meta",
        llama.meta(LAYERS, WIDTH, 24, 30, WIDTH // HEADS * KV),
        llama.hf(LAYERS, WIDTH, 24, 30, WIDTH // HEADS * KV),
        {"heads": HEADS, "kv_heads": KV},
    ),
    "vit": Pairing(
        "vit-timm-to-hf", "vit-hf-to-timm", vit.timm(LAYERS, WIDTH, 24, **SIZES), vit.hf(LAYERS, WIDTH, 24, **SIZES)
    ),
}
CODES = {"resnet": "F32", "bert": "F64", "gpt2": "F16", "llama": "BF16", "vit": "F8_E4M3"}


def random_bits(shapes: Shapes, code: str = "F32") -> State:
    """Return tensors of random bits, with NaNs of all kinds; tensors that nanoGPT ties are equal."""
    state = {key: tensor_of(code, shape, seed) for seed, (key, shape) in enumerate(shapes.items())}
    if "transformer.wte.weight" in state and "lm_head.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    return state


def remapped(state: State, name: str, variables: dict[str, int], out: Path, like: Shapes | None = None) -> State:
    """Return the output of ``ckpt remap --rules preset:NAME``, read by safetensors."""
    wanted = None if like is None else _infos(like, next(iter(state.values())).dtype)
    execute(plan_remap(state, preset_rules(name, variables), like=wanted), state, out)
    return load_file(out)


def _infos(shapes: Shapes, dtype: torch.dtype) -> dict[str, TensorInfo]:
    codes = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
    code = codes.get(dtype, "F8_E4M3")
    return {key: TensorInfo(key, code, shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_a_preset_and_its_opposite_restore_every_bit(name: str, tmp_path: Path) -> None:
    """The keys and shapes are exactly those of the list, and the opposite preset restores every bit."""
    pair = PAIRS[name]
    for number, (names, old, new) in enumerate(
        (((pair.forward, pair.backward), pair.old, pair.new), ((pair.backward, pair.forward), pair.new, pair.old))
    ):
        state = random_bits(old, CODES[name.partition(" ")[0]])
        forward = remapped(state, names[0], pair.variables, tmp_path / f"{number}a.safetensors")
        assert {key: tuple(value.shape) for key, value in forward.items()} == new
        backward = remapped(forward, names[1], pair.variables, tmp_path / f"{number}b.safetensors")
        assert same_state(backward, state)


@pytest.mark.parametrize("name", PAIRS)
def test_like_the_other_library(name: str, tmp_path: Path) -> None:
    """``--like`` finds every key of the other library."""
    pair = PAIRS[name]
    state = random_bits(pair.old, CODES[name.partition(" ")[0]])
    made = remapped(state, pair.forward, pair.variables, tmp_path / "o.safetensors", like=pair.new)
    assert {key: tuple(value.shape) for key, value in made.items()} == pair.new


def test_every_preset_has_an_opposite_that_is_tested() -> None:
    assert set(preset_names()) == {name for pair in PAIRS.values() for name in (pair.forward, pair.backward)}


def _rope_to_hf(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of each head: first the rows at even positions in Meta's file, then those at odd positions."""
    size = len(weight) // heads
    order = [head * size + 2 * pair + odd for head in range(heads) for odd in (0, 1) for pair in range(size // 2)]
    return weight[torch.tensor(order)]


def test_llama_attends_as_before(tmp_path: Path) -> None:
    """The attention scores of transformers equal the scores of Meta's complex rotation."""
    shapes = {key: shape for key, shape in PAIRS["llama"].old.items() if ".1" not in key}
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    made = remapped(state, "llama-meta-to-hf", PAIRS["llama"].variables, tmp_path / "o.safetensors")
    x = torch.randn(7, WIDTH, generator=generator)
    scores = []
    for wq, wk, rotate in (
        (state["layers.0.attention.wq.weight"], state["layers.0.attention.wk.weight"], _rotate_meta),
        (
            made["model.layers.0.self_attn.q_proj.weight"],
            made["model.layers.0.self_attn.k_proj.weight"],
            _rotate_hf,
        ),
    ):
        q = rotate((x @ wq.T).view(7, HEADS, -1))
        k = rotate((x @ wk.T).view(7, KV, -1)).repeat_interleave(HEADS // KV, dim=1)
        scores.append(torch.einsum("qhd,khd->hqk", q, k))
    torch.testing.assert_close(scores[0], scores[1])
    for name, heads in (("q", HEADS), ("k", KV)):
        expected = _rope_to_hf(state[f"layers.0.attention.w{name}.weight"], heads)
        assert torch.equal(made[f"model.layers.0.self_attn.{name}_proj.weight"], expected)


def _angles(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    return torch.outer(torch.arange(len(x)).float(), frequencies)


def _rotate_meta(x: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    angles = _angles(x)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def _rotate_hf(x: torch.Tensor) -> torch.Tensor:
    angles = torch.cat([_angles(x)] * 2, dim=-1)[:, None]
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _conv1d(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return torch.addmm(state[f"{name}.bias"], x, state[f"{name}.weight"])


def _linear(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return torch.nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def test_gpt2_projects_as_before(tmp_path: Path) -> None:
    """A Linear with the new weights computes the same as a Conv1D with the old ones, for all four projections."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in PAIRS["gpt2"].old.items()}
    made = remapped(state, "gpt2-hf-to-nanogpt", {}, tmp_path / "o.safetensors")
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        at = f"transformer.h.11.{name}"
        x = torch.randn(3, len(state[f"{at}.weight"]), generator=generator)
        torch.testing.assert_close(_linear(x, made, at), _conv1d(x, state, at))


def _with_prefix_removed(state: State) -> State:
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 10, 10) for i in range(LAYERS)}
    return {key.removeprefix("transformer."): value for key, value in state.items()} | masks


def _with_norms_of_old(state: State) -> State:
    renamed = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    return {
        next((key.replace(old, new) for old, new in renamed.items() if old in key), key): value
        for key, value in state.items()
    } | {"bert.embeddings.position_ids": torch.arange(10)}


def _tied_bert(state: State) -> State:
    return state | {
        "cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": state["cls.predictions.bias"],
    }


VARIANTS: dict[str, tuple[str, str, Callable[[State], State]]] = {
    # id: (pairing, preset, what such a file has beside or instead of the plain one)
    "the hub's gpt2": ("gpt2", "gpt2-hf-to-nanogpt", _with_prefix_removed),
    "gpt2 with its head": (
        "gpt2", "gpt2-hf-to-nanogpt", lambda state: state | {"lm_head.weight": state["transformer.wte.weight"]},
    ),
    "bert of 2018": ("bert", "bert-hf-to-original", _with_norms_of_old),
    "bert with its decoder": ("bert", "bert-hf-to-original", _tied_bert),
    "a vit with a pooler": (
        "vit", "vit-hf-to-timm", lambda state: state | {"vit.pooler.dense.weight": torch.ones(WIDTH, WIDTH)},
    ),
    "an old llama": (
        "llama", "llama-hf-to-meta",
        lambda state: state | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(12)},
    ),
    "llama with frequencies": ("llama", "llama-meta-to-hf", lambda state: state | {"rope.freqs": torch.ones(2)}),
    "a checkpoint of tensorflow": (
        "bert", "bert-original-to-hf",
        lambda state: state | {"global_step": torch.ones(()), "bert/pooler/dense/kernel/adam_m": torch.ones(2)},
    ),
    "nanogpt compiled, with masks": (
        "gpt2", "gpt2-nanogpt-to-hf",
        lambda state: {
            f"_orig_mod.{key}": value
            for key, value in (state | {f"transformer.h.{i}.attn.bias": torch.ones(2) for i in range(12)}).items()
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "preset", "varied"), VARIANTS.values(), ids=VARIANTS.keys())
def test_real_files(name: str, preset: str, varied: Callable[[State], State], tmp_path: Path) -> None:
    """Additional tensors of such files do not change the result."""
    pair = PAIRS[name]
    plain = random_bits(pair.old if preset == pair.forward else pair.new)
    expected = remapped(plain, preset, pair.variables, tmp_path / "a.safetensors")
    found = remapped(varied(plain), preset, pair.variables, tmp_path / "b.safetensors")
    assert same_state(found, expected)


def test_ties_are_compared(tmp_path: Path) -> None:
    """A head that differs from its embedding is an error, and there is no output."""
    state = random_bits(PAIRS["gpt2"].new)
    state["lm_head.weight"] = torch.zeros_like(state["lm_head.weight"])
    with pytest.raises(Exception, match="lm_head"):
        remapped(state, "gpt2-nanogpt-to-hf", {}, tmp_path / "o.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_frozen_norms_have_no_counters(tmp_path: Path) -> None:
    """The backbone of a detector is written with ``--like``, and read without adding counters."""
    sizes = ((1, 1, 1, 1), 4)
    state = random_bits(resnet.torchvision(*sizes, 5))
    frozen = resnet.detectron2(*sizes, None, frozen=True)
    made = remapped(state, "resnet-torchvision-to-detectron2", {}, tmp_path / "a.safetensors", like=frozen)
    backward = remapped(made, "resnet-detectron2-to-torchvision", {}, tmp_path / "b.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("fc.") and not key.endswith("tracked")}
    assert same_state(backward, kept)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_rule_files_with_a_description(name: str) -> None:
    """A preset is a rule file; its first lines name the models."""
    text = preset_text(name)
    assert text.startswith("# ")
    variables = tomllib.loads(text).get("vars", {})
    assert preset_rules(name, dict.fromkeys(variables, 4)) == preset_rules(
        name, config={"num_attention_heads": 4, "num_key_value_heads": 4}
    )


def test_the_command_line_takes_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--rules preset:NAME`` works with numbers from a configuration beside the input, and with --set."""
    source, out = tmp_path / "model.safetensors", tmp_path / "o.safetensors"
    state = random_bits(PAIRS["llama"].new)
    save_file(state, source)
    command: list[str | Path] = ["remap", source, "-o", out, "--force", "--rules", "preset:llama-hf-to-meta"]
    ran = run_ckpt(capsys, *command)
    assert (ran.code, ran.out) == (2, "")
    refusal = "variable heads: the value is in config.json, but there is no config.json"
    assert ran.err.startswith(f"ckpt: preset:llama-hf-to-meta: {refusal}")
    assert "hint: set it: --set heads=VALUE" in ran.err
    assert run_ckpt(capsys, *command, "--set", "heads=4", "--set", "kv_heads=2").code == 0
    expected = load_file(out)
    config = {"num_attention_heads": HEADS, "num_key_value_heads": KV}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run_ckpt(capsys, *command).code == 0
    assert same_state(load_file(out), expected)


@pytest.mark.parametrize("name", ["llama", "../rules/model"])
def test_an_unknown_preset_lists_the_known_ones(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "diff", "fixtures/lenet_ddp.pt", "fixtures/lenet_ddp.pt", "--rules", f"preset:{name}")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"ckpt: preset:{name}: there is no preset '{name}'\nhint: presets: bert-hf-to-original, ")
    assert all(known in ran.err for known in preset_names())


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """``--rules 'preset:?'`` needs no checkpoint and no output, and prints the header of each preset."""
    ran = run_ckpt(capsys, "remap", "--rules", "preset:?")
    assert (ran.code, ran.err) == (0, "")
    assert tuple(line for line in ran.out.splitlines() if line and line[0] != " ") == preset_names()
    assert "  Vision Transformer: from the names in the files of transformers' ViTForImageClassification" in ran.out


def test_an_unknown_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuleError, match="no variable 'heads'") as caught:
        preset_rules("vit-timm-to-hf", {"heads": 3})
    assert caught.value.path == "preset:vit-timm-to-hf"
    assert capsys.readouterr().err == ""


def test_sizes_in_the_lists_are_the_published_ones() -> None:
    """The models have their published numbers of parameters."""
    counted = {
        name: sum(math.prod(shape) for key, shape in shapes.items() if "running" not in key and "tracked" not in key)
        for name, shapes in {
            "resnet50": resnet.torchvision(),
            "bert": bert.hf(),
            "gpt2": gpt2.hf(),
            "llama": llama.hf(),
            "vit": vit.timm(),
        }.items()
    }
    assert counted == {
        "resnet50": 25557032, "bert": 110106428, "gpt2": 124439808, "llama": 8030261248, "vit": 86567656,
    }  # fmt: skip
    assert parse_rules().stages == ()
