"""``ckpt diff --values`` of real pairs: a fine-tuned model, a frozen backbone, a merged adapter, casts and shards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit import StateDictDiff, diff

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base() -> Any:
    """Return a small GPT-2."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def tuned(base: Any) -> Any:
    """Return the model after steps of AdamW that train the last two layers and the final norm."""
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("transformer.h.2.", "transformer.h.3.", "transformer.ln_f.")))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 64, (2, 16))
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_as_torch(result: StateDictDiff, expected: Any, found: Any) -> None:
    """Compare each number of the result with torch in F64."""
    assert result.values is not None
    left, right = expected.state_dict(), found.state_dict()
    differing = {one.key: one for one in result.values.different}
    for key in (pair.key for pair in result.matched):
        want, got = left[key].double(), right[key].to(left[key].dtype).double()
        if torch.equal(want, got):
            assert key not in differing
            continue
        one = differing[key]
        delta = (got - want).flatten()
        assert one.max_abs == float(delta.abs().max())
        assert one.mean_abs == pytest.approx(float(delta.abs().mean()))
        assert one.changed_elements == int(delta.count_nonzero())
        if want.norm():
            assert one.rel_l2 == pytest.approx(float(delta.norm() / want.norm()))
            cosine = torch.nn.functional.cosine_similarity(want.flatten(), got.flatten(), dim=0)
            assert one.cosine == pytest.approx(float(cosine))


def test_a_fine_tuned_model_in_every_form(base: Any, tuned: Any, tmp_path: Path) -> None:
    """A live model, a file, shards and a file of torch give the numbers of torch; the frozen layers are proved so."""
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    tuned.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    torch.save(tuned.state_dict(), tmp_path / "tuned.pt")
    frozen = ["transformer.h.0.*", "transformer.h.1.*", "transformer.w*e.*"]
    for expected in (tmp_path / "base", base):
        for name in ("tuned", "shards", "tuned.pt"):
            result = diff(expected, tmp_path / name, expect_frozen=frozen, expect_changed=["transformer.h.3.*.weight"])
            assert result.unmet == (), name
            assert_as_torch(result, base, tuned)
    broken = diff(tmp_path / "base", tuned, expect_frozen="transformer.h.*")
    assert {key.split(".")[2] for one in broken.unmet for key in one.keys} == {"2", "3"}
    assert diff(tmp_path / "shards", tmp_path / "tuned", values=True).different is False


def test_a_cast_differs_as_torch_rounds(base: Any, tmp_path: Path) -> None:
    """BF16 is compared as F32; the dtype alone is another difference, also within a tolerance."""
    half = copy.deepcopy(base).bfloat16()
    half.save_pretrained(tmp_path / "half")
    result = diff(base, tmp_path / "half", values=True)
    assert_as_torch(result, base, half)
    close = diff(base, tmp_path / "half", rtol=2**-8)
    assert close.values is not None
    assert (close.values.all_equal, close.different) == (True, True)
    assert diff(base, tmp_path / "half", max_rel_l2=2**-8).unmet == ()


def test_a_merged_adapter_changes_its_targets_alone(base: Any, tmp_path: Path) -> None:
    """peft merges into the attention only: this is what the gates say of its output, and of ours."""
    peft = pytest.importorskip("peft")
    base.save_pretrained(tmp_path / "base")
    settings = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    ckptkit.merge_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours.safetensors")
    for name in ("merged", "ours.safetensors"):
        result = diff(
            tmp_path / "base", tmp_path / name, expect_changed="*.c_attn.weight",
            expect_frozen=["*.mlp.*", "*.ln_*", "*.c_proj.*", "*.bias", "*.w*e.weight"],
        )  # fmt: skip
        assert (result.unmet, result.values is not None and len(result.values.different)) == ((), 4)
    assert diff(tmp_path / "merged", tmp_path / "ours.safetensors", rtol=1e-5, atol=1e-7).unmet == ()
