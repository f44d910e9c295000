"""Small models with the names of well-known models, and the options of each of their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.plan import plan_param_groups
from ckptkit.param_groups.spec import ParamGroupSpec

__all__ = ["Mixed", "NextLike", "VitLike", "bert_like", "built", "numbers", "perceptron", "rates"]


def rates(model: Any, spec: ParamGroupSpec) -> dict[str, tuple[float, float]]:
    """Return the learning rate, times ``lr_scale``, and the weight decay of each trained parameter of a plan."""
    return {
        parameter.name: (group.options["lr"] * group.options.get("lr_scale", 1.0), group.options["weight_decay"])
        for group in plan_param_groups(model, spec).groups
        for parameter in group.parameters
    }


def numbers(groups: Any) -> dict[str, tuple[float, float]]:
    """Return the learning rate and the weight decay of each parameter in built groups."""
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}


def built(model: nn.Module, spec: ParamGroupSpec) -> list[list[str]]:
    """Return the names in each group."""
    return [group["param_names"] for group in build_param_groups(model, spec)]


class VitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(2)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(2, 6, bias=False)})
        self.gamma = nn.Parameter(torch.ones(2))


class VitLike(nn.Module):
    """A model with the names and the methods of the ViT of timm."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 2))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 2, 2)})
        self.blocks = nn.ModuleList(VitBlock() for _ in range(blocks))
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 3)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        assert not coarse
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class NextLike(nn.Module):
    """The names of ConvNeXt's own code."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(nn.Sequential(nn.Linear(1, 1, bias=False)) for _ in depths)
        self.stages = nn.ModuleList(
            nn.Sequential(*(nn.ModuleDict({"pwconv1": nn.Linear(1, 1, bias=False)}) for _ in range(depth)))
            for depth in depths
        )
        self.norm = nn.LayerNorm(1)
        self.head = nn.Linear(1, 2)


class Mixed(nn.Module):
    """One of each that rules about norms and biases treat differently."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.ones(2, 2))
        self.scale = nn.Parameter(torch.ones(2))
        self.conv = nn.Conv2d(1, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.ln_1 = nn.RMSNorm(2)
        self.q_norm = nn.RMSNorm(2)
        self.norms = nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2))
        self.bias_proj = nn.Linear(2, 2)
        self.fc = nn.Linear(2, 3)


def perceptron(width: int) -> nn.Sequential:
    """Return a model that grows in width."""
    return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, 3))


def bert_like(layers: int = 2) -> dict[str, torch.Tensor]:
    """Return some names and shapes of a BERT for classification, as a checkpoint gives them."""
    shapes: dict[str, tuple[int, ...]] = {"bert.embeddings.word_embeddings.weight": (5, 2)}
    shapes |= {"bert.embeddings.LayerNorm.weight": (2,), "bert.embeddings.LayerNorm.bias": (2,)}
    for layer in range(layers):
        shapes[f"bert.encoder.layer.{layer}.attention.self.query.weight"] = (2, 2)
        shapes[f"bert.encoder.layer.{layer}.attention.self.query.bias"] = (2,)
        shapes[f"bert.encoder.layer.{layer}.output.LayerNorm.weight"] = (2,)
    shapes |= {"bert.pooler.dense.weight": (2, 2), "classifier.weight": (3, 2), "classifier.bias": (3,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}
