"""Rules made of the conversions of transformers do what ``from_pretrained`` and ``save_pretrained`` do, bit for bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptkit import diff, execute, load_into, load_rules, plan_remap
from ckptkit.errors import CkptkitError, RuleError
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
DISTINCT = list({chains: name for name, chains in reversed(WITH_OPERATIONS.items())}.values())

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
    left_out = [chains for chains in set(WITH_OPERATIONS.values()) - tried]
    assert {chain for chains in left_out for chain in chains} <= {
        ("Interleave",), ("Interleave", "Chunk"),  # inkling_mm_model
        ("MergeModulelist",), ("MergeModulelist", "Concatenate"), ("Split",),  # sarvam_moe
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_operation_that_rules_lack_is_named(name: str, tmp_path: Path) -> None:
    """The error names the operation of the library."""
    model = _tiny(name)
    with pytest.raises(RuleError, match=REFUSED[name]):
        plan_remap(model, "transformers:auto:reverse")
    del tmp_path
