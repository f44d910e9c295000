"""Patches between models that were really tuned: with AdamW, with LoRA, with new tokens, quantised, and in a chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from tests.helpers_cli import ROOT
from tests.helpers_outputs import same_state, sha256
from tests.oracles.conftest import Store
from tests.oracles.servers.processes import run_command

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}


def model(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).to(dtype)


def trained(tuned: Any, steps: int = 3, lr: float = 1e-4) -> Any:
    """The model after some steps of AdamW on its own parameters that need a gradient."""
    optimizer = torch.optim.AdamW([one for one in tuned.parameters() if one.requires_grad], lr=lr)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        tuned(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned


def saved(one: Any, folder: Path, **options: Any) -> Path:
    one.save_pretrained(folder, **options)
    return folder


def prove(base: Any, new: Path, tmp_path: Path, share: float = 1.0) -> ckptkit.Delta:
    """Make a patch, apply it, and compare the output with the new checkpoint by every bit; return the patch."""
    patch, out = tmp_path / f"{new.name}.patch", tmp_path / f"{new.name}.out"
    delta = ckptkit.make_delta(base, new, patch)
    assert delta.nbytes == patch.stat().st_size < share * delta.new.nbytes
    ckptkit.apply_delta(base, patch, out / "model.safetensors" if out.is_dir() else out, format="safetensors")
    with ckptkit.open_checkpoint(new) as wanted:
        assert same_state(load_file(out), wanted.state_dict())
        with ckptkit.open_checkpoint(out) as found:
            assert (list(found), dict(found.metadata)) == (list(wanted), dict(wanted.metadata))
    assert ckptkit.digest(out).contents == ckptkit.digest(new).contents == delta.new.contents
    return delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_tuned_with_adamw(dtype: torch.dtype, tmp_path: Path) -> None:
    """All parameters changed a little; transformers loads the output, and it answers as the tuned model does."""
    base = saved(model(dtype), tmp_path / "base")
    tuned = trained(model(dtype))
    prove(base, saved(tuned, tmp_path / "tuned"), tmp_path, 0.9)
    folder = tmp_path / "again"
    ckptkit.apply_delta(base, tmp_path / "tuned.patch", saved(tuned, folder) / "model.safetensors", force=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert same_state(again.state_dict(), tuned.state_dict())


def test_a_frozen_model_with_a_tuned_head_costs_the_head(tmp_path: Path) -> None:
    base = saved(model(), tmp_path / "base")
    tuned = model()
    tuned.model.requires_grad_(False)
    delta = prove(base, saved(trained(tuned), tmp_path / "tuned"), tmp_path, 0.25)
    assert [tensor.info.key for tensor in delta.tensors if tensor.packed] == ["lm_head.weight"]


def test_a_merged_lora(tmp_path: Path) -> None:
    """Only the matrices that the adapter changes are packed."""
    peft = pytest.importorskip("peft")
    base = saved(model(), tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = trained(peft.get_peft_model(model(), config)).merge_and_unload()
    delta = prove(base, saved(tuned, tmp_path / "tuned"), tmp_path, 0.2)
    packed = [tensor.info.key for tensor in delta.tensors if tensor.packed]
    assert all(".q_proj." in key or ".v_proj." in key for key in packed)
    assert len(packed) == 6


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "one table"])
def test_a_model_with_new_tokens(tied: bool, tmp_path: Path) -> None:
    """Both embeddings get rows, and only these cost much."""
    base = saved(model(tied=tied), tmp_path / "base")
    grown = model(tied=tied)
    grown.resize_token_embeddings(SIZES["vocab_size"] + 4)
    delta = prove(base, saved(grown, tmp_path / "grown"), tmp_path, 0.05)
    assert delta.counts["replaced"] == 2 - tied


def test_a_quantised_model(tmp_path: Path) -> None:
    """Packed codes, scales and zero points of several schemes are bytes like any others."""
    base = load_file(ROOT / "fixtures" / "packed_weights.safetensors")
    new = {key: tensor.clone() for key, tensor in base.items()}
    for number, tensor in enumerate(new.values()):
        if number % 3 == 0 and tensor.numel():
            tensor.view(-1)[:1].view(torch.uint8)[0] ^= 5
    save_file(base, tmp_path / "base.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    prove(tmp_path / "base.safetensors", tmp_path / "new.safetensors", tmp_path)


def test_a_chain_of_versions_in_several_formats(tmp_path: Path) -> None:
    """Each version is in another format and in other shards than the one before, and each patch leads to the next."""
    tuned = model()
    versions = [saved(tuned, tmp_path / "v0", max_shard_size="100kB")]
    torch.save(trained(tuned).state_dict(), tmp_path / "v1.bin")
    versions += [tmp_path / "v1.bin", saved(trained(tuned), tmp_path / "v2")]
    for number in (1, 2):
        ckptkit.make_delta(versions[number - 1], versions[number], tmp_path / f"{number}.patch")
    found: Any = versions[0]
    for number in (1, 2):
        out = tmp_path / f"out{number}"
        ckptkit.apply_delta(found, tmp_path / f"{number}.patch", out, max_shard_size="150kB", verify=True)
        found = out
    with ckptkit.open_checkpoint(found) as last, ckptkit.open_checkpoint(versions[2]) as wanted:
        assert same_state(last.state_dict(), wanted.state_dict())


def test_long_tensors_are_hashed_in_pieces(tmp_path: Path) -> None:
    """Several tensors of several pieces are written by all threads in any order; checksums of a zip archive agree."""
    random = torch.Generator().manual_seed(0)
    base = {f"t{number}": torch.randn(1500 + number, 700, generator=random) for number in range(5)}
    new = {key: tensor * (1 + 1e-6 * (key != "t2")) for key, tensor in base.items()}
    new["t4"] = torch.cat([new["t4"], torch.randn(300, 700, generator=random)])
    ckptkit.make_delta(base, new, tmp_path / "patch")
    for name in ("out.safetensors", "out.pt"):
        ckptkit.apply_delta(base, tmp_path / "patch", tmp_path / name, verify=True)
    assert same_state(torch.load(tmp_path / "out.pt", weights_only=True), new)
    assert ckptkit.run_checks(tmp_path / "out.pt").ok
    base["t0"][-1, -1] += 1
    with pytest.raises(ckptkit.PlanError, match="'t0' has other values"):
        ckptkit.apply_delta(base, tmp_path / "patch", tmp_path / "wrong.safetensors")


def _files(folder: Path) -> None:
    base = model().state_dict()
    tuned = {key: tensor * (1 + 1e-5 * ("mlp" in key)) for key, tensor in base.items()}
    save_file(base, folder / "base.safetensors", {"format": "pt"})
    save_file(tuned, folder / "tuned.safetensors", {"format": "pt"})
    ckptkit.convert(folder / "base.safetensors", folder / "shards", max_shard_size="100kB")
    ckptkit.make_delta(folder / "base.safetensors", folder / "tuned.safetensors", folder / "patch.safetensors")


def test_bases_and_patches_in_stores(store: Store, tmp_path: Path) -> None:
    """Every input may be in a store; tests/oracles/test_uploads.py has patches and outputs in one."""
    url = store.made("deltas", _files)
    folder = store.folder / "deltas"
    is_bucket = url.startswith("s3")
    for base in ("base.safetensors", *(["shards"] if is_bucket else [])):
        out = tmp_path / f"{base}.out.safetensors"
        ran = run_command(
            "apply", f"{url}/{base}", f"{url}/patch.safetensors", "-o", out, "-v", environment=store.variables
        )
        assert ran.code == 0, ran.err
        assert sha256(out) == sha256(folder / "tuned.safetensors")
    made = tmp_path / "patch.safetensors"
    ran = run_command(
        "delta", f"{url}/base.safetensors", f"{url}/tuned.safetensors", "-o", made, environment=store.variables
    )
    assert ran.code == 0, ran.err
    assert sha256(made) == sha256(folder / "patch.safetensors")
