"""The methods of peft on a tiny Llama train with AdamW and get no finding above a note."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers_healthy import Setup, language_model, loud_findings, split_by_decay

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
IN_MLP = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
TOKENS = {"num_virtual_tokens": 3}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 2, **TARGETS}),
    "LoRA with a trained head": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head"], **TARGETS}),
    "LoRA with dropout and biases": ("LoraConfig", {"r": 2, "lora_dropout": 0.1, "bias": "lora_only", **TARGETS}),
    "rsLoRA": ("LoraConfig", {"r": 2, "use_rslora": True, **TARGETS}),
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True, **TARGETS}),
    "PiSSA": ("LoraConfig", {"r": 2, "init_lora_weights": "pissa", **TARGETS}),
    "OLoRA": ("LoraConfig", {"r": 2, "init_lora_weights": "olora", **TARGETS}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, **TARGETS}),
    "IA3": ("IA3Config", IN_MLP),
    "LoHa": ("LoHaConfig", {"r": 2, **TARGETS}),
    "LoKr": ("LoKrConfig", {"r": 2, **TARGETS}),
    "OFT": ("OFTConfig", {"oft_block_size": 4, **TARGETS}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, **TARGETS}),
    "HRA": ("HRAConfig", {"r": 2, **TARGETS}),
    "VeRA": ("VeraConfig", {"r": 2, **TARGETS}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, **TARGETS}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 10, **TARGETS}),
    "Bone": ("BoneConfig", {"r": 2, **TARGETS}),
    "MiSS": ("MissConfig", {"r": 2, **TARGETS}),
    "RandLora": ("RandLoraConfig", {"r": 2, **TARGETS}),
    "SHiRA": ("ShiraConfig", {"r": 2, **TARGETS}),
    "C3A": ("C3AConfig", {"block_size": 8, **TARGETS}),
    "RoAd": ("RoadConfig", {"group_size": 2, **TARGETS}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "trainable tokens": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [3, 4]}),
    "prompt tuning": ("PromptTuningConfig", TOKENS),
    "P-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 8, **TOKENS}),
    "prefix tuning": ("PrefixTuningConfig", TOKENS),
    "adaption prompt": ("AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 1}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_peft(method: str) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    name, options = METHODS[method]
    if not hasattr(peft, name):
        pytest.skip(f"this peft has no {name}")
    torch.manual_seed(0)
    base = language_model(transformers.LlamaForCausalLM)
    model = peft.get_peft_model(base.model, getattr(peft, name)(task_type="CAUSAL_LM", **options)).train()
    optimizer = torch.optim.AdamW(split_by_decay(model), lr=0.01)
    assert loud_findings(Setup(model, optimizer, base.loss)) == []


@pytest.mark.parametrize("which", ["first", "second"])
def test_one_of_two_adapters_trains(which: str) -> None:
    """The adapter that is not active is frozen."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = language_model(transformers.LlamaForCausalLM)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **TARGETS)
    model = peft.get_peft_model(base.model, config, adapter_name="first")
    model.add_adapter("second", config)
    model.set_adapter(which)
    optimizer = torch.optim.AdamW(split_by_decay(model), lr=0.01)
    assert loud_findings(Setup(model, optimizer, base.loss)) == []
