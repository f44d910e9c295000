"""Rules made of the conversions of transformers do what ``from_pretrained`` and ``save_pretrained`` do, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import diff, execute, load_into, load_rules, plan_merge, plan_remap
from ckptkit.errors import CkptkitError, RuleError
from tests.helpers_cli import run_ckpt
from tests.helpers_tiny import model_classes, tiny_model

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

State = dict[str, torch.Tensor]


def _mapping() -> dict[str, list[Any]]:
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("legacy")  # fills the cache
    found: dict[str, list[Any]] = conversion_mapping._checkpoint_conversion_mapping_cache
    return found


def _chains(transforms: list[Any]) -> frozenset[tuple[str, ...]]:
    """Return the chains of operations of a model type, by the names of their classes."""
    return frozenset(
        tuple(type(operation).__name__ for operation in item.operations)
        for item in transforms
        if hasattr(item, "operations")
    )


WITH_OPERATIONS = {name: chains for name, transforms in _mapping().items() if (chains := _chains(transforms))}

# Numbers that the default configuration needs before a small model can be built.
MORE: dict[str, dict[str, Any]] = {
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "inkling2": {"text_hidden_size": 32},
    "inkling2_loop": {"text_hidden_size": 32},
    "glm5_next": {"num_key_value_heads": 4, "index_topk": 16},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 16},
    "nemo_speechlm": {"audio_hidden_size": 32, "blank_token_id": 90, "num_key_value_heads": 4},
    "ernie4_5_vl_moe": {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
}
# Parts of other models, which have no class of their own at the top of the library, and models that cannot be small.
NOT_BUILT: dict[str, str] = {
    "step3p5_vision": "the vision part of step3p7",
    "dots3_note_vision_encoder": "the vision part of dots3_note",
    "UnlimitedOcrVisionEncoder": "the vision part of unlimited_ocr",
    "qwen3_omni_moe_text": "the text part of qwen3_omni_moe_thinker",
    "qwen3_omni_moe": "the library cannot build its default configuration",
    "sarvam_moe": "the library has no class for it",
    "sarvam_mla": "the library has no class for it",
    "inkling_mm_model": "it needs scipy",
    "timm_wrapper": "it needs timm",
    "MtpModel": "a part that other models have",
    "mlcd_vision": "the vision part of mlcd",
    "xCLIPVisionModel": "the library has no class of this name",
    "xCLIPTextModel": "the library has no class of this name",
    "gemma3n_text": "no small configuration builds",
    "Dots3NoteModel": "its layers differ, and no small configuration builds",
    "Dots3NoteTextModel": "its layers differ, and no small configuration builds",
}
# These have operations that only these models have, and that rules do not have.
REFUSED = {
    "inkling2": "Inkling2UnpadVocab",
    "inkling2_text": "Inkling2UnpadVocab",
    "inkling2_loop": "Inkling2",
    "inkling2_loop_text": "Inkling2",
}


def _tiny(name: str) -> Any:
    if name in NOT_BUILT:
        pytest.skip(f"{name} cannot be built here: {NOT_BUILT[name]}")
    errors = []
    for model_class in model_classes(name)[:3]:
        try:
            return tiny_model(model_class, **MORE.get(name, {}))
        except Exception as error:  # noqa: BLE001 - any error of the library means the next class
            errors.append(f"{model_class.__name__}: {error}")
    raise AssertionError(f"no small model of {name}: {errors}")


def _files(directory: Path) -> State:
    return {key: value for file in sorted(directory.glob("*.safetensors")) for key, value in load_file(file).items()}


def _assert_same(found: State, wanted: State) -> None:
    assert sorted(found) == sorted(wanted)
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(_bits(found[key]), _bits(tensor)), key


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _unsaved(model: Any) -> set[str]:
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def check_both_directions(model: Any, tmp_path: Path, name: str = "auto") -> None:
    """What ``save_pretrained`` writes becomes the live state_dict again, and the live state_dict becomes that file."""
    saved = tmp_path / "saved"
    live = {key: value.detach().clone() for key, value in model.state_dict().items() if key not in _unsaved(model)}
    model.save_pretrained(saved)
    execute(plan_remap(saved, f"transformers:{name}"), saved, tmp_path / "live.safetensors")
    _assert_same(load_file(tmp_path / "live.safetensors"), live)
    execute(plan_remap(model, f"transformers:{name}:reverse"), model, tmp_path / "disk.safetensors")
    _assert_same(load_file(tmp_path / "disk.safetensors"), _files(saved))


@pytest.mark.parametrize("name", [name for name in WITH_OPERATIONS if name not in REFUSED])
def test_a_model_with_operations_goes_both_ways(name: str, tmp_path: Path) -> None:
    """Each model type whose conversion has tensor operations is converted as the library does it."""
    check_both_directions(_tiny(name), tmp_path)


def test_each_set_of_operations_is_tried() -> None:
    """Each distinct set of operations has a model type that is built here, or is refused by name."""
    tried = {WITH_OPERATIONS[name] for name in WITH_OPERATIONS if name not in NOT_BUILT or name in REFUSED}
    left_out = set(WITH_OPERATIONS.values()) - tried
    assert {chain for chains in left_out for chain in chains} <= {
        ("Interleave",), ("Interleave", "Chunk"),  # inkling_mm_model
        ("MergeModulelist",), ("MergeModulelist", "Concatenate"), ("Split",),  # sarvam_moe
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in sorted(REFUSED) if name in WITH_OPERATIONS])
def test_an_operation_that_rules_lack_is_named(name: str) -> None:
    """The error names the operation of the library."""
    with pytest.raises(RuleError, match=REFUSED[name]):
        plan_remap(_tiny(name), "transformers:auto:reverse")


def _mixtral(**settings: Any) -> Any:
    from transformers import MixtralForCausalLM

    return tiny_model(MixtralForCausalLM, **settings)


@pytest.mark.parametrize(
    "settings", [{"tie_word_embeddings": True}, {"num_local_experts": 12, "num_experts": 12, "num_hidden_layers": 11}]
)
def test_ties_and_numbers_of_two_digits(settings: dict[str, Any], tmp_path: Path) -> None:
    """A tied head is copied, and left out again; experts go by number, and not by the order of their names."""
    check_both_directions(_mixtral(**settings), tmp_path)


def test_a_head_that_is_not_tied_in_fact_is_not_left_out(tmp_path: Path) -> None:
    """Where the configuration ties the head, another head in the file is refused before the output is written."""
    model = _mixtral(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "saved")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["lm_head.weight"] += 1
    torch.save(state, tmp_path / "saved" / "live.pt")
    plan = plan_remap(tmp_path / "saved" / "live.pt", "transformers:auto:reverse")
    with pytest.raises(CkptkitError, match="lm_head"):
        execute(plan, tmp_path / "saved" / "live.pt", tmp_path / "disk.safetensors")


def test_shards_are_converted_across_files(tmp_path: Path) -> None:
    """Experts of one layer may be in several files."""
    model = _mixtral()
    model.save_pretrained(tmp_path / "saved", max_shard_size="20kB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 5
    execute(plan_remap(tmp_path / "saved", "transformers:auto"), tmp_path / "saved", tmp_path / "live.safetensors")
    _assert_same(load_file(tmp_path / "live.safetensors"), dict(model.state_dict()))


def test_load_into_diff_and_merge_take_the_rules(tmp_path: Path) -> None:
    """A live model gets the values of a directory, and ``diff`` and ``merge`` see that they fit."""
    from transformers import MixtralForCausalLM, MixtralModel

    model = _mixtral()
    model.save_pretrained(tmp_path)
    other = MixtralForCausalLM(model.config)
    assert not diff(other, tmp_path, "transformers:auto").different
    assert len(plan_merge(other, tmp_path, "transformers:auto").steps) == len(other.state_dict())
    load_into(other, tmp_path, "transformers:auto")
    _assert_same(dict(other.state_dict()), dict(model.state_dict()))
    body = MixtralModel(model.config)
    result = diff(body, tmp_path, "transformers:auto")
    assert [info.key for info in result.unexpected] == ["lm_head.weight"]
    assert not result.missing
    body.save_pretrained(tmp_path / "body")
    result = diff(other, tmp_path / "body", "transformers:auto")
    assert [info.key for info in result.missing] == ["lm_head.weight"]
    assert not result.unexpected


def test_live_names_in_a_file_stay(tmp_path: Path) -> None:
    """A file that has the model's own names and shapes already is not changed."""
    model = _mixtral()
    model.config.architectures = ["MixtralForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "live.pt")
    assert not diff(model, tmp_path / "live.pt", "transformers:auto").different


def test_a_model_type_without_its_configuration(tmp_path: Path) -> None:
    """Experts need only names; the order of rotated rows needs the number of heads, and says so."""
    model = _mixtral()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    execute(plan_remap(tmp_path, "transformers:mixtral"), tmp_path, tmp_path / "live.pt")
    _assert_same(torch.load(tmp_path / "live.pt"), dict(model.state_dict()))
    with pytest.raises(RuleError, match=r"no config\.json"):
        plan_remap(tmp_path / "live.pt", "transformers:auto")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    """A file that lacks one expert of one layer is refused, whichever it is."""
    model = _mixtral()
    model.save_pretrained(tmp_path / "saved")
    state = _files(tmp_path / "saved")
    for expert in (0, 1, 3):
        lacking = {
            key: value for key, value in state.items() if f"layers.1.block_sparse_moe.experts.{expert}.w3" not in key
        }
        with pytest.raises(RuleError, match=r"lacks .*experts"):
            plan_remap(lacking, load_rules("transformers:auto", config=tmp_path / "saved"))


OLD_PREFIXES = [
    name for name, transforms in _mapping().items() if any(type(item).__name__ == "PrefixChange" for item in transforms)
]


@pytest.mark.parametrize("name", OLD_PREFIXES)
def test_older_names_become_what_from_pretrained_makes_of_them(name: str, tmp_path: Path) -> None:
    """A file with the names of before is converted as ``from_pretrained`` converts it."""
    from transformers import conversion_mapping, core_model_loading

    model = _tiny(name)
    model.save_pretrained(tmp_path / "saved")
    state = _files(tmp_path / "saved")
    # PrefixChange is not reverted by save_pretrained; it is here.
    changes = [
        item.reverse_transform()
        for item in reversed(conversion_mapping.get_model_conversion_mapping(model, add_legacy=False))
        if isinstance(item, core_model_loading.PrefixChange)
    ]
    for file in (tmp_path / "saved").glob("*.safetensors*"):
        file.unlink()
    old = {core_model_loading.apply_renamings(key, changes): value.clone() for key, value in state.items()}
    save_file(old, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    execute(plan_remap(tmp_path / "saved", "transformers:auto"), tmp_path / "saved", tmp_path / "live.safetensors")
    made = load_file(tmp_path / "live.safetensors")
    wanted = {key: value for key, value in loaded.state_dict().items() if key not in _unsaved(model)}
    assert made.keys().isdisjoint(info["missing_keys"])
    _assert_same(
        {key: value for key, value in made.items() if key in wanted},
        {key: value for key, value in wanted.items() if key not in info["missing_keys"]},
    )


def test_nothing_of_the_configuration_is_run(tmp_path: Path) -> None:
    """Code, other weights and other implementations that config.json names are left alone; numbers have limits."""
    model = _mixtral()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    evil = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "attn_implementation": "kernels-community/evil",
        "_attn_implementation": "flash_attention_2",
        "quantization_config": {"quant_method": "evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config | evil))
    assert not diff(model, tmp_path, load_rules("transformers:auto", config=tmp_path)).different
    assert "evil" not in sys.modules
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(RuleError, match="num_hidden_layers"):
        plan_remap(tmp_path, "transformers:auto")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(RuleError, match="evil"):
        plan_remap(tmp_path, "transformers:auto")


def test_nothing_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone that is the name of a repository is refused without a look-up, and the library is as before."""
    from huggingface_hub import constants

    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("detr", "upernet", "dpt", "vitpose"):
        config = {"model_type": name, "backbone": "microsoft/resnet-50", "use_timm_backbone": False}
        with pytest.raises(RuleError, match="nothing is downloaded"):
            plan_remap({"a": torch.ones(1)}, load_rules("transformers:auto", config=config))
    assert not asked
    assert constants.HF_HUB_OFFLINE is False


def test_what_a_configuration_says_wrongly_is_named(tmp_path: Path) -> None:
    """Many labels are refused before the library lists them, and the error has the library's reason."""
    model = _mixtral()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, message in (
        ({"num_labels": 10**9}, "'num_labels' is 1,000,000,000"),
        ({"num_hidden_layers": "12"}, "'num_hidden_layers'.*expected int"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(RuleError, match=message):
            plan_remap(tmp_path, "transformers:auto")
    with pytest.raises(RuleError) as caught:
        plan_remap(tmp_path, "transformers:Mixtral")
    assert caught.value.hint == "did you mean transformers:mixtral?"


def test_the_configuration_may_be_beside_the_other_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of the live names has no configuration, and is compared with a directory that has one."""
    model = _mixtral()
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "live.pt")
    result = diff(tmp_path / "saved", tmp_path / "live.pt", "transformers:auto:reverse")
    assert not result.different
    plan = plan_merge(tmp_path / "saved", tmp_path / "live.pt", "transformers:auto:reverse")
    assert plan.coverage == 1
    ran = run_ckpt(capsys, "diff", tmp_path / "saved", tmp_path / "live.pt", "--rules", "transformers:auto:reverse")
    assert ran.code == 0, ran.err


def test_a_checkpoint_without_any_name_of_the_model_is_noted(tmp_path: Path) -> None:
    """Rules that change nothing since all names are others do not pass for rules that had nothing to do."""
    model = _mixtral()
    model.save_pretrained(tmp_path)
    rules = load_rules("transformers:auto", config=tmp_path)
    (note,) = plan_remap({f"net.{key}": value for key, value in model.state_dict().items()}, rules).notes
    assert note.endswith("0 of 21 keys renamed or converted; no key is one of MixtralForCausalLM")
    (note,) = plan_remap(model, rules).notes
    assert note.endswith("0 of 21 keys renamed or converted")


def test_the_rules_are_few_and_can_be_read(tmp_path: Path) -> None:
    """A rule stands for all layers and experts, and says where it is from."""
    model = _mixtral(num_local_experts=12, num_experts=12)
    model.save_pretrained(tmp_path)
    expert, stacked = "model.layers.{i}.block_sparse_moe.experts", "model.layers.{i:int}.mlp.experts.down_proj"
    steps = plan_remap(tmp_path, "transformers:auto").steps
    old, new = f"{expert.replace('{i}', '{i:int}')}.{{j:int}}.w2.weight", stacked.replace("{i:int}", "{i}")
    assert {step.rule for step in steps if step.out.key.endswith("down_proj")} == {
        f"rule '{old}={new}' (transformers:auto)"
    }
    reverse = plan_remap(model, "transformers:mixtral:reverse").steps
    names = f"{expert}.0.w2.weight, ..., {expert}.11.w2.weight"
    assert {step.rule for step in reverse if step.out.key.endswith("w2.weight")} == {
        f"rule '{stacked}={names}' (transformers:mixtral:reverse)"
    }


def test_the_hint_of_diff_names_the_rules(tmp_path: Path) -> None:
    """Without rules, ``diff`` of a live model and its directory says which rules fit."""
    model = _mixtral()
    model.save_pretrained(tmp_path)
    (hint,) = diff(model, tmp_path).hints
    assert "transformers:auto" in hint.message
    with pytest.raises(CkptkitError) as caught:
        plan_merge(model, tmp_path)
    assert "--rules transformers:auto" in str(caught.value.hint)
