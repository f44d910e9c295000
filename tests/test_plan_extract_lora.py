"""An adapter is extracted from a tuned model, and folding it gives the tuned weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import extract_lora, merge_lora, plan_extract_lora
from ckptkit.errors import PlanError, RuleError
from ckptkit.plans.adapters.layers import AsLayer
from ckptkit.rules.load import as_rules
from ckptkit.tensor_ops.lora import ExtractLora
from tests.helpers_cli import run_ckpt

State = dict[str, torch.Tensor]


def states(rank: int) -> tuple[State, State]:
    """Return a base, and a tuned state with an update of the given rank in each weight."""
    generator = torch.Generator().manual_seed(1)
    base = {
        "q.weight": torch.randn(12, 8, generator=generator),
        "conv.weight": torch.randn(6, 4, 3, 3, generator=generator),
        "q.bias": torch.randn(12, generator=generator),
        "norm.weight": torch.ones(8),
    }
    tuned = dict(base)
    for key in ("q.weight", "conv.weight"):
        flat = base[key].flatten(1)
        up, down = (torch.randn(*shape, generator=generator) for shape in ((len(flat), rank), (rank, flat.shape[1])))
        tuned[key] = (flat + up @ down).reshape(base[key].shape)
    return base, tuned


def test_the_extracted_adapter_is_the_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter of rank 2 has an update of rank 2, with its configuration beside it; ``lora`` folds it.

    The directory is made, but not for a dry run. That the donor is an adapter is no news with ``lora``.
    """
    base, tuned = states(2)
    adapter = tmp_path / "adapter"
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    arguments: list[str | Path] = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "--rank", "2"]
    target = adapter / "adapter_model.safetensors"
    ran = run_ckpt(capsys, "merge", *arguments, "-o", target, "--method", "extract-lora", "--dry-run")
    assert (ran.code, adapter.exists()) == (0, False), ran.err
    ran = run_ckpt(capsys, "merge", *arguments, "-o", target, "--method", "extract-lora")
    assert ran.code == 0, ran.err
    assert "norm.weight" in ran.err
    assert "the factors of 2 weights leave out < 0.1 % of the change (norm), at most < 0.1 %, in" in ran.err
    factors = load_file(target)
    assert sorted(factors) == [
        f"base_model.model.{module}.lora_{factor}.weight" for module in ("conv", "q") for factor in "AB"
    ]
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert config["target_modules"] == ["conv", "q"]
    update = factors["base_model.model.q.lora_B.weight"] @ factors["base_model.model.q.lora_A.weight"]
    torch.testing.assert_close(base["q.weight"] + update, tuned["q.weight"], rtol=1e-4, atol=1e-4)
    ran = run_ckpt(
        capsys, "merge", tmp_path / "base.safetensors", adapter, "-o", tmp_path / "o.safetensors", "--method", "lora"
    )
    assert (ran.code, "this is an adapter" in ran.err) == (0, False), ran.err
    made = load_file(tmp_path / "o.safetensors")
    for key, value in tuned.items():
        torch.testing.assert_close(made[key], value, rtol=1e-4, atol=1e-4)


def test_nothing_is_written_where_the_configuration_would_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An existing configuration needs ``--force``, and the name of the output must be peft's."""
    base, tuned = states(1)
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    arguments: list[str | Path] = [
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "--method", "extract-lora", "--rank", "1"
    ]  # fmt: skip
    target = tmp_path / "adapter_model.safetensors"
    ran = run_ckpt(capsys, "merge", *arguments, "-o", target)
    assert (ran.code, "adapter_config.json: already exists" in ran.err, target.exists()) == (2, True, False)
    missing = tmp_path / "no" / "directory" / target.name
    ran = run_ckpt(capsys, "merge", *arguments, "-o", missing)
    assert (ran.code, f"the directory {missing.parent} does not exist" in ran.err) == (2, True)
    ran = run_ckpt(capsys, "merge", *arguments, "-o", tmp_path / "x.safetensors")
    assert (ran.code, "PEFT looks for adapter_model.safetensors" in ran.err) == (2, True)
    ran = run_ckpt(capsys, "merge", *arguments, "-o", target, "--force", "--dry-run", "--json")
    assert (ran.code, target.exists()) == (0, False)
    assert json.loads(ran.out)["plan"][0]["sources"] == [
        {"role": "base", "key": "conv.weight"}, {"role": "donor", "key": "conv.weight"}
    ]  # fmt: skip


def test_tensors_that_cannot_be_compared_are_named() -> None:
    """A key that the base lacks, another shape, and no change are refused; ``whole`` takes what the base lacks."""
    base, tuned = states(1)
    whole: AsLayer = {"q.*": "whole", "conv.*": "whole", "norm.*": "whole"}
    with pytest.raises(PlanError, match=r"'q\.weight' is \[12, 8\] in the tuned model, and the base does not have it"):
        plan_extract_lora({"w": torch.zeros(1)}, {"q.weight": tuned["q.weight"]}, 1)
    with pytest.raises(PlanError, match=r"and the base has it as \[8, 12\]"):
        plan_extract_lora({"q.weight": torch.zeros(8, 12)}, {"q.weight": tuned["q.weight"]}, 1)
    with pytest.raises(PlanError, match="no tensor of the tuned model differs"):
        plan_extract_lora(base, tuned, 1, as_rules({"keep": ["norm.*"]}))
    plan = plan_extract_lora({"w.weight": torch.zeros(2, 2)}, tuned | {"w.weight": torch.ones(2, 2)}, 1, as_layer=whole)
    assert "base_model.model.q.bias" in {step.out.key for step in plan.steps}


def test_a_rank_that_a_weight_cannot_have_becomes_its_largest(tmp_path: Path) -> None:
    """The configuration has the rank of each such module, and alpha follows so that the scale stays 1."""
    base, tuned = states(1)
    extract_lora(base, tuned, tmp_path / "adapter_model.safetensors", 7)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^conv": 6}
    state = merge_lora(base, tmp_path, tmp_path / "out.safetensors")
    assert state.plan is not None
    made = load_file(tmp_path / "out.safetensors")
    for key, value in tuned.items():
        torch.testing.assert_close(made[key], value, rtol=1e-4, atol=1e-4)


def test_what_did_not_change_gets_no_adapter_and_is_named() -> None:
    """An unchanged weight is listed, also if a rule renames it; without any change there is no adapter."""
    base, tuned = states(1)
    tuned["q.weight"] = base["q.weight"].clone()
    plan = plan_extract_lora(base, {f"m.{key}": value for key, value in tuned.items()}, 1, ["m.*=*"])
    assert [step.sources[0].key for step in plan.steps] == ["conv.weight", "conv.weight"]
    unchanged = {drop.key for drop in plan.dropped if drop.reason == "it did not change"}
    assert unchanged == {"m.q.weight", "m.q.bias", "m.norm.weight"}
    with pytest.raises(PlanError, match="no tensor of the tuned model differs from the base"):
        plan_extract_lora(base, base, 1)
    with pytest.raises(PlanError, match=r"'norm.weight' changed, and LoRA can hold no factors of that"):
        plan_extract_lora(base, base | {"norm.weight": torch.zeros(8)}, 1)


def test_the_layers_of_a_file_are_decided_by_evidence_and_named() -> None:
    """Names tell embeddings, biases tell Conv1D of GPT-2, and the option decides otherwise."""
    shapes = {
        "wte.weight": (50, 8), "h.0.c_attn.weight": (8, 24), "h.0.c_attn.bias": (24,), "h.0.c_proj.weight": (8, 8),
        "h.0.c_proj.bias": (8,), "codes.weight": (20, 8), "up.weight": (3, 5, 2, 2), "up.bias": (5,),
        "stem.weight": (5, 3, 2, 2), "depthwise.weight": (5, 1, 3, 3), "head.weight": (4, 8), "head.bias": (4,),
    }  # fmt: skip
    base = {key: torch.zeros(shape) for key, shape in shapes.items()}
    tuned = {key: torch.randn(shape) for key, shape in shapes.items()}
    plan = plan_extract_lora(base, tuned, 1, as_layer={"codes.*": "embedding"})
    made = {step.out.key.removeprefix("base_model.model."): step.out.shape for step in plan.steps}
    assert made["wte.lora_embedding_A"] == (1, 50)
    assert made["wte.lora_embedding_B"] == (8, 1)
    assert made["codes.lora_embedding_A"] == (1, 20)
    assert made["h.0.c_attn.lora_A.weight"] == (1, 8)
    assert made["h.0.c_attn.lora_B.weight"] == (24, 1)
    assert made["stem.lora_A.weight"] == (1, 3, 2, 2)
    assert {"up.weight", "up.bias", "depthwise.weight"} <= made.keys()
    square = next(step.recipe for step in plan.steps if step.out.key.endswith("c_proj.lora_A.weight"))
    assert square is not None
    assert square.operations == (ExtractLora(1, fan_in_fan_out=True),)
    notes = "\n".join(plan.notes)
    assert "'wte.weight' taken for embeddings: by their names" in notes
    assert "'h.0.c_attn.weight' taken for Conv1D of GPT-2" in notes
    linear = plan_extract_lora(base, tuned, 1, as_layer={"wte.*": "linear", "up.*": "whole"})
    assert "base_model.model.wte.lora_A.weight" in {step.out.key for step in linear.steps}
    with pytest.raises(RuleError, match="as_layer='wtf' matches none of 12 keys of the model"):
        plan_extract_lora(base, tuned, 1, as_layer={"wtf": "linear"})


def test_both_halves_of_a_tie_are_saved_whole() -> None:
    """A file with a tie, or with the same bytes twice, gets no factors that a merge would add twice."""
    weight = torch.randn(20, 4)
    fc = {"fc.weight": torch.zeros(4, 4)}
    base = {"embed_tokens.weight": weight, "lm_head.weight": weight, **fc}
    changed = torch.randn(20, 4)
    tuned = {"embed_tokens.weight": changed, "lm_head.weight": changed.clone(), "fc.weight": torch.ones(4, 4)}
    for given in (base, {key: value.clone() for key, value in base.items()}):
        plan = plan_extract_lora(given, tuned, 1)
        kept = [step.out.key for step in plan.steps if step.is_copy]
        assert kept == ["base_model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
        asked = plan_extract_lora(given, tuned, 1, as_layer={"embed_tokens.*": "embedding"})
        assert {step.sources[0].key for step in asked.steps} == {"embed_tokens.weight", "fc.weight"}
        assert ("lm_head.weight", "one tensor with 'embed_tokens.weight'") in {(d.key, d.reason) for d in asked.dropped}
    with pytest.raises(PlanError, match="are one tensor in the base, and differ in the tuned model"):
        plan_extract_lora(base, tuned | {"lm_head.weight": torch.randn(20, 4)}, 1)


def test_a_live_model_tells_its_layers() -> None:
    """A class that PEFT does not adapt is saved whole, and a name does not matter."""
    base = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Bilinear(4, 4, 2))
    tuned = {key: value + 1 for key, value in base.state_dict().items()}
    plan = plan_extract_lora(base, tuned, 1)
    keys = {step.out.key.removeprefix("base_model.model.") for step in plan.steps}
    assert keys == {
        "0.lora_embedding_A", "0.lora_embedding_B", "1.lora_A.weight", "1.lora_B.weight", "1.base_layer.bias",
        "2.weight", "2.bias",
    }  # fmt: skip


def test_only_the_modules_that_have_factors_are_targets(tmp_path: Path) -> None:
    """PEFT adapts every module whose name ends with a target, so a target that is the end of another is exact."""
    base = {"fc.weight": torch.zeros(4, 4), "block.fc.weight": torch.zeros(4, 4)}
    extract_lora(base, base | {"fc.weight": torch.ones(4, 4)}, tmp_path / "adapter_model.safetensors", 1)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert re.fullmatch(config["target_modules"], "fc")
    assert not re.fullmatch(config["target_modules"], "block.fc")


def test_a_head_without_a_tensor_is_saved_with_its_embedding(tmp_path: Path) -> None:
    """config.json tells the head that the file leaves to its tie; folding the adapter gives the tuned values."""
    for name, seed in (("base", 0), ("tuned", 1)):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        state = {
            "bert.embeddings.word_embeddings.weight": torch.randn(9, 4, generator=generator),
            "bert.q.weight": torch.randn(4, 4, generator=generator),
            "cls.predictions.bias": torch.randn(9, generator=generator),
        }
        save_file(state, tmp_path / name / "model.safetensors")
        model = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 9}
        (tmp_path / name / "config.json").write_text(json.dumps(model), encoding="utf-8")
    written = extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "ad" / "adapter_model.safetensors", 4)
    saved = load_file(tmp_path / "ad" / "adapter_model.safetensors")
    decoder = "base_model.model.cls.predictions.decoder"
    assert torch.equal(saved[f"{decoder}.weight"], state["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(saved[f"{decoder}.bias"], state["cls.predictions.bias"])
    assert written.plan is not None
    assert "is one tensor with 'cls.predictions.decoder.weight': all are saved whole" in " ".join(written.plan.notes)
    merge_lora(tmp_path / "base", tmp_path / "ad", tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(made["cls.predictions.decoder.weight"], state["bert.embeddings.word_embeddings.weight"])
    for key, value in state.items():
        torch.testing.assert_close(made[key], value, rtol=1e-4, atol=1e-4)


def test_an_embedding_with_a_forward_of_its_own_is_saved_whole() -> None:
    """PEFT calls the embedding that it puts there with what the own forward takes: a mask, in OPT."""

    class Positions(torch.nn.Embedding):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(mask.cumsum(1))

    live = torch.nn.ModuleDict({"embed_positions": Positions(9, 4), "fc": torch.nn.Linear(4, 4, bias=False)})
    tuned = {key: value + 1 for key, value in live.state_dict().items()}
    for base in (live, live.state_dict()):
        keys = [step.out.key for step in plan_extract_lora(base, tuned, 1).steps]
        assert keys == [
            "base_model.model.embed_positions.weight", "base_model.model.fc.lora_A.weight",
            "base_model.model.fc.lora_B.weight",
        ]  # fmt: skip


def test_what_has_no_factors_or_no_values_is_named(tmp_path: Path) -> None:
    """A change that is not finite, one of a dtype without arithmetic, and a tensor that the tuned model lacks."""
    base = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(4, 4)}
    with pytest.raises(RuleError, match=r"'b.weight': extract_lora: the change has values that are not finite"):
        extract_lora(base, base | {"b.weight": torch.full((4, 4), torch.inf)}, tmp_path / "adapter_model.safetensors")
    small = {key: value.to(torch.float8_e4m3fn) for key, value in base.items()}
    with pytest.raises(PlanError, match=r"'a.weight' changed, and LoRA can hold no factors of that"):
        plan_extract_lora(small, small | {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, 1)
    plan = plan_extract_lora(base, {"a.weight": torch.ones(4, 4)}, 1)
    assert plan.notes == ("the tuned model does not have 'b.weight', which stays as in the base",)
