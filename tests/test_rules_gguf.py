"""``gguf:auto`` gives the tensors of a GGUF file the names and the layout of transformers, or refuses."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ckptkit import execute, load_rules, open_checkpoint, plan_remap, suggest_rules
from ckptkit.errors import RuleError
from ckptkit.rules.gguf.architectures import ARCHITECTURES
from tests.helpers_cli import run_ckpt

NAMED = [name for name, row in ARCHITECTURES.items() if row.names]
ENUM = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def write(path: Path, architecture: str, shapes: dict[str, tuple[int, ...]], heads: int | None = 4) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if heads is not None:
        writer.add_head_count(heads)
    for number, (key, shape) in enumerate(shapes.items()):
        made = np.random.default_rng(number).standard_normal(shape, np.float32)
        writer.add_tensor(key, made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", NAMED)
def test_the_names_are_those_of_the_library(architecture: str) -> None:
    """gguf-py maps each name of transformers back to the name that the table has, if it knows the tensor."""
    library = gguf.get_tensor_name_map(ENUM[architecture], 3)
    row = ARCHITECTURES[architecture]
    found = {stored: library.get_name(name.replace("{i}", "2")) for stored, name in row.names.items()}
    known = {stored: name for stored, name in found.items() if name is not None}
    assert known == {stored: stored.replace("{i}", "2") for stored in known}
    assert len(known) >= 9
    if row.experts is not None:
        layer = "model.layers.2"
        assert library.get_name(f"{layer}.{row.experts.router}") == "blk.2.ffn_gate_inp"
        for part in ("gate", "up", "down"):
            stacked = f"{layer}.{row.experts.projection.replace('.{e}', '')}.{getattr(row.experts, part)}"
            assert library.get_name(stacked) == f"blk.2.ffn_{part}_exps"


def test_a_llama_is_put_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of query and key are reordered by heads, tables of rotary embeddings are left out, experts are split."""
    shapes = {
        "token_embd.weight": (6, 8), "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (8, 8),
        "blk.0.ffn_gate_exps.weight": (3, 4, 8), "rope_freqs.weight": (2,),
    }  # fmt: skip
    path = write(tmp_path / "m.gguf", "llama", shapes)
    with open_checkpoint(path) as checkpoint:
        execute(plan_remap(checkpoint, "gguf:auto"), checkpoint, tmp_path / "out.safetensors")
        stored = {key: checkpoint.read(key) for key in checkpoint}
    with open_checkpoint(tmp_path / "out.safetensors") as made:
        q = stored["blk.0.attn_q.weight"].reshape(4, 1, 2, 8).transpose(1, 2).reshape(8, 8)
        assert torch.equal(made.read("model.layers.0.self_attn.q_proj.weight"), q)
        for number in range(3):
            expert = made.read(f"model.layers.0.block_sparse_moe.experts.{number}.w1.weight")
            assert torch.equal(expert, stored["blk.0.ffn_gate_exps.weight"][number])
        assert len(made) == 6
        assert suggest_rules(made, path).complete
    ran = run_ckpt(capsys, "remap", path, "-o", tmp_path / "again.safetensors", "--rules", "gguf:auto")
    assert "--rules gguf:auto: llama, 5 keys renamed, 3 of them converted by operations" in ran.err
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_the_shards_of_a_file_are_read_together(tmp_path: Path) -> None:
    """The metadata is in the first shard; no shard says that the others are not read."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    writer.add_head_count(2)
    for layer in range(3):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path) as checkpoint:
        execute(plan_remap(checkpoint, "gguf:auto"), checkpoint, tmp_path / "out.safetensors")
        assert [str(warning) for warning in checkpoint.warnings] == ["there is no index; 3 numbered shards are joined"]
    with open_checkpoint(tmp_path / "out.safetensors") as made:
        assert list(made) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]


def test_norms_lose_what_was_added(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "gemma2", {"output_norm.weight": (8,), "blk.1.post_ffw_norm.weight": (8,)})
    with open_checkpoint(path) as checkpoint:
        execute(plan_remap(checkpoint, "gguf:auto"), checkpoint, tmp_path / "out.safetensors")
        with open_checkpoint(tmp_path / "out.safetensors") as made:
            assert torch.equal(made.read("model.norm.weight"), checkpoint.read("output_norm.weight") - 1)
            assert list(made) == ["model.norm.weight", "model.layers.1.post_feedforward_layernorm.weight"]


SHAPES = {"blk.0.attn_q.weight": (8, 8)}
REFUSED = {
    "an architecture without names": ("mamba", SHAPES, 4, "the names of the architecture 'mamba' are not known"),
    "no numbers of heads": ("llama", SHAPES, None, "the metadata 'llama.attention.head_count' is None"),
    "a tensor of another model": ("qwen2", {"blk.0.ssm_a": (8,)}, 4, "'blk.0.ssm_a' is not known of the architecture"),
    "experts that are not stacked": (
        "qwen3moe", {"blk.0.ffn_up_exps.weight": (8, 8)}, 4, "'blk.0.ffn_up_exps.weight' is [8, 8], and must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "shapes", "heads", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_certain_is_refused(
    architecture: str, shapes: dict[str, tuple[int, ...]], heads: int | None, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", architecture, shapes, heads)
    with pytest.raises(RuleError, match="gguf:auto'") as caught:
        plan_remap(path, "gguf:auto")
    assert message in str(caught.value)
    assert not suggest_rules({"x": torch.zeros(3)}, path).complete


@pytest.mark.parametrize(
    ("source", "rules", "message"),
    [
        ("fixtures/lenet_10class.pth", "gguf:auto", "gguf:auto' needs a GGUF file"),
        ("fixtures/lenet_10class.pth", "gguf:llama", "'gguf:llama' is not valid"),
    ],
)
def test_what_is_not_gguf_is_refused(source: str, rules: str, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        plan_remap(source, rules)
    with pytest.raises(RuleError, match="has no variables"):
        load_rules("gguf:auto", variables={"heads": 2})


def test_a_command_without_the_option_names_one_that_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``check`` takes the rules, and does not read blocks as numbers."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    blocks = gguf.quants.quantize(np.ones((64, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_output.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    like = tmp_path / "like.pt"
    torch.save({"transformer.h.0.attn.c_proj.weight": torch.ones(64, 64)}, like)
    for command, has_option in ((["diff", str(like)], True), (["check", "--like", str(like)], False)):
        ran = run_ckpt(capsys, *command, str(tmp_path / "m.gguf"), "--rules", "gguf:auto")
        assert ran.code == 2
        assert ("hint: --dequantize reads it as numbers" in ran.err) is has_option
        assert "ckpt remap PATH -o OUT --dequantize" in ran.err
