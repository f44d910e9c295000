"""Models of other libraries that load with their own code: ``diff`` says what ``load_state_dict`` does with them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import diff, load_into

pytestmark = pytest.mark.filterwarnings("ignore")
Renames = dict[str, str]


def working(name: str) -> Any:
    """Return a module, or skip the test where its library is missing or was built for another torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


def detection() -> nn.Module:
    models = working("torchvision.models.detection")
    model: nn.Module = models.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    return model


def vit() -> nn.Module:
    models = working("torchvision.models")
    model: nn.Module = models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16
    )
    return model


def peft_lora() -> nn.Module:
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    model: nn.Module = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]))
    return model


def timm_vit() -> nn.Module:
    timm = working("timm")
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3
    )
    return model


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def wav2vec() -> nn.Module:
    """Its convolution of positions has weight norm, whose old names published files still have."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=10, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        conv_dim=(8,), conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model: nn.Module = transformers.Wav2Vec2Model(config)
    return model


WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
MODELS: dict[str, tuple[Callable[[], nn.Module], Renames]] = {
    "detection": (detection, {".0.0.weight": ".weight", ".0.0.bias": ".bias"}),
    "vit": (vit, {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}),
    "peft": (peft_lora, {".default": "", "modules_to_save.": ""}),
    "timm": (timm_vit, {"blocks.": "module.blocks."}),
    "llama": (llama, {"model.layers": "layers"}),
    "wav2vec": (wav2vec, WEIGHT_NORM),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_verdict_is_that_of_torch(name: str) -> None:
    """Of its own state_dict, and of ones with old names, without a key, and with one more."""
    build, renames = MODELS[name]
    model = build()
    own = model.state_dict()
    old = dict(own)
    for new, text in renames.items():
        old = {key.replace(new, text): value for key, value in old.items()}
    variants: dict[str, Any] = {
        "own": own,
        "plain": dict(own),
        "old": old,
        "less": dict(list(own.items())[1:]),
        "more": {**own, "more": torch.ones(1)},
        "empty": {},
    }
    for variant, state in variants.items():
        result = diff(model, state)
        assert not result.undecided
        for strict, said in ((True, result.loads_strict), (False, result.loads)):
            assert said == loads(copy.deepcopy(model), copy.copy(state), strict=strict), (variant, strict, result)


@pytest.mark.parametrize("name", ["detection", "vit", "wav2vec"])
def test_old_names_are_loaded(name: str) -> None:
    """``load_into`` gives each value of old names, as torch does."""
    build, renames = MODELS[name]
    model, donor = build(), build()
    old = dict(donor.state_dict())
    for new, text in renames.items():
        old = {key.replace(new, text): value for key, value in old.items()}
    if not loads(copy.deepcopy(model), dict(old), strict=True):
        pytest.skip("this version of the library does not take these old names")
    assert diff(model, old).moved
    assert load_into(model, old).coverage == 1
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in model.state_dict().items())


def loads(model: nn.Module, state: Any, *, strict: bool) -> bool:
    try:
        model.load_state_dict(state, strict=strict)
    except Exception:  # noqa: BLE001 - hooks raise anything
        return False
    return True
