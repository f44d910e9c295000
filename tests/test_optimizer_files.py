"""Files with an optimizer state: an edit changes nothing else, and torch loads the result."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict

from ckptkit import choose_output, load_optimizer_state
from ckptkit.errors import CkptkitError, OutputError, PathError, PlanError
from ckptkit.formats import open_checkpoint, open_optimizer
from ckptkit.optimizer_state.forms import to_dict
from ckptkit.optimizer_state.model import OptimizerState
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.remapping import remap
from ckptkit.optimizer_state.write import write_optimizer_state
from tests.helpers_cli import run_ckpt
from tests.helpers_dcp import save as save_distributed
from tests.helpers_optim import OPTIMIZERS, Net, same_state, trained
from tests.helpers_same import assert_same

RULES = """
[[rule]]
from = "qkv.{leaf}"
to = ["q.{leaf}", "k.{leaf}", "v.{leaf}"]
op = { split = { dim = 0, sizes = [4, 4, 4] } }
"""
SPEC = """
[[group]]
name = "a"
params = "*.bias"
lr = 0.25

[[group]]
name = "b"
rest = true
lr = 1.0
"""


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    head = [tensor for name, tensor in named.items() if name.startswith("head")]
    return [{"params": [p for n, p in named.items() if "head" not in n]}, {"params": head, "lr": torch.tensor(0.5)}]


def run_file(path: Path, kind: str = "AdamW", **settings: Any) -> tuple[Net, dict[str, Any]]:
    """Return the path of a training checkpoint as a script saves it, and its content."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS[kind](groups_of(model)))
    extra = {"device": torch.device("cpu"), "losses": [0.5] * 3, "rng": torch.get_rng_state(), "epoch": 3}
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **extra}
    torch.save(content, path, **settings)
    return model, content


def write(state: OptimizerState, path: Path, source: Any = None, **settings: Any) -> Any:
    write_optimizer_state(state, choose_output(path, force=True, **settings), source)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("settings", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_a_copy_is_a_copy(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """An unchanged state is written to a file that torch loads as the same content, with ties and devices."""
    _, content = run_file(tmp_path / "run.ckpt", kind, **settings)
    content["again"] = content["model"]["qkv.weight"]
    first = content["optimizer"]["param_groups"][0]
    first |= {"device": torch.device("meta"), "dtype": torch.bfloat16, "params": first.pop("params")}
    torch.save(content, tmp_path / "run.ckpt", **settings)
    with open_optimizer(tmp_path / "run.ckpt") as source:
        write_optimizer_state(to_named(source, Net()), choose_output(tmp_path / "copy.ckpt"), source)
    weights_only = "pickle_protocol" not in settings  # torch's weights-only loader accepts only its own protocol
    assert_same(*(torch.load(tmp_path / name, weights_only=weights_only) for name in ("run.ckpt", "copy.ckpt")))


def test_only_the_state_changes(tmp_path: Path) -> None:
    """An edit changes only the optimizer state, which is then the result of the rules."""
    model, content = run_file(tmp_path / "run.ckpt")
    with open_optimizer(tmp_path / "run.ckpt") as source:
        made = remap(to_named(source, model), ["fc.*=inner.*"])
        loaded = write(made, tmp_path / "new.ckpt", source)
        expected = to_dict(made)
    rest = {key: value for key, value in loaded.items() if key != "optimizer"}
    assert_same(rest, {key: value for key, value in content.items() if key != "optimizer"})
    assert same_state(loaded["optimizer"], expected)


@pytest.mark.parametrize("form", ["indexed", "param-names", "named", "flattened"])
def test_every_form_is_written(form: str, tmp_path: Path) -> None:
    """A live state is written in every form; torch loads it with weights_only, and its own tools accept it."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS["AdamW"](groups_of(model)))
    state = to_named(optimizer.state_dict(), model)
    write_optimizer_state(state, choose_output(tmp_path / "o.pt"), form=form)
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)
    assert same_state(loaded, to_dict(state, form))
    other = copy.deepcopy(model)
    resumed = OPTIMIZERS["AdamW"](groups_of(other))
    if form in ("indexed", "param-names"):
        resumed.load_state_dict(loaded)
    else:
        options = dcp_state_dict.StateDictOptions(flatten_optimizer_state_dict=form == "flattened")
        dcp_state_dict.set_optimizer_state_dict(other, resumed, loaded, options=options)
    trained(model, optimizer, 2, seed=1)
    trained(other, resumed, 2, seed=1)
    assert same_state(dict(model.state_dict()), dict(other.state_dict()))


def test_a_distributed_state_becomes_a_file(tmp_path: Path) -> None:
    """A DCP directory is written to a torch file, in the form that load_state_dict() accepts."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS["SGD"](model.parameters()))
    state = dcp_state_dict.get_optimizer_state_dict(model, optimizer)
    save_distributed(tmp_path / "dcp", {"model": model.state_dict(), "optim": state})
    with open_optimizer(tmp_path / "dcp") as source:
        write_optimizer_state(to_named(source), choose_output(tmp_path / "o.pt"), source, form="indexed")
    assert same_state(torch.load(tmp_path / "o.pt", weights_only=True)["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("o.safetensors", "to a torch file"), ("run.ckpt", "is an input"), ("there.pt", "already exists")],
)
def test_outputs_are_refused_early(name: str, message: str, tmp_path: Path) -> None:
    """Another format and an existing output are refused before anything is written."""
    run_file(tmp_path / "run.ckpt")
    (tmp_path / "there.pt").write_bytes(b"x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with open_optimizer(tmp_path / "run.ckpt") as source, pytest.raises(OutputError, match=message):
        write_optimizer_state(to_named(source, Net()), choose_output(tmp_path / name), source)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_value_of_code_stays_in_its_file_alone(tmp_path: Path) -> None:
    """A value that only code can rebuild is copied when its file is edited, and refused for any other file."""
    import numpy as np

    model, content = run_file(tmp_path / "run.ckpt")
    content["optimizer"]["param_groups"][0]["since"] = np.datetime64("2020-01-01")
    torch.save(content, tmp_path / "run.ckpt")
    with open_optimizer(tmp_path / "run.ckpt") as source:
        state = to_named(source, model)
        write_optimizer_state(state, choose_output(tmp_path / "new.ckpt", keep_unknown=True), source)
        with pytest.raises(CkptkitError, match="can be kept only in a copy of its own file"):
            write(state, tmp_path / "alone.pt", only_tensors=True)
    loaded = torch.load(tmp_path / "new.ckpt", weights_only=False)
    assert loaded["optimizer"]["param_groups"][0]["since"] == np.datetime64("2020-01-01")


def test_remap_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from the weights in the file; the result loads into the new model, in the order of that model."""
    _, content = run_file(tmp_path / "run.ckpt")
    ran = run_ckpt(capsys, "optim", "show", tmp_path / "run.ckpt", "--model", "py:fixtures.lenet:build")
    assert (ran.code, "leave out the model and the names: the weights in" in ran.out) == (1, True)
    (tmp_path / "rules.toml").write_text(RULES)
    shapes = {
        f"{name}.{leaf}": torch.empty(4, *rest) for name in "kqv" for leaf, rest in (("weight", (4,)), ("bias", ()))
    }
    others = {name: tensor for name, tensor in content["model"].items() if "qkv" not in name}
    torch.save({**others, **shapes}, tmp_path / "new_model.pt")
    arguments: list[str | Path] = ["optim", "remap", tmp_path / "run.ckpt", "-o", tmp_path / "new.ckpt"]
    arguments += ["--rules", tmp_path / "rules.toml", "--like", tmp_path / "new_model.pt"]
    ran = run_ckpt(capsys, *arguments, "--dry-run", "--json")
    document = json.loads(ran.out)
    assert (ran.code, document["schema"], document["output"]) == (0, "ckptkit.optim/1", None)
    assert not (tmp_path / "new.ckpt").exists()
    change = next(change for change in document["changes"] if change["key"] == "q.bias")
    assert (change["sources"], change["operation"]) == (["qkv.bias"], "split")
    assert "(line 2)" in change["reason"]
    ran = run_ckpt(capsys, *arguments)
    assert (ran.code, ran.out) == (0, "")
    names = [f"{name}.{leaf}" for name in ("norm", "fc", "k", "q", "v") for leaf in ("weight", "bias")]
    loaded = torch.load(tmp_path / "new.ckpt", weights_only=True)
    old = content["optimizer"]["state"][0]["exp_avg"].chunk(3)
    assert loaded["optimizer"]["param_groups"][0]["params"] == list(range(10))
    assert torch.equal(loaded["optimizer"]["state"][names.index("k.weight")]["exp_avg"], old[1])
    assert same_state(loaded["model"], content["model"])


def test_show_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page has names, shapes, steps and groups; findings set the exit code; positions replace missing names."""
    _, content = run_file(tmp_path / "run.ckpt")
    ran = run_ckpt(capsys, "optim", "show", tmp_path / "run.ckpt", "--json")
    document = json.loads(ran.out)
    assert (ran.code, document["at"], document["form"]) == (0, "optimizer", "indexed")
    first = document["parameters"][0]
    assert (first["key"], first["shape"], first["step"], first["group"]) == ("qkv.weight", [12, 4], 3.0, 0)
    assert [group["options"]["lr"] for group in document["groups"]] == [0.01, 0.5]
    assert document["summary"]["bytes"] == sum(
        tensor.nbytes for slots in content["optimizer"]["state"].values() for tensor in slots.values()
    )
    content["optimizer"]["state"][1]["step"] += 4
    del content["optimizer"]["state"][0]["exp_avg_sq"], content["optimizer"]["state"][5]
    content["optimizer"]["state"][77] = {}
    torch.save(content["optimizer"], tmp_path / "optimizer.pt")
    ran = run_ckpt(capsys, "optim", "show", tmp_path / "optimizer.pt")
    assert ran.code == 1
    assert "state of 77, which no group has  [optim.state-stray]" in ran.out
    assert "7 of 1 parameter (1)" in ran.out
    assert "1 of 8 parameters have no state: '5'" in ran.out
    arguments = ("optim", "prune", tmp_path / "optimizer.pt", "-o", tmp_path / "pruned.pt", "--drop", "head.*")
    (tmp_path / "names.json").write_text(json.dumps([name for name, _ in Net().named_parameters()]))
    assert run_ckpt(capsys, *arguments, "--names", tmp_path / "names.json").code == 0
    assert list(torch.load(tmp_path / "pruned.pt", weights_only=True)["state"]) == [0, 1, 2, 3, 4]


def test_resplit_and_prune_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A spec changes the groups of a file, another file restores them, and a pattern resets a head."""
    _, content = run_file(tmp_path / "run.ckpt", "SGD")
    (tmp_path / "spec.toml").write_text(SPEC)
    run, out = tmp_path / "run.ckpt", [tmp_path / f"{name}.ckpt" for name in "bcd"]
    spec = tmp_path / "spec.toml"
    ran = run_ckpt(capsys, "optim", "resplit", run, "-o", out[0], "--groups", spec, "--form", "param-names")
    assert ran.code == 0, ran.err
    groups = torch.load(out[0], weights_only=True)["optimizer"]["param_groups"]
    assert [(group["lr"], group["param_names"], group["momentum"]) for group in groups] == [
        (0.25, ["qkv.bias", "norm.bias", "fc.bias", "head.bias"], 0.9),
        (1.0, ["qkv.weight", "norm.weight", "fc.weight", "head.weight"], 0.9),
    ]
    ran = run_ckpt(capsys, "diff", f"{run}::optimizer", out[0])
    assert f"only EXPECTED is the state of an optimizer; ckpt optim diff {run}::optimizer {out[0]} compares" in ran.out
    ran = run_ckpt(capsys, "optim", "resplit", out[0], "-o", out[1], "--as", run, "--form", "indexed")
    assert ran.code == 0, ran.err
    back = torch.load(out[1], weights_only=True)
    assert same_state(back["optimizer"]["state"], content["optimizer"]["state"])
    ran = run_ckpt(capsys, "optim", "prune", run, "-o", out[2], "--reset", "head.*", "--markdown")
    assert ran.code == 0
    assert "requested with --reset" in ran.out
    assert "nothing was pruned" not in ran.err
    assert list(torch.load(out[2], weights_only=True)["optimizer"]["state"]) == [0, 1, 2, 3, 4, 5]
    ran = run_ckpt(capsys, "optim", "prune", run, "-o", out[2], "--reset", "head.*", "--drop", "fc.*", "--force")
    assert "left out: 'fc.weight', 'fc.bias' (requested with --drop)" in ran.err
    assert "without state, so training starts it anew: 'head.weight', 'head.bias' (requested with --reset)" in ran.err
    ran = run_ckpt(capsys, "optim", "prune", run, "-o", out[2], "--reset", "head", "--force")
    assert (ran.code, "did you mean 'head.*'?" in ran.err) == (2, True)


def test_names_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list of names settles what shapes do not tell; without the list, the error asks for it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = trained(
        model, OPTIMIZERS["SGD"]([{"params": model[1].parameters()}, {"params": model[0].parameters()}])
    )
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.ckpt")
    arguments = ("optim", "remap", tmp_path / "run.ckpt", "-o", tmp_path / "new.pt", "--rename", "1.*=head.*")
    ran = run_ckpt(capsys, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "position 0 ([4, 4]) is '0.weight' or '1.weight'" in ran.err
    (tmp_path / "names.txt").write_text("1.weight\n1.bias\n0.weight\n0.bias\n")
    ran = run_ckpt(capsys, *arguments, "--names", tmp_path / "names.txt", "--form", "named", "--only-tensors")
    assert ran.code == 0, ran.err
    state = torch.load(io.BytesIO((tmp_path / "new.pt").read_bytes()), weights_only=True)
    assert list(state["state"]) == ["head.weight", "head.bias", "0.weight", "0.bias"]
    moved = optimizer.state_dict()["state"][1]["momentum_buffer"]
    assert torch.equal(state["state"]["head.bias"]["momentum_buffer"], moved)


def test_names_in_the_wrong_order_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command refuses a list that the weights of the file, or --model, contradict; a list that can be right is
    not refused, and the line of the names tells what was compared.
    """
    _, content = run_file(tmp_path / "run.ckpt", "SGD")
    names = [name for name, _ in Net().named_parameters()]
    run, right, wrong, other, spec = (
        tmp_path / name for name in ("run.ckpt", "names", "reversed", "other", "spec.toml")
    )
    right.write_text("\n".join(names))
    wrong.write_text("\n".join(names[::-1]))
    other.write_text("\n".join(names).replace("head", "heads"))
    spec.write_text(SPEC)
    out = ("-o", tmp_path / "out.ckpt", "--force")
    resplit = ("resplit", run, *out, "--groups", spec)
    prune, remap = ("prune", run, *out, "--like", run), ("remap", run, *out, "--rename", "head.*=h.*")
    refusal = "the list of names does not fit: the state of name 1, 'head.bias', has shape [12, 4], but the weight in "
    for arguments in (resplit, prune, remap, ("show", run), ("diff", run, run)):
        ran = run_ckpt(capsys, "optim", *arguments, "--names", wrong)
        assert ran.code == (1 if arguments[0] == "show" else 2)
        assert refusal in ran.out + ran.err
        ran = run_ckpt(capsys, "optim", *arguments, "--names", right)
        assert (ran.code, "8 of 8 shapes known, and all fit the weights in the file" in ran.out + ran.err) == (0, True)
    ran = run_ckpt(capsys, "optim", *resplit, "--names", other)
    assert (ran.code, "the weights in the file have no 'heads.weight', 'heads.bias'" in ran.err) == (0, True)
    weights = content["model"]
    cases = {
        "module.": "all fit the weights in the file",
        "net.": "all fit the weights in the file",
        "x": "not compared with shapes, because the weights in the file have none of these names",
    }
    for prefix, said in cases.items():
        torch.save({**content, "model": {prefix + key: value for key, value in weights.items()}}, run)
        ran = run_ckpt(capsys, "optim", *resplit, "--names", right)
        assert (ran.code, said in ran.err) == (0, True), ran.err
        refused = run_ckpt(capsys, "optim", "diff", run, run, "--names", wrong)
        assert (refused.code, refusal in refused.err) == ((0, False) if prefix == "x" else (2, True))
    # Edited weights: the file no longer has the shapes of the state, or has them transposed.
    for edited in (
        {"head.weight": torch.ones(7, 5)},
        {key: value.T for key, value in weights.items() if value.ndim > 1},
    ):
        torch.save({**content, "model": {**weights, **edited}}, run)
        ran = run_ckpt(capsys, "optim", *resplit, "--names", right)
        assert (ran.code, "of another shape in the weights of the file" in ran.err) == (0, True), ran.err
    torch.save(content["optimizer"], run)
    ran = run_ckpt(capsys, "optim", *resplit, "--names", right)
    assert (ran.code, "by the list of names; not compared with the shapes of weights" in ran.err) == (0, True)
    with_model = (
        (right, 0, "all fit the model"),
        (wrong, 2, "'head.bias' has shape [12, 4]"),
        (other, 2, "the list of names has 'heads.weight', 'heads.bias', which the model does not have"),
    )
    for given, code, said in with_model:
        ran = run_ckpt(capsys, "optim", *resplit, "--names", given, "--model", "py:tests.helpers_optim:Net")
        assert (ran.code, said in ran.err) == (code, True), ran.err


@pytest.mark.parametrize(
    "option",
    [("--model", "no.pt"), ("--model", "net:build"), ("--model", "py:no_such_module:build"), ("--names", "no.txt")],
    ids=range(4),
)
def test_a_source_of_names_that_cannot_be_opened_is_an_error(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No state is shown, the error names the source, and the exit code is 2, as for every command."""
    model = nn.Linear(4, 4)
    torch.save(trained(model, OPTIMIZERS["SGD"](model.parameters())).state_dict(), tmp_path / "optimizer.pt")
    ran = run_ckpt(capsys, "optim", "show", tmp_path / "optimizer.pt", *option)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"ckpt: {option[1]}: ")


@pytest.mark.parametrize("text", ['["0.weight", ', "[" * 100_000, '["0.weight", 1]', '["0.weight"] 1'], ids=range(4))
@pytest.mark.parametrize("command", ["show", "prune", "diff"])
def test_a_names_file_that_is_not_a_json_list_of_names_is_an_error(
    command: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command ends with exit code 2, and the error names the file in one line."""
    model = nn.Linear(4, 4)
    torch.save(trained(model, OPTIMIZERS["SGD"](model.parameters())).state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "names.json").write_text(text)
    state = tmp_path / "optimizer.pt"
    others = {"show": (), "prune": ("-o", tmp_path / "new.pt", "--reset", "weight"), "diff": (state,)}[command]
    ran = run_ckpt(capsys, "optim", command, state, *others, "--names", tmp_path / "names.json")
    assert (ran.code, ran.out) == (2, "")
    error, hint = ran.err.splitlines()
    assert error.startswith(f"ckpt: {tmp_path / 'names.json'}: not a valid JSON list of names")
    assert hint == 'hint: write ["first.weight", "first.bias"], or one name a line'


@pytest.mark.parametrize("path", [None, 5, b"run.pt", ["run.pt"], ""], ids=repr)
@pytest.mark.parametrize("opener", [open_checkpoint, open_optimizer])
def test_other_types_of_paths_are_refused(opener: Any, path: Any) -> None:
    """The error names what was given, and no internals."""
    with pytest.raises(PathError, match=r"a path cannot be|the path is empty"):
        opener(path)


@pytest.mark.parametrize(
    ("average", "trained", "is_named"),
    [("state_dict", "current_model_state", True), ("ema", "model", True), ("generator", "discriminator", False)],
)
def test_an_average_beside_the_trained_weights_leaves_the_names(
    average: str, trained: str, is_named: bool, tmp_path: Path
) -> None:
    """The optimizer trained the one mapping; of two models in one file, neither tells the names."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    weights = {average: model.state_dict(), trained: model.state_dict()}
    torch.save({**weights, "optimizer": optimizer.state_dict()}, tmp_path / "run.ckpt")
    with open_optimizer(tmp_path / "run.ckpt") as checkpoint:
        if is_named:
            assert to_named(checkpoint).names == ("weight", "bias")
        else:
            with pytest.raises(PlanError, match="numbers its parameters"):
                to_named(checkpoint)


@pytest.mark.parametrize("prefix", ["", "module.", "old."])
def test_the_weights_in_the_file_name_a_state_by_position(tmp_path: Path, prefix: str) -> None:
    """They do so for a path, an open state and rules; also for another head, whose state is skipped, in other groups.

    Without the file, the rules have no names to start from.
    """
    old_model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 10)})
    old = torch.optim.Adam(old_model.parameters())
    old_model["head"](old_model["body"](torch.ones(2, 4))).sum().backward()
    old.step()
    weights = {f"{prefix}{key}": value for key, value in old_model.state_dict().items()}
    torch.save({"model": weights, "optimizer": old.state_dict()}, tmp_path / "run.ckpt")
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    rules = [f"{prefix}*=*"] if prefix else None
    with open_optimizer(tmp_path / "run.ckpt") as checkpoint:
        for state in (tmp_path / "run.ckpt", checkpoint):
            new = torch.optim.Adam(
                [{"params": [*model["head"].parameters()]}, {"params": [*model["body"].parameters()]}]
            )
            report = load_optimizer_state(new, model, state, rules, hyper="live", on_mismatch="skip")
            assert (report.loaded, report.dropped) == (("body.weight", "body.bias"), ("head.weight", "head.bias"))
            for name in ("weight", "bias"):
                found, saved = (o.state[getattr(m["body"], name)] for o, m in ((new, model), (old, old_model)))
                assert torch.equal(found["exp_avg"], saved["exp_avg"])
        assert to_named(checkpoint).names == tuple(weights)
    with pytest.raises(PlanError, match="numbers its parameters" if rules else "does not fit the model"):
        load_optimizer_state(new, model, old.state_dict(), rules, on_mismatch="skip")
