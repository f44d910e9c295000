"""Tensors that one side has whole and the other in parts are never taken for absent ones."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptkit
from ckptkit import PlanError, TensorInfo, diff, load_into, merge, plan_merge
from ckptkit.comparison.parts import find_parted
from tests.helpers_cli import run_ckpt

Shapes = Mapping[str, tuple[int, ...]]


def infos(shapes: Shapes) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, "F32", shape) for key, shape in shapes.items()}


def experts(head: str, count: int, **parts: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{head}.{n}.{name}.weight": shape for n in range(count) for name, shape in parts.items()}


# Names of published models: how the library holds them in memory, and how the file has them.
WHOLE_AND_PARTS: Mapping[str, tuple[Shapes, Shapes]] = {
    "Mixtral": (
        {"model.layers.0.mlp.experts.gate_up_proj": (4, 96, 32), "model.layers.0.mlp.experts.down_proj": (4, 32, 48)},
        experts("model.layers.0.block_sparse_moe.experts", 4, w1=(48, 32), w2=(32, 48), w3=(48, 32)),
    ),
    "Qwen, as wide as it is long": (
        {"model.layers.1.mlp.experts.gate_up_proj": (3, 16, 8), "model.layers.1.mlp.experts.down_proj": (3, 8, 8)},
        experts("model.layers.1.mlp.experts", 3, gate_proj=(8, 8), up_proj=(8, 8), down_proj=(8, 8)),
    ),
    "transposed": (
        {"h.0.moe.experts.gate_up_proj": (2, 5, 14), "h.0.moe.experts.down_proj": (2, 7, 5)},
        experts("h.0.moe.experts", 2, gate_proj=(7, 5), up_proj=(7, 5), down_proj=(5, 7)),
    ),
    "one stack of each projection": (
        {"blocks.0.moe.w1": (2, 7, 5), "blocks.0.moe.w2": (2, 5, 7)},
        experts("blocks.0.moe.experts", 2, w1=(7, 5), w2=(5, 7)),
    ),
    "heads": (
        {"heads.weight": (3, 10, 5), "heads.bias": (3, 10)},
        {f"heads.{n}.{k}": (10, 5)[:dims] for n in range(3) for k, dims in (("weight", 2), ("bias", 1))},
    ),
    "a list of parameters": ({"prompts": (3, 10, 5)}, {f"prompts.{n}": (10, 5) for n in range(3)}),
    "heads, one after the other": ({"heads.weight": (6, 5)}, {f"heads.{n}.weight": (2, 5) for n in range(3)}),
    "layers, scanned": (
        {"layers.attn.q.weight": (4, 6, 6), "layers.attn.k.weight": (4, 6, 6)},
        {f"layers.{n}.attn.{name}.weight": (6, 6) for n in range(4) for name in "kq"},
    ),
    "qkv": (
        {"encoder.0.attn.qkv.weight": (18, 6), "encoder.0.attn.qkv.bias": (18,)},
        {f"encoder.0.attn.{n}_proj.{k}": s for n in "qkv" for k, s in (("weight", (6, 6)), ("bias", (6,)))},
    ),
    "MultiheadAttention": (
        {"h.0.attn.in_proj_weight": (18, 6)}, {f"h.0.attn.{n}.weight": (6, 6) for n in ("query", "key", "value")}
    ),
    "Conv1D": ({"h.0.attn.c_attn.weight": (6, 18)}, {f"h.0.attn.{n}_proj.weight": (6, 6) for n in "qkv"}),
    "few key heads": (
        {"layers.0.self_attn.qkv_proj.weight": (10, 6)},
        {f"layers.0.self_attn.{n}_proj.weight": (size, 6) for n, size in (("q", 6), ("k", 2), ("v", 2))},
    ),
    "key and value": (
        {"h.0.attn.to_kv.weight": (12, 6)}, {f"h.0.attn.to_{n}.weight": (6, 6) for n in "kv"}
    ),
    "w13": ({"l.0.mlp.w13.weight": (8, 6)}, {f"l.0.mlp.w{n}.weight": (4, 6) for n in (1, 3)}),
    "gate_up": (
        {"layers.0.mlp.gate_up_proj.weight": (8, 6)},
        {"layers.0.mlp.gate_proj.weight": (4, 6), "layers.0.mlp.up_proj.weight": (4, 6)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", WHOLE_AND_PARTS.values(), ids=WHOLE_AND_PARTS.keys())
def test_parts_are_found_in_both_directions(pair: tuple[Shapes, Shapes]) -> None:
    """Every whole has its parts, no part belongs to two, and the roles decide where shapes do not."""
    wholes, parts = pair
    joined = find_parted(infos(wholes), infos(parts))
    assert {one.whole for one in joined} == wholes.keys()
    assert sorted(key for one in joined for key in one.parts) == sorted(parts)
    assert [(one.whole, one.parts, False) for one in joined] == [
        (one.whole, one.parts, one.is_whole_expected) for one in find_parted(infos(parts), infos(wholes))
    ]
    for one in joined:
        if "down" in one.whole:
            assert all("down" in key or "w2" in key for key in one.parts)


ABSENT: Mapping[str, tuple[Shapes, Shapes]] = {
    "tokens, and norms of as many layers": (
        {"encoder.reg_tokens": (4, 64)}, {f"encoder.layers.{n}.norm.weight": (64,) for n in range(4)}
    ),
    "another layer": (
        {"layers.5.mlp.experts.down_proj": (2, 5, 7)}, experts("layers.4.mlp.experts", 2, down_proj=(5, 7))
    ),
    "other shapes": ({"moe.experts.down_proj": (2, 5, 9)}, experts("moe.experts", 2, down_proj=(5, 7))),
    "too few": ({"moe.experts.down_proj": (3, 5, 7)}, experts("moe.experts", 2, down_proj=(5, 7))),
    "one is not in the file": ({"a.qkv.weight": (9, 3)}, {"a.q.weight": (3, 3), "a.k.weight": (3, 3)}),
    "a new head": ({"fc.weight": (10, 8), "fc.bias": (10,)}, {"head.weight": (10, 8), "head.bias": (10,)}),
    "an MLP for a linear head": ({"head.weight": (10, 8)}, {"head.0.weight": (8, 8), "head.2.weight": (2, 8)}),
    "biases for weights": ({"heads.weight": (3, 5)}, {f"heads.{n}.bias": (5,) for n in range(3)}),
    "a scalar": ({"heads.scale": ()}, {f"heads.{n}.scale": () for n in range(3)}),
}  # fmt: skip


@pytest.mark.parametrize("pair", ABSENT.values(), ids=ABSENT.keys())
def test_what_is_not_evidently_a_part_is_not_one(pair: tuple[Shapes, Shapes]) -> None:
    """A merge into a model with new tensors is not refused because of other tensors that the donor has too many."""
    assert find_parted(infos(pair[0]), infos(pair[1])) == ()


class Experts(nn.Module):
    """A body that every file has, and experts in one stack, as transformers 5 holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.experts = nn.ParameterDict({"down_proj": nn.Parameter(torch.zeros(2, 3, 4))})


def donor() -> dict[str, torch.Tensor]:
    body = {f"body.{key}": value for key, value in nn.Linear(3, 3).state_dict().items()}
    return body | {f"experts.{n}.down_proj.weight": torch.full((3, 4), n + 1.0) for n in range(2)}


def test_a_merge_does_not_silently_keep_what_the_donor_has_in_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused with the key, its parts and two ways out, and the second way out works as it is written."""
    monkeypatch.chdir(tmp_path)
    save_file(Experts().state_dict(), "base.safetensors")
    save_file(donor(), "donor.safetensors")
    command = ["merge", "base.safetensors", "donor.safetensors", "-o", "out.safetensors"]
    ran = run_ckpt(capsys, *command)
    assert (ran.code, Path("out.safetensors").exists()) == (2, False)
    for text in ("'experts.down_proj'", "'experts.0.down_proj.weight'", "ckpt align ", "--on-missing keep"):
        assert text in ran.err
    assert run_ckpt(capsys, *command, "--on-missing", "keep").code == 0
    assert torch.equal(load_file("out.safetensors")["experts.down_proj"], torch.zeros(2, 3, 4))
    rule = {
        "rule": [{"from": "experts.{n:int}.down_proj.weight", "to": "experts.down_proj", "op": [{"stack": {"dim": 0}}]}]
    }
    merge("base.safetensors", "donor.safetensors", "out.safetensors", rule, force=True)
    assert torch.equal(load_file("out.safetensors")["experts.down_proj"][1], torch.full((3, 4), 2.0))


def test_load_into_asks_in_the_same_way() -> None:
    """The default refuses, before the first change; ``keep`` in writing, for all or by pattern, does not."""
    model = Experts()
    before = model.body.weight.detach().clone()
    with pytest.raises(PlanError, match=r"'experts\.down_proj' whole.*on_missing='keep'"):
        load_into(model, donor())
    assert torch.equal(model.body.weight, before)
    assert load_into(model, donor(), on_missing={"experts.*": "keep"}).kept == ("experts.down_proj",)
    assert load_into(model, donor(), on_missing="keep").kept == ("experts.down_proj",)


def test_parts_that_a_rule_drops_are_not_asked_for() -> None:
    """A user who leaves the parts out has decided, and of two donors one may have the tensor itself."""
    base = Experts()
    plan_merge(base, donor(), ckptkit.parse_rules(drop=["experts.*"]))
    plan_merge(base, [donor(), {"experts.down_proj": torch.ones(2, 3, 4)}])
    with pytest.raises(PlanError, match="the donor2 has it in 2 parts"):
        plan_merge(base, [{"body.bias": torch.ones(3)}, donor()])


def test_a_diff_names_the_command_that_looks_for_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where parts were found, and where no key matches, the command of the hint runs as it is printed."""
    monkeypatch.chdir(tmp_path)
    fused = {f"layers.{layer}.attn.qkv.weight": torch.ones(9, 5) for layer in range(2)}
    save_file(fused, "base file.safetensors")
    parts = {f"layers.{layer}.attn.{name}_proj.weight": torch.ones(3, 5) for layer in range(2) for name in "qkv"}
    torch.save({"epoch": 1, "model": parts}, "parts.pt")
    ran = run_ckpt(capsys, "diff", "base file.safetensors", "parts.pt")
    assert "'layers.0.attn.qkv.weight'" in ran.err
    command = ran.err.partition("ckpt ")[2].partition(" looks for")[0]
    ran = run_ckpt(capsys, *shlex.split(command))
    assert (ran.code, "qkv.weight" in ran.out) == (1, True), ran.err  # the three are equally large: a person decides
    unlike = {f"z.{n}": torch.ones(3, n + 1) for n in range(3)}
    save_file(unlike, "unlike.safetensors")
    ran = run_ckpt(capsys, "diff", "base file.safetensors", "unlike.safetensors")
    assert "no key matches; ckpt align 'base file.safetensors' unlike.safetensors -o rules.toml" in ran.err
    assert "suggest_rules(expected, found)" in str(diff({"a": torch.ones(2)}, {"b": torch.ones(2)}).hints[0])
