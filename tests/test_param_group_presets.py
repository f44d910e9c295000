"""Presets give each parameter the options of their sources, or say where they differ.

The expected numbers were recorded from the sources for these models: timm 1.0.31, BEiT (microsoft/unilm 2312c6f),
ConvNeXt 048efce, detectron2 02b5c4e, mup 1.0.0, and the rates of fastai 2.8.12. LoRA+ (peft 0.21.2) and the recipe of
Zhang et al. (revisit-bert-finetuning 0aa4f4e) were compared for real GPT-2, BERT, RoBERTa and ELECTRA; these tests use
small models with the same names.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.core.patterns import parse_pattern
from ckptkit.errors import GroupsError
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.plan import plan_param_groups
from ckptkit.param_groups.presets import (
    param_group_phases,
    param_group_preset,
    param_group_preset_names,
    preset_summary,
)
from ckptkit.param_groups.presets.name_patterns import patterns_of
from ckptkit.param_groups.validate import validate_param_groups
from tests.features import needs_optimizer
from tests.helpers_presets import Mixed, NextLike, VitLike, bert_like, built, numbers, perceptron, rates

Numbers = dict[tuple[float, float], str]
VIT_VECTORS = "blocks.0.gamma blocks.0.norm1.weight blocks.0.norm1.bias"


def expect(table: Numbers) -> dict[str, Any]:
    """Return the expected numbers by parameter."""
    return {name: pytest.approx(value, rel=1e-12) for value, names in table.items() for name in names.split()}


def test_the_groups_of_timm_and_their_order() -> None:
    """The group without decay comes first and has no_weight_decay(). With weight_decay = 0 there is one group."""
    model = VitLike()
    spec = param_group_preset("timm-weight-decay", model, lr=1.0, weight_decay=0.5)
    decaying = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "head.weight"]
    names = [name for name, _ in model.named_parameters()]
    assert built(model, spec) == [[name for name in names if name not in decaying], decaying]
    assert {value[1] for name, value in rates(model, spec).items() if name in decaying} == {0.5}
    assert built(model, param_group_preset("timm-weight-decay", model, weight_decay=0.0)) == [names]


TIMM_LAYERS: Numbers = {
    (0.2, 0.0): "cls_token pos_embed patch_embed.proj.bias",
    (0.2, 0.5): "patch_embed.proj.weight",
    (0.25, 0.0): VIT_VECTORS,
    (0.25, 0.5): "blocks.0.attn.qkv.weight",
    (0.5, 0.0): f"{VIT_VECTORS.replace('.0.', '.1.')} norm.weight norm.bias",
    (0.5, 0.5): "blocks.1.attn.qkv.weight",
    (1.0, 0.5): "head.weight",
    (1.0, 0.0): "head.bias",
}
BEIT_LAYERS: Numbers = {
    (0.125, 0.0): "cls_token pos_embed patch_embed.proj.bias",
    (0.125, 0.5): "patch_embed.proj.weight",
    (0.25, 0.0): VIT_VECTORS,
    (0.25, 0.5): "blocks.0.attn.qkv.weight",
    (0.5, 0.0): VIT_VECTORS.replace(".0.", ".1."),
    (0.5, 0.5): "blocks.1.attn.qkv.weight",
    (1.0, 0.0): "norm.weight norm.bias head.bias",
    (1.0, 0.5): "head.weight",
}


@pytest.mark.parametrize("lr_scale", [False, True], ids=["lr", "lr_scale"])
@pytest.mark.parametrize(
    ("name", "settings", "table"),
    [("timm-layer-decay", {"min_scale": 0.2}, TIMM_LAYERS), ("beit-layer-decay", {}, BEIT_LAYERS)],
    ids=["timm", "beit"],
)
def test_layers_of_a_vit_decay_as_in_the_source(
    name: str, settings: dict[str, Any], table: Numbers, lr_scale: bool
) -> None:
    """The factor is in the learning rate or, with ``lr_scale``, in an option of its own."""
    model = VitLike()
    spec = param_group_preset(name, model, lr=1.0, weight_decay=0.5, layer_decay=0.5, lr_scale=lr_scale, **settings)
    assert rates(model, spec) == expect(table)
    groups = build_param_groups(model, spec)
    assert {"lr_scale" in group for group in groups} == {lr_scale}
    assert validate_param_groups(model, torch.optim.AdamW(groups)).ok


def test_freezing_renumbers_no_layer_of_timm() -> None:
    """Frozen parameters count as layers too, as in timm."""
    model = VitLike(4)
    before = rates(model, param_group_preset("timm-layer-decay", model))
    model.blocks[:2].requires_grad_(False)
    after = rates(model, param_group_preset("timm-layer-decay", model))
    assert after == {name: value for name, value in before.items() if name in after}
    assert len(after) < len(before)


def test_a_model_without_known_layers_is_refused_with_a_hint() -> None:
    with pytest.raises(GroupsError, match=r"preset 'timm-layer-decay': the model has no group_matcher\(\)"):
        param_group_preset("timm-layer-decay", nn.Linear(2, 2))
    with pytest.raises(GroupsError, match=r"no parameters named stages\.0") as caught:
        param_group_preset("convnext-layer-decay", VitLike())
    assert "timm-layer-decay" in (caught.value.hint or "")


def _next_layer(name: str) -> int:
    """Return the layer that ConvNeXt's own code gives to a name for [3, 3, 27, 3]."""
    recorded: dict[str, list[int | None]] = {"downsample_layers": [0, 2, 3, 12], "stages": [1, 2, None, 12]}
    part, *numbers = name.split(".")
    if part not in recorded:
        return 13
    layer = recorded[part][int(numbers[0])]
    return [3, 4, 5, 6, 7, 8, 9, 10, 11][int(numbers[1]) // 3] if layer is None else layer


def test_convnext_has_its_twelve_layers_below_the_head_and_other_depths_are_counted() -> None:
    model = NextLike((3, 3, 27, 3))
    spec = param_group_preset("convnext-layer-decay", model, lr=1.0, layer_decay=0.5)
    assert {name: lr for name, (lr, _) in rates(model, spec).items()} == {
        name: 0.5 ** (13 - _next_layer(name)) for name, _ in model.named_parameters()
    }
    short = NextLike((1, 1, 4, 1))
    layers = plan_param_groups(short, param_group_preset("convnext-layer-decay", short))
    found = {one.name: one.layer for group in layers.groups for one in group.parameters}
    assert (found["stages.2.2.pwconv1.weight"], found["stages.2.3.pwconv1.weight"]) == (3, 4)
    assert (found["downsample_layers.3.0.weight"], found["stages.3.0.pwconv1.weight"], found["head.bias"]) == (5, 5, 6)


def test_bert_decays_from_the_head_down_to_the_embeddings() -> None:
    """The preset needs names only, so a checkpoint is enough."""
    spec = param_group_preset("bert-layer-decay", lr=1.0, weight_decay=0.25, layer_decay=0.5)
    layer = "bert.encoder.layer.{0}.attention.self.query"
    vectors = f"{layer}.bias bert.encoder.layer.{{0}}.output.LayerNorm.weight"
    assert rates(bert_like(), spec) == expect(
        {
            (1.0, 0.0): "bert.pooler.dense.weight classifier.weight classifier.bias",
            (0.5, 0.25): f"{layer}.weight".format(1),
            (0.5, 0.0): vectors.format(1),
            (0.25, 0.25): f"{layer}.weight".format(0),
            (0.25, 0.0): vectors.format(0),
            (0.125, 0.25): "bert.embeddings.word_embeddings.weight",
            (0.125, 0.0): "bert.embeddings.LayerNorm.weight bert.embeddings.LayerNorm.bias",
        }
    )


def test_norms_and_biases_of_detectron2() -> None:
    """A bias of a norm counts as a bias. An RMSNorm counts as a norm only with ``norm = { role = "norm" }``."""
    model = Mixed()
    given: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.5, "weight_decay_norm": 0.25}
    spec = param_group_preset("detectron2", model, **given, bias_lr_mult=2.0, weight_decay_bias=0.0)
    assert rates(model, spec) == expect(
        {
            (1.0, 0.5): "pos scale conv.weight ln_1.weight q_norm.weight bias_proj.weight fc.weight",
            (2.0, 0.0): "conv.bias bn.bias norms.0.bias norms.1.bias bias_proj.bias fc.bias",
            (1.0, 0.25): "bn.weight norms.0.weight norms.1.weight",
        }
    )
    wider = rates(model, param_group_preset("detectron2", model, **given, norm={"role": "norm"}))
    assert wider["ln_1.weight"] == (1.0, 0.25)
    assert wider["fc.bias"] == (1.0, 0.5)


BASE_SHAPES: dict[str, list[int | None]] = {  # as mup writes them for widths of 8 and 16
    "0.weight": [8, None],
    "0.bias": [8],
    "1.weight": [8],
    "1.bias": [8],
    "2.weight": [16, 8],
    "2.bias": [16],
    "3.weight": [None, 16],
    "3.bias": [None],
}


@pytest.mark.parametrize("base", [BASE_SHAPES, perceptron(8), dict(perceptron(8).state_dict())], ids=lambda _: "")
@pytest.mark.parametrize(
    ("rule", "table"),
    [
        ("adam", {(0.25, 2.0): "2.weight", (1.0, 0.5): "0.weight 0.bias 1.weight 1.bias 2.bias 3.weight 3.bias"}),
        ("sgd", {(1.0, 0.5): "2.weight 3.bias", (4.0, 0.125): "0.weight 0.bias 1.weight 1.bias 2.bias 3.weight"}),
    ],
    ids=["MuAdamW", "MuSGD"],
)
def test_widths_scale_rates_as_in_mup(base: Any, rule: str, table: Numbers) -> None:
    """The base is a base-shape file, a live model or a checkpoint. Nothing is stored on Parameters."""
    model = perceptron(32)
    spec = param_group_preset("mup", model, lr=1.0, weight_decay=0.5, rule=rule, base_shapes=base)
    assert rates(model, spec) == expect(table)
    assert not any(vars(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ({"0.weight": [8, None]}, "base_shapes has no '0.bias'"),
        ({**BASE_SHAPES, "9.weight": [1]}, "base_shapes has '9.weight', which the model does not have"),
        ({**BASE_SHAPES, "0.bias": [8, 8]}, "base_shapes has 2 dimensions for '0.bias'"),
        ({**BASE_SHAPES, "0.bias": [0]}, "base_shapes of '0.bias' is [0]"),
        (7, "base_shapes is an int"),
    ],
    ids=["missing", "extra", "dimensions", "zero", "int"],
)
def test_base_shapes_of_another_model_are_refused(base: Any, reason: str) -> None:
    with pytest.raises(GroupsError, match=re.escape(reason)):
        param_group_preset("mup", perceptron(32), base_shapes=base)


LORA_NAMES = {
    "base_model.model.h.0.attn.lora_A.default.weight": (2, 4),
    "base_model.model.h.0.attn.lora_B.default.weight": (4, 2),
    "base_model.model.h.0.attn.lora_B.default.bias": (4,),
    "base_model.model.wte.lora_embedding_A.default": (2, 4),
    "base_model.model.wte.lora_embedding_B.default": (4, 2),
    "base_model.model.ln_f.modules_to_save.default.weight": (4,),
    "base_model.model.head.modules_to_save.default.weight": (3, 4),
}


def test_the_rates_of_lora_plus_and_a_warning_where_they_differ_from_peft() -> None:
    """peft multiplies the rate of a saved norm too: ``vectors_lr_mult`` does the same, and the default warns."""
    model = {name: torch.zeros(shape) for name, shape in LORA_NAMES.items()}
    given: dict[str, Any] = {"lr": 1.0, "lr_ratio": 16.0, "lr_embedding": 1e-6, "weight_decay": 0.5}
    peft = rates(model, param_group_preset("loraplus", model, **given, vectors_lr_mult=16.0))
    assert list(peft.values()) != []
    a, b, bias, embedding_a, embedding_b, norm, head = (peft[name] for name in LORA_NAMES)
    assert (a, b, bias, norm, head) == ((1.0, 0.5), (16.0, 0.5), (16.0, 0.0), (16.0, 0.0), (1.0, 0.5))
    assert embedding_a == embedding_b == (1e-6, 0.5)
    with pytest.warns(
        UserWarning,
        match=r"1 parameter with one dimension outside LoRA: lr is .* uses 16\.0 times; .*: 'base_model",
    ):
        spec = param_group_preset("loraplus", model, **given)
    assert rates(model, spec) == {**peft, "base_model.model.ln_f.modules_to_save.default.weight": (1.0, 0.0)}


@needs_optimizer("Muon")
def test_muon_takes_hidden_matrices_and_both_optimizers_step() -> None:
    """AdamW gets embeddings, head, vectors and convolutions; with ndim = [2, 4], only the first convolution."""
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 2, 1),
            "conv": nn.Conv2d(2, 2, 1),
            "embed": nn.Embedding(4, 2),
            "hidden": nn.Linear(2, 2),
            "head": nn.Linear(2, 4),
        }
    )
    spec = param_group_preset("muon", model)
    made = [getattr(torch.optim, name)(build_param_groups(model, spec, optimizer=name)) for name in ("Muon", "AdamW")]
    assert made[0].param_groups[0]["param_names"] == ["hidden.weight"]
    assert (made[0].param_groups[0]["lr"], made[1].param_groups[0]["lr"]) == (0.02, 3e-4)
    assert validate_param_groups(model, made).findings == ()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in made:
        optimizer.step()
    wide = build_param_groups(model, param_group_preset("muon", model, ndim=[2, 4]), optimizer="Muon")
    assert wide[0]["param_names"] == ["conv.weight", "hidden.weight"]


@pytest.mark.parametrize(
    ("lo", "expected"),
    [(1e-5, [1e-05, 4.641588833612779e-05, 0.00021544346900318834, 0.0009999999999999998]), ("", [1e-4] * 3 + [1e-3])],
    ids=["slice(lo, hi)", "slice(hi)"],
)
def test_slices_spread_the_rate_as_in_fastai(lo: Any, expected: list[float]) -> None:
    spec = param_group_preset("slices", lo=lo, hi=1e-3, layers=["a.*", ["b.*"], ["c.*"], ["d.*", "e.*"]])
    assert [rule.options["lr"] for rule in spec.rules] == expected
    model = VitLike()
    body, head = build_param_groups(model, param_group_preset("slices", model, lo=1e-4, hi=1e-2))
    assert (body["lr"], head["lr"], len(head["params"])) == (1e-4, 1e-2, 2)


def test_the_head_learns_ten_times_as_fast() -> None:
    model = VitLike()
    for head in ({"role": "head"}, "head.*", ["head.*"]):
        groups = build_param_groups(model, param_group_preset("head-lr", model, lr=0.5, head=head))
        assert [group["name"] for group in groups] == ["base", "head"]
        assert {name for name, (lr, _) in numbers(groups).items() if lr == 5.0} == {"head.weight", "head.bias"}


def test_unfreezing_goes_from_the_last_layer_to_the_first() -> None:
    """Each phase trains one more layer, and the last phase trains every parameter."""
    model = VitLike(2)
    trained = []
    for spec in param_group_phases("gradual-unfreezing", model, lr=1.0, layer_decay=0.5):
        model.requires_grad_(True)
        trained.append(numbers(build_param_groups(model, spec)))
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trained[-1])
    assert [len(phase) for phase in trained] == [4, 8, 12, 16]
    assert set(trained[0]) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert all(before.items() <= after.items() for before, after in itertools.pairwise(trained))
    assert {lr for lr, _ in trained[-1].values()} == {1.0, 0.5, 0.25, 0.125}
    with pytest.raises(GroupsError, match="there is no phase 4") as caught:
        param_group_preset("gradual-unfreezing", model, phase=4)
    assert "0 to 3" in (caught.value.hint or "")


@pytest.mark.parametrize("name", param_group_preset_names())
def test_every_preset_has_a_summary_and_lists_its_settings(name: str) -> None:
    assert len(preset_summary(name)) > 60
    with pytest.raises(GroupsError, match="has no setting 'typo'") as caught:
        param_group_preset(name, typo=1)
    assert "its settings are " in (caught.value.hint or "")


def test_wrong_presets_and_settings_are_refused() -> None:
    with pytest.raises(GroupsError, match="there is no preset 'moun'") as unknown:
        param_group_preset("moun")
    assert "muon" in (unknown.value.hint or "")
    with pytest.raises(GroupsError, match="'base_shapes' is required"):
        param_group_preset("mup", perceptron(8))
    with pytest.raises(GroupsError, match="'layers' is computed from the model"):
        param_group_preset("timm-layer-decay", no_weight_decay=[])
    with pytest.raises(GroupsError, match=r"preset 'no-decay': \[defaults\]: lr is the string"):
        param_group_preset("no-decay", lr="fast")
    with pytest.warns(UserWarning, match="only a live model has no_weight_decay"):
        param_group_preset("timm-weight-decay", {"a.weight": torch.zeros(2, 2)})


def test_patterns_of_matches_the_chosen_names_and_no_others() -> None:
    names = ["a.0.w", "a.0.b", "a.1.w", "a.1.b", "a.10.w", "c", "odd*.w", "odd*.v", "d.e.f.w", "d.g.w"]
    for size in range(1, 4):
        for chosen in itertools.combinations(names, size):
            patterns = [parse_pattern(text) for text in patterns_of(chosen, names)]
            assert [name for name in names if any(pattern.match(name) for pattern in patterns)] == list(chosen)
    assert patterns_of(["a.0.w", "a.0.b", "d.e.f.w", "a.1.w", "a.1.b"], names) == ["a.0.*", "d.e.*", "a.1.*"]
    assert patterns_of(["a.0.w", "a.1.w", "a.10.w"], names) == ["a.{i}.w", "a.10.*"]
