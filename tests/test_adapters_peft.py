"""Files of PEFT of every kind that is folded give the numbers that ``merge_and_unload`` gave for them.

The tensors follow a formula, and the sums are from peft 0.21. ``tests/oracles/test_peft_folds.py`` compares with peft.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckptkit import plan_lora
from ckptkit.adapters.peft import read_peft
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape
from ckptkit.tensor_ops.recipes import evaluate_recipe

P = "base_model.model."
State = dict[str, torch.Tensor]
BASE: dict[str, Shape] = {
    "lin.weight": (6, 8), "lin.bias": (6,), "emb.weight": (9, 8), "conv.weight": (6, 4, 3, 3), "g.weight": (8, 6),
    "ln.weight": (8,), "experts.gate_up_proj": (3, 10, 8), "experts.down_proj": (3, 8, 5),
}  # fmt: skip
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


def numbers(name: str, shape: Shape) -> torch.Tensor:
    """Return a tensor whose values depend only on its name and shape."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * 0.7 + sum(map(ord, name)) % 13).reshape(shape)


# case: (configuration, shapes of the adapter, key of the base -> the sum and a weighted sum that peft gives)
CASES: dict[str, tuple[dict[str, Any], dict[str, Shape], list[str]]] = {
    "dora": (
        {**LORA, "use_dora": True},
        {"lin.lora_A.weight": (2, 8), "lin.lora_B.weight": (6, 2), "lin.lora_magnitude_vector": (6,)}, ["lin.weight"],
    ),
    "dora of an embedding": (
        {**LORA, "use_dora": True},
        {"emb.lora_embedding_A": (2, 9), "emb.lora_embedding_B": (8, 2), "emb.lora_magnitude_vector": (8,)},
        ["emb.weight"],
    ),
    "dora of a convolution": (
        {**LORA, "use_dora": True, "use_rslora": True},
        {"conv.lora_A.weight": (2, 4, 3, 3), "conv.lora_B.weight": (6, 2, 1, 1),
         "conv.lora_magnitude_vector": (1, 6, 1, 1)},
        ["conv.weight"],
    ),
    "experts": (
        {**LORA, "target_parameters": ["experts.gate_up_proj", "down_proj"]},
        {"experts.base_layer.lora_A.weight": (6, 8), "experts.base_layer.lora_B.weight": (10, 6),
         "experts.lora_A.weight": (6, 5), "experts.lora_B.weight": (8, 6)},
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "adalora": (
        {"peft_type": "ADALORA", "init_r": 3, "r": 8, "lora_alpha": 6},
        {"lin.lora_A": (3, 8), "lin.lora_B": (6, 3), "lin.lora_E": (3, 1)}, ["lin.weight"],
    ),
    "loha": (
        {"peft_type": "LOHA", "r": 2, "alpha": 6},
        {"conv.hada_w1_a": (6, 2), "conv.hada_w1_b": (2, 36), "conv.hada_w2_a": (6, 2), "conv.hada_w2_b": (2, 36)},
        ["conv.weight"],
    ),
    "loha with kernels": (
        {"peft_type": "LOHA", "r": 2, "alpha": 6},
        {"conv.hada_t1": (2, 2, 3, 3), "conv.hada_w1_a": (2, 6), "conv.hada_w1_b": (2, 4),
         "conv.hada_t2": (2, 2, 3, 3), "conv.hada_w2_a": (2, 6), "conv.hada_w2_b": (2, 4)},
        ["conv.weight"],
    ),
    "lokr": (
        {"peft_type": "LOKR", "r": 1, "alpha": 6},
        {"conv.lokr_w1": (2, 2), "conv.lokr_w2_a": (3, 1), "conv.lokr_w2_b": (1, 18), "lin.lokr_w1": (2, 2),
         "lin.lokr_w2_a": (3, 1), "lin.lokr_w2_b": (1, 4)},
        ["conv.weight", "lin.weight"],
    ),
    "lokr of whole matrices": (
        {"peft_type": "LOKR", "r": 2, "alpha": 6},
        {"conv.lokr_w1": (2, 2), "conv.lokr_w2": (3, 2, 3, 3), "lin.lokr_w1": (2, 2), "lin.lokr_w2": (3, 4)},
        ["conv.weight", "lin.weight"],
    ),
    "ia3": (
        {"peft_type": "IA3", "feedforward_modules": ["conv"]},
        {"lin.ia3_l": (6, 1), "conv.ia3_l": (1, 4, 1, 1)}, ["lin.weight", "lin.bias", "conv.weight"],
    ),
    "norms": ({"peft_type": "LN_TUNING"}, {"ln.ln_tuning_layers.weight": (8,)}, ["ln.weight"]),
    "rows": (
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [7, 1]}, {"emb.trainable_tokens_delta": (2, 8)},
        ["emb.weight"],
    ),
}  # fmt: skip
EXPECTED: dict[str, dict[str, tuple[float, float]]] = {
    "dora": {"lin.weight": (-0.34263, 1.43785)},
    "dora of an embedding": {"emb.weight": (0.10634, 0.23403)},
    "dora of a convolution": {"conv.weight": (-0.00882, 0.10500)},
    "experts": {"experts.gate_up_proj": (-2.06012, -20.07219), "experts.down_proj": (-5.41384, -0.58598)},
    "adalora": {"lin.weight": (-1.41134, -17.35343)},
    "loha": {"conv.weight": (214.37487, -9.54717)},
    "loha with kernels": {"conv.weight": (3.69462, -1.76390)},
    "lokr": {"lin.weight": (18.63513, 14.80157), "conv.weight": (0.04549, 3.71880)},
    "lokr of whole matrices": {"lin.weight": (13.58194, 7.21056), "conv.weight": (1.63594, -1.47901)},
    "ia3": {"lin.weight": (-0.97593, -1.46274), "lin.bias": (-0.84600, 1.10004), "conv.weight": (-0.29657, -0.32365)},
    "norms": {"ln.weight": (0.89829, 0.40373)},
    "rows": {"emb.weight": (1.29326, -6.65704)},
}  # fmt: skip


def made_of(case: str) -> tuple[State, State]:
    """Return the base, and the tensors of it that the adapter changes."""
    config, shapes, _ = CASES[case]
    base = {key: numbers(key, shape) for key, shape in BASE.items()}
    adapter = {P + key: numbers(key, shape) for key, shape in shapes.items()}
    roles = {"base": as_checkpoint(base, "base"), "donor": as_checkpoint(adapter, "donor")}
    tensors = {"base": base, "donor": adapter}
    made = {}
    for step in plan_lora(roles["base"], roles["donor"], config).steps:
        sources = [tensors[source.role][source.key] for source in step.sources]
        if step.recipe is not None:
            made[step.out.key] = evaluate_recipe(step.recipe, step.sources, sources.__getitem__)[0]
        elif step.sources[0].role == "donor":
            made[step.out.key] = sources[0]
    return base, made


def fingerprint(tensor: torch.Tensor) -> tuple[float, float]:
    flat = tensor.double().flatten()
    return float(flat.sum()), float((flat * torch.arange(1, len(flat) + 1).double().cos()).sum())


@pytest.mark.parametrize("case", list(CASES))
def test_the_numbers_are_those_of_peft(case: str) -> None:
    """Exactly the tensors that the adapter names are changed, to the values of peft."""
    base, made = made_of(case)
    assert list(made) == sorted(CASES[case][2], key=list(base).index)
    found = {key: fingerprint(value) for key, value in made.items()}
    assert found.keys() == EXPECTED[case].keys()
    for key, values in EXPECTED[case].items():
        assert found[key] == pytest.approx(values, abs=2e-4)
        assert fingerprint(base[key]) != pytest.approx(values, abs=1e-2)


@pytest.mark.parametrize(
    ("config", "adapter", "reason"),
    [
        (
            {"peft_type": "PREFIX_TUNING"}, {"x": (1,)},
            "the type of the adapter is PREFIX_TUNING, which cannot be folded",
        ),
        (LORA | {"arrow_config": {}}, {}, "none of 0 tensors is a factor of the adapter"),
        (
            LORA | {"alora_invocation_tokens": [1]}, {},
            "the adapter uses alora_invocation_tokens, which cannot be folded",
        ),
        (
            {"peft_type": "LOKR", "r": 2, "alpha": 2}, {"c.lokr_w1": (1, 1), "c.lokr_w2": (5, 3, 3)},
            "'c.lokr_w2' is the kernel of a Conv1d",
        ),
        (
            {"peft_type": "LOHA", "r": 2, "alpha": 2}, {"c.hada_w1_a": (6, 2), "c.hada_w1_b": (2, 8)},
            "'c.hada_w1_a' has no partner in the adapter",
        ),
        (
            {"peft_type": "LOHA", "r": 3, "alpha": 2},
            {"c.hada_w1_a": (6, 2), "c.hada_w1_b": (2, 8), "c.hada_w2_a": (6, 2), "c.hada_w2_b": (2, 8)},
            "'c.hada_w1_b' is [2, 8], but the rank in the config is 3",
        ),
        (
            {"peft_type": "IA3", "feedforward_modules": ["lin"]}, {"lin.ia3_l": (6, 1)},
            "'lin.ia3_l' is [6, 1], which feedforward_modules of the config contradicts",
        ),
        (
            LORA | {"trainable_token_indices": {"other": [1]}}, {"emb.token_adapter.trainable_tokens_delta": (1, 8)},
            "the config's trainable_token_indices does not say which rows of 'emb' are replaced",
        ),
        (
            LORA | {"target_parameters": ["a", "b"]}, {"m.lora_A.weight": (6, 4), "m.lora_B.weight": (4, 6)},
            "'m.lora_A.weight' [6, 4] and its partner [4, 6] fit more than one of the target_parameters",
        ),
    ],
)  # fmt: skip
def test_what_is_not_folded_is_named(config: dict[str, Any], adapter: dict[str, Shape], reason: str) -> None:
    with pytest.raises(RuleError) as caught:
        read_peft(adapter, config, {"m.a": (3, 4, 4), "m.b": (3, 4, 4)})
    assert caught.value.reason.startswith(reason)
