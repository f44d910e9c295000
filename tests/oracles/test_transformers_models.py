"""Models of transformers: their weight decay, their ties, and weights that are not quantised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptkit import build_param_groups, param_group_preset, validate_param_groups
from ckptkit.core.findings import Finding
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.quantized import quantized_weights
from tests.helpers_presets import Mixed, rates


def test_hf_trainer_selects_the_same_names_as_transformers() -> None:
    """There an RMSNorm named ln_1 decays and a matrix in bias_proj does not; in the preset no-decay it is reversed."""
    trainer = pytest.importorskip("transformers.trainer").Trainer
    model = Mixed()
    decaying = set(trainer.get_decay_parameter_names(None, model))
    spec = param_group_preset("hf-trainer", model, weight_decay=0.5)
    found = {name for name, (_, decay) in rates(model, spec).items() if decay}
    assert found == decaying
    assert {"ln_1.weight", "bn.weight", "scale"} < decaying
    assert "bias_proj.weight" not in decaying
    corrected = rates(model, param_group_preset("no-decay", model, weight_decay=0.5))
    assert {name for name, (_, decay) in corrected.items() if decay} == {
        name for name, parameter in model.named_parameters() if parameter.ndim > 1
    }


def test_a_changed_preset_trains_bert_as_it_says() -> None:
    """The Trainer's weight decay stays, the rates fall by layer, the head is faster, and the embeddings are frozen."""
    transformers = pytest.importorskip("transformers")
    trainer = pytest.importorskip("transformers.trainer").Trainer
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_hidden_layers=3))
    decaying = set(trainer.get_decay_parameter_names(None, model))
    spec = (
        param_group_preset("hf-trainer", lr=0.01, weight_decay=0.1)
        .with_modifier("depth", layers=["bert.encoder.layer.{i:int}.*", "*"], layer_decay=0.5)
        .with_modifier("head", "classifier.*", lr_mult=10)
        .freeze("bert.embeddings.*")
    )
    optimizer = torch.optim.AdamW(build_param_groups(model, spec))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, (rate, decay) in found.items():
        layer = int(name.split(".")[3]) if ".layer." in name else 3
        assert rate == pytest.approx(0.01 * 0.5 ** (3 - layer) * (10 if name.startswith("classifier.") else 1))
        assert decay == (0.1 if name in decaying else 0.0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in names.values() if name.startswith("bert.embeddings.")}
    assert found.keys() == set(names.values()) - frozen


ARCHITECTURES: tuple[tuple[str, dict[str, object]], ...] = (
    ("ResNetConfig", {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}),
    ("SwinConfig", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32}),
    ("MixtralConfig", {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8,
                                  "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}),
    ("BertConfig", {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8,
                            "num_attention_heads": 2}),
)  # fmt: skip


@pytest.mark.parametrize(("config", "sizes"), ARCHITECTURES, ids=[row[0] for row in ARCHITECTURES])
def test_real_architectures_are_not_quantised(config: str, sizes: dict[str, object]) -> None:
    """The parameters and buffers of ordinary models are never taken for codes and companions."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(getattr(transformers, config)(**sizes))
    assert not quantized_weights(as_checkpoint(dict(model.state_dict()), "whole"))
    assert not quantized_weights(as_checkpoint(dict(model.to(torch.float8_e4m3fn).state_dict()), "fp8"))


def findings(model: nn.Module) -> tuple[Finding, ...]:
    return validate_param_groups(model, torch.optim.AdamW(model.parameters())).findings


def test_a_tied_model_of_transformers_that_lost_its_tie() -> None:
    """to_empty() unties; tie_weights() ties again."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    assert findings(model) == ()
    model.load_state_dict(transformers.LlamaForCausalLM(config).state_dict(), assign=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    (finding,) = findings(model)
    assert (finding.code, finding.severity, finding.key) == ("groups.tie-lost", "error", "lm_head.weight")
    model.tie_weights()
    assert findings(model) == ()
