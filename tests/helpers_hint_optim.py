"""Situations in which commands about optimizers and param groups print a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckptkit import choose_output
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.write import write_optimizer_state
from tests.helpers_cli import ROOT
from tests.helpers_hint_situations import MODEL, situation
from tests.helpers_optim import OPTIMIZERS, Net, trained

NET = "py:tests.helpers_optim:Net"
SPEC = str(ROOT / "fixtures" / "groups.toml")
ONE_GROUP = '[[group]]\nname = "all"\nrest = true\nlr = 0.25\n'
SPLIT = (
    '[[rule]]\nfrom = "qkv.{leaf}"\nto = ["q.{leaf}", "k.{leaf}", "v.{leaf}"]\n'
    "op = { split = { dim = 0, parts = 3 } }\n"
)


def written(
    path: Path, model: nn.Module | None = None, kind: str = "AdamW", *, apart: str = "", form: str = "param-names",
    **options: Any,
) -> str:  # fmt: skip
    """Write the state of a trained optimizer with the names of its parameters; ``apart`` begins those of group 1."""
    model = model or Net()
    named = dict(model.named_parameters())
    second = [tensor for name, tensor in named.items() if apart and name.startswith(apart)]
    first = [tensor for name, tensor in named.items() if not apart or not name.startswith(apart)]
    groups = [{"params": first, **options}, *([{"params": second, "lr": 0.5}] if second else [])]
    state = to_named(trained(model, OPTIMIZERS[kind](groups)).state_dict(), model)
    write_optimizer_state(state, choose_output(path), form=form)
    return str(path)


def text(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


class Renamed(nn.Module):
    """The network with another name for one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        self.qkv, self.norm, self.inner, self.head = net.qkv, net.norm, net.fc, net.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        mixed: torch.Tensor = self.head(self.inner(self.norm(query * key.sigmoid() + value)))
        return mixed


@situation(
    "optimizer_state/compare.py: --groups FILE assigns them to the new groups", FILE="{folder}/spec.toml", MODEL=NET
)
def _other_groups(folder: Path) -> list[str]:
    text(folder / "spec.toml", ONE_GROUP)
    return ["optim", "diff", written(folder / "saved.pt", apart="head"), written(folder / "live.pt")]


@situation("optimizer_state/compare.py: rename it: ckpt optim remap", filled={"OLD=NEW": "inner.*=fc.*"})
def _other_parameters(folder: Path) -> list[str]:
    return ["optim", "diff", written(folder / "saved.pt", Renamed()), written(folder / "live.pt")]


@situation("optimizer_state/compare.py: --as LIVE moves it with its options")
def _other_members(folder: Path) -> list[str]:
    return ["optim", "diff", written(folder / "saved.pt", apart="head"), written(folder / "live.pt", apart="fc")]


@situation("optimizer_state/compare.py: --as LIVE keeps it")
def _a_lost_option(folder: Path) -> list[str]:
    saved, live = written(folder / "saved.pt"), written(folder / "live.pt", maximize=True)
    content = torch.load(saved)
    del content["param_groups"][0]["maximize"]
    torch.save(content, saved)
    return ["optim", "diff", saved, live]


@situation("optimizer_state/compare.py: --like MODEL drops it", MODEL=NET, FILE="{folder}/rules.toml")
def _another_shape(folder: Path) -> list[str]:
    rules = "".join(f'[[rule]]\nfrom = "head.{leaf}"\nto = "head.{leaf}"\nop = {{ slice = {{ dim = 0, stop = 3 }} }}\n'
                    for leaf in ("weight", "bias"))  # fmt: skip
    text(folder / "rules.toml", rules)
    return ["optim", "diff", written(folder / "saved.pt", Net(7)), written(folder / "live.pt")]


@situation("optimizer_state/compare.py: --reset PATTERN drops the incomplete state", PATTERN="fc.bias")
def _a_missing_slot(folder: Path) -> list[str]:
    saved = written(folder / "saved.pt")
    content = torch.load(saved)
    del content["state"][5]["exp_avg"]
    torch.save(content, saved)
    return ["optim", "show", saved]


@situation("optimizer_state/groups.py: give them a group, or drop them first: ckpt optim prune")
def _no_group_left(folder: Path) -> list[str]:
    part = torch.load(written(folder / "part.pt"))
    group = part["param_groups"][0]
    group |= {"params": group["params"][:4], "param_names": group["param_names"][:4]}
    part["state"] = {number: part["state"][number] for number in group["params"]}
    torch.save(part, folder / "part.pt")
    saved = written(folder / "saved.pt")
    return ["optim", "resplit", saved, "-o", str(folder / "out.pt"), "--as", str(folder / "part.pt")]


@situation("optimizer_state/groups.py: rename it with rules, or drop it: ckpt optim prune")
def _unknown_to_the_model(folder: Path) -> list[str]:
    return ["optim", "remap", written(folder / "saved.pt", Renamed()), "-o", str(folder / "out.pt"), "--like", NET]


@situation("optimizer_state/groups.py: --hyper live takes the new value")
def _another_rate(folder: Path) -> list[str]:
    spec = text(folder / "spec.toml", ONE_GROUP)
    saved = written(folder / "saved.pt")
    return ["optim", "resplit", saved, "-o", str(folder / "out.pt"), "--groups", spec, "--hyper", "error"]


@situation("optimizer_state/groups.py: and use --hyper live")
def _two_rates_for_one_group(folder: Path) -> list[str]:
    spec = text(folder / "spec.toml", ONE_GROUP)
    saved = written(folder / "saved.pt", apart="head")
    return ["optim", "resplit", saved, "-o", str(folder / "out.pt"), "--groups", spec, "--hyper", "saved"]


@situation(
    "optimizer_state/remapping.py: drop its state first: ckpt optim prune",
    "optimizer_state/remapping.py: or, if it has one, give --elementwise",
    PATTERN="qkv.*",
)
def _an_unknown_slot(folder: Path) -> list[str]:
    saved, rules = written(folder / "saved.pt"), text(folder / "rules.toml", SPLIT)
    content = torch.load(saved)
    for slots in content["state"].values():
        slots["mine"] = slots["exp_avg"].clone()
    torch.save(content, saved)
    return ["optim", "remap", saved, "-o", str(folder / "out.pt"), "--rules", rules]


@situation("optimizer_state/remapping.py: put its sources into one group first", FILE="{folder}/spec.toml", MODEL=NET)
def _sources_of_two_groups(folder: Path) -> list[str]:
    text(folder / "spec.toml", ONE_GROUP)
    join = '[[rule]]\nfrom = ["fc.bias", "head.bias"]\nto = "both"\nop = { concat = { dim = 0 } }\n'
    rules = text(folder / "rules.toml", join)
    return [
        "optim",
        "remap",
        written(folder / "saved.pt", apart="head"),
        "-o",
        str(folder / "out.pt"),
        "--rules",
        rules,
    ]


@situation("optimizer_state/naming.py: drop it: ckpt optim prune PATH -o OUT", is_called=False)
def _a_stray_state(folder: Path) -> list[str]:
    saved = written(folder / "saved.pt")
    content = torch.load(saved)
    content["state"][77] = content["state"][0]
    torch.save(content, saved)
    return ["optim", "show", saved]


@situation("optimizer_state/naming.py: rename them first: ckpt optim remap", filled={"OLD=NEW": "inner.*=fc.*"})
def _names_of_another_model(folder: Path) -> list[str]:
    saved = written(folder / "saved.pt", Renamed())
    return ["optim", "prune", saved, "-o", str(folder / "out.pt"), "--reset", "*.bias", "--model", NET]


@situation("comparison/hints.py: ckpt optim diff XX XX compares two states", ends=True)
def _weights_beside_an_optimizer(folder: Path) -> list[str]:
    model = Net()
    optimizer = trained(model, OPTIMIZERS["SGD"](model.parameters()))
    for name in ("run", "other"):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{name}.ckpt")
    return ["diff", f"{folder / 'run.ckpt'}::optimizer", str(folder / "other.ckpt")]


@situation("optimizer_state/positions.py: --names FILE", FILE="{folder}/names.txt")
def _no_names(folder: Path) -> list[str]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [{"params": layer.parameters()} for layer in reversed(model)]
    optimizer = trained(model, OPTIMIZERS["SGD"](groups))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "run.ckpt")
    text(folder / "names.txt", "1.weight\n1.bias\n0.weight\n0.bias\n")
    return ["optim", "prune", str(folder / "run.ckpt"), "-o", str(folder / "out.pt"), "--reset", "0.*"]


@situation(
    "optimizer_state/pruning.py: ckpt optim resplit",
    ends=True,
    PATH="{folder}/out.pt",
    FILE="{folder}/spec.toml",
    MODEL=NET,
)
def _a_parameter_in_no_group(folder: Path) -> list[str]:
    text(folder / "spec.toml", ONE_GROUP)
    saved = written(folder / "saved.pt", Renamed())
    return ["optim", "prune", saved, "-o", str(folder / "out.pt"), "--like", NET]


@situation("optimizer_state/pruning.py: rename them first: ckpt optim remap", is_called=False)
def _a_model_in_a_wrapper(folder: Path) -> list[str]:
    saved = written(folder / "saved.pt", nn.Sequential(Net()))
    return ["optim", "prune", saved, "-o", str(folder / "out.pt"), "--like", NET]


@situation(
    "optimizer_state/positions.py: give the model that was trained, or its weights: --model",
    MODEL=NET,
    FILE="{folder}/names.txt",
)
def _positions_alone(folder: Path) -> list[str]:
    text(folder / "names.txt", "\n".join(name for name, _ in Net().named_parameters()))
    saved = written(folder / "saved.pt", form="indexed")
    return ["optim", "prune", saved, "-o", str(folder / "out.pt"), "--reset", "fc.*"]


class Masked(nn.Module):
    """A module with a buffer of the shape of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mask", torch.ones(4))


@situation(
    "optimizer_state/positions.py: give the live model, frozen as in training: --model",
    MODEL="py:tests.helpers_hint_optim:Masked",
    FILE="{folder}/names.txt",
)
def _a_buffer_like_a_parameter(folder: Path) -> list[str]:
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.weight.grad = torch.ones(4)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "run.ckpt")
    text(folder / "names.txt", "weight\n")
    return ["optim", "prune", str(folder / "run.ckpt"), "-o", str(folder / "out.pt"), "--reset", "weight"]


class Pair(nn.Module):
    """A module with two vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))


@situation(
    "optimizer_state/given_names.py: if other weights were trained, add --model MODEL",
    MODEL="py:tests.helpers_hint_optim:Pair",
)
def _names_beside_other_weights(folder: Path) -> list[str]:
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.first.grad, model.second.grad = torch.ones(3), torch.ones(5)
    optimizer.step()
    weights = {"first": model.second.detach(), "second": model.first.detach()}
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, folder / "run.ckpt")
    names = text(folder / "names.txt", "first\nsecond\n")
    return [
        "optim",
        "prune",
        str(folder / "run.ckpt"),
        "-o",
        str(folder / "out.pt"),
        "--reset",
        "first",
        "--names",
        names,
    ]


@situation("plans/writing/refusals.py: write elsewhere, or --force to replace it")
def _the_output_is_the_input(folder: Path) -> list[str]:
    saved = written(folder / "saved.pt")
    return ["optim", "prune", saved, "-o", saved, "--reset", "fc.*"]


# Param groups.


@situation("param_groups/explain.py: ckpt show MODEL lists the names", is_called=False, MODEL=MODEL)
def _explain_no_parameter(_folder: Path) -> list[str]:
    return ["groups", "explain", "--model", MODEL, SPEC, "zzzz"]


@situation("param_groups/lock.py: write it again: ckpt groups lock", MODEL=MODEL, SPEC=SPEC, LOCK="{folder}/new.json")
def _a_broken_lock(folder: Path) -> list[str]:
    lock = text(folder / "lock.json", json.dumps({"schema": "ckptkit.groups-lock/1", "groups": [{}]}))
    return ["groups", "diff", lock, SPEC, "--model", MODEL]


@situation("param_groups/lock.py: writes one", MODEL=MODEL, SPEC=SPEC, LOCK="{folder}/new.json")
def _not_a_lock(folder: Path) -> list[str]:
    return ["groups", "diff", text(folder / "lock.json", "{}"), SPEC, "--model", MODEL]
