"""Averages that trainers keep as a list without names get the names of the model's parameters, by their order."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ckptkit import RuleError, diff, load_into, merge, open_checkpoint, suggest_rules
from ckptkit.wrappers.positions import find_positions
from tests.helpers_cli import run_ckpt

MODEL = """
from torch import nn

def build(norm=True, frozen=False):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 6))
    model[0].requires_grad_(not frozen)
    return model
"""


def build(*, norm: bool = True, frozen: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 6))
    model[0].requires_grad_(not frozen)
    return model


def averages(model: nn.Module, *, trained: bool = False) -> list[torch.Tensor]:
    """Return what ``ExponentialMovingAverage(model.parameters())`` keeps; every tensor has other values."""
    parameters = [p for p in model.parameters() if p.requires_grad or not trained]
    return [torch.randn_like(parameter) for parameter in parameters]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{tmp_path.name.replace('-', '_')}_net.py").write_text(MODEL)
    return tmp_path


def py(here: Path, arguments: str = "") -> str:
    return f"py:{here.name.replace('-', '_')}_net:build{arguments}"


def ema_of(shadow: Any) -> dict[str, Any]:
    return {"decay": 0.999, "num_updates": 10, "shadow_params": shadow, "collected_params": None}


def assert_named(state: Mapping[str, torch.Tensor], model: nn.Module, shadow: list[torch.Tensor]) -> None:
    """Each parameter has the average that torch_ema's ``copy_to(model.parameters())`` would write into it."""
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(shadow)
    for name, value in zip(parameters, shadow, strict=True):
        assert torch.equal(state[name], value), name


def test_every_command_gives_the_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diff, align with its rule file, and merge put each tensor under the name of the parameter at its place."""
    model = build()
    shadow = averages(model)
    torch.save({"model": model.state_dict(), "ema": ema_of(shadow)}, "run.pt")
    ran = run_ckpt(capsys, "diff", py(here), "run.pt::ema")
    assert "8 matched, 3 missing, 0 unexpected" in ran.out
    said = "'shadow_params' has no names: its 8 tensors got those of all parameters, and all shapes fit"
    assert f"{said}; equal shapes were taken in this order; 3 buffers are not in the list: '1.running_mean'" in ran.err
    ran = run_ckpt(capsys, "align", py(here), "run.pt::ema", "-o", "rules.toml")
    assert "by the order of the parameters" in ran.out
    assert run_ckpt(capsys, "remap", "run.pt::ema", "--rules", "rules.toml", "-o", "named.safetensors").code == 0
    assert_named(load_file("named.safetensors"), model, shadow)
    for base in (py(here), "run.pt::model"):
        command = ["merge", base, "run.pt::ema", "-o", "full.safetensors", "--force", "--verify"]
        assert run_ckpt(capsys, *command).code == 0
        full = load_file("full.safetensors")
        assert_named(full, model, shadow)
    build().load_state_dict(full, strict=True)
    assert torch.equal(full["1.running_var"], model.state_dict()["1.running_var"])


def test_like_writes_the_list_with_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model without buffers gets all of its keys; with buffers, the refusal names the command that has them."""
    plain = build(norm=False)
    shadow = averages(plain)
    torch.save(ema_of(shadow), "ema.pt")
    arguments = ["-o", "out.safetensors", "--like", py(here, "(norm=False)")]
    assert run_ckpt(capsys, "remap", "ema.pt", *arguments).code == 0
    assert_named(load_file("out.safetensors"), plain, shadow)
    plain.load_state_dict(load_file("out.safetensors"), strict=True)
    model = build()
    torch.save({"model": model.state_dict(), "ema": ema_of(averages(model))}, "run.pt")
    ran = run_ckpt(capsys, "remap", "run.pt::ema", "-o", "two.safetensors", "--like", py(here))
    assert ran.code == 2
    hint = ran.err.strip().splitlines()[-1]
    command = hint.partition("ckpt ")[2].partition(" takes")[0]
    command = command.replace("WEIGHTS", "run.pt::model").replace("OUT", "two.safetensors")
    assert run_ckpt(capsys, *shlex.split(command)).code == 0


def test_a_model_with_one_parameter_has_a_list_of_one_tensor(tmp_path: Path) -> None:
    """The name of the list says that it is one."""
    model, value = nn.Linear(2, 2, bias=False), torch.randn(2, 2)
    torch.save(ema_of([value]), tmp_path / "ema.pt")
    load_into(model, tmp_path / "ema.pt")
    assert torch.equal(model.weight, value)


def test_load_into_fills_the_parameters(here: Path) -> None:
    """The live model has the averages afterwards, keeps its buffers, and the report says how they were named."""
    model = build()
    shadow = averages(model)
    torch.save(ema_of(shadow), here / "ema.pt")
    before = model[1].running_mean.clone()  # type: ignore[operator]
    report = load_into(model, "ema.pt")
    assert_named(model.state_dict(), model, shadow)
    assert torch.equal(model[1].running_mean, before)  # type: ignore[arg-type]
    assert [finding.code for finding in report.findings if "shadow_params" in finding.message][:1] == ["load.named"]


FORMS: Mapping[str, Any] = {
    "torch_ema": ema_of,
    "stored weights beside": lambda shadow: (
        ema_of(shadow) | {"collected_params": [torch.zeros_like(p) for p in shadow]}
    ),
    "diffusers": lambda shadow: {"decay": 0.9, "min_decay": 0.0, "optimization_step": 4, "shadow_params": shadow},
    "a tuple": lambda shadow: ema_of(tuple(shadow)),
    "numbers as keys": lambda shadow: {"shadow": dict(enumerate(shadow)), "step": torch.tensor(3)},
    "parameters": lambda shadow: ema_of([nn.Parameter(p) for p in shadow]),
    "only the list": lambda shadow: shadow,
    "a mapping of numbers": lambda shadow: dict(enumerate(shadow)),
    "deeper": lambda shadow: {"callbacks": {"ema": {"shadow_params": shadow}}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_such_a_list_is_read(form: str, tmp_path: Path) -> None:
    """Lists, tuples, numbers as keys, beside counters and other lists: the average is read, by position."""
    model = build()
    shadow = averages(model)
    torch.save(FORMS[form](shadow), tmp_path / "ema.pt")
    path = f"{tmp_path / 'ema.pt'}{'::callbacks.ema' if form == 'deeper' else ''}"
    result = diff(model, path)
    assert len(result.matched) == 8
    load_into(model, path)
    assert_named(model.state_dict(), model, shadow)


def test_a_list_of_those_that_train(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list as long as the trainable parameters is theirs; the others are named as not in the list."""
    model = build(frozen=True)
    shadow = averages(model, trained=True)
    torch.save(ema_of(shadow), "ema.pt")
    ran = run_ckpt(capsys, "diff", py(here, "(frozen=True)"), "ema.pt")
    assert "those of the parameters that train" in ran.err
    assert "2 parameters are not in the list: '0.weight', '0.bias'" in ran.err
    load_into(model, "ema.pt")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in zip(trained, shadow, strict=True):
        assert torch.equal(trained[name], value)


def test_a_part_is_named_only_where_one_way_fits() -> None:
    """Shapes may tell which parameters a shorter list has; two ways are an error that names both."""
    model = build()
    clear = [p for name, p in model.named_parameters() if name.startswith(("0.", "3."))][:1]
    clear += [model[2].weight, model[3].weight]  # type: ignore[list-item]
    result = suggest_rules(model, positional(clear))
    assert [rule.targets for rule in result.suggestions] == [("0.weight",), ("2.weight",), ("3.weight",)]
    with pytest.raises(RuleError, match=r"'shadow_params\.0' is '0\.bias' or '2\.bias'"):
        diff(model, positional([torch.ones(5), model[3].weight]))  # type: ignore[list-item]


def positional(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"shadow_params.{number}": tensor for number, tensor in enumerate(tensors)}


def test_a_list_that_does_not_fit_is_refused() -> None:
    """All shapes are checked: the error names the place, the parameter there and both shapes."""
    model = build()
    shadow = averages(model)
    shadow[4] = torch.ones(7, 7)
    with pytest.raises(RuleError, match=r"'shadow_params.4' is \[7, 7\], and .* '2.weight', is \[5, 5\]"):
        load_into(model, positional(shadow))
    with pytest.raises(RuleError, match="does not fit the model, which has 8 parameters, of which 8 train"):
        merge(model, positional(shadow + shadow), "never.safetensors")
    assert not Path("never.safetensors").exists()


def test_tied_parameters_get_one_tensor_under_both_names() -> None:
    """parameters() lists a tied parameter once, and the state_dict has it under both names."""
    model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["emb"].weight
    shadow = averages(model)
    assert len(shadow) == 3
    assert not diff(model, positional(shadow)).missing
    load_into(model, positional(shadow))
    assert torch.equal(model["head"].weight, shadow[0])  # type: ignore[arg-type]


def test_the_order_of_a_sorted_file_is_not_trusted(tmp_path: Path) -> None:
    """safetensors sorts its keys, so a file of it does not tell the order of the parameters: nothing is named."""
    from safetensors.torch import save_file

    model = build(norm=False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    shadow = positional(averages(model))
    assert diff(tmp_path / "model.safetensors", shadow).matched == ()
    assert len(diff(tmp_path / "model.pt", shadow).matched) == 6


NOT_LISTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "a Sequential": {"0.weight": (2, 2), "1.weight": (2, 2)},
    "a gap": {"shadow_params.0": (2,), "shadow_params.2": (2,)},
    "one tensor, which a module may have": {"params.0": (2,)},
    "named tensors beside": {"shadow_params.0": (2,), "shadow_params.1": (2,), "fc.weight": (2, 2)},
    "another name": {"prompts.0": (2,), "prompts.1": (2,)},
    "names in an average": {"ema.fc.weight": (2, 2), "ema.fc.bias": (2,)},
    "nothing": {},
}


@pytest.mark.parametrize("shapes", NOT_LISTS.values(), ids=NOT_LISTS.keys())
def test_names_are_left_alone(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Only complete lists under names that such lists have are read by position."""
    assert find_positions(shapes) is None


def test_a_module_with_a_list_of_parameters_keeps_its_keys() -> None:
    """A ParameterList has such keys itself; where names or shapes do not fit, a diff shows it as before."""
    model = nn.ParameterDict({"params": nn.ParameterList([nn.Parameter(torch.ones(n + 1)) for n in range(3)])})
    assert not diff(model, model.state_dict()).different
    other = {f"params.{number}": torch.ones(9) for number in range(3)}
    assert len(diff(nn.Linear(2, 2), other).unexpected) == 3


def test_rules_for_the_numbers_come_first() -> None:
    """A user who names the numbers has decided."""
    model = build(norm=False)
    shadow = positional(averages(model))
    names = [name for name, _ in model.named_parameters()]
    rules = [f"{old}={new}" for old, new in zip(shadow, names[:2] + names[4:] + names[2:4], strict=True)]
    result = diff(model, shadow, rules)
    assert not any("has no names" in note for note in result.notes)


def test_show_says_what_the_numbers_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a model there are no names, and the reader says where they come from."""
    torch.save(ema_of(averages(build())), "ema.pt")
    ran = run_ckpt(capsys, "show", "ema.pt")
    assert "by position, without names and buffers: diff, align, merge and --like of a live model" in ran.err
    with open_checkpoint(here / "ema.pt") as checkpoint:
        assert next(iter(checkpoint)) == "shadow_params.0"
