"""``ckpt groups`` takes a preset instead of a file and a checkpoint instead of a model, and prints specs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptkit.core.config_files import parse_table
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.presets import param_group_preset, param_group_preset_names
from fixtures.lenet import build
from tests.features import needs_optimizer
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_presets import numbers

LENET = "py:fixtures.lenet:build"
SAVED = ROOT / "fixtures" / "lenet_10class.safetensors"


def test_a_question_mark_lists_all_presets(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "groups", "emit", "--preset", "?")
    assert [line.partition(":")[0] for line in ran.out.splitlines()] == list(param_group_preset_names())
    assert not any(line.endswith("et al") for line in ran.out.splitlines())


def test_a_spec_instead_of_a_lock_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "groups", "diff", "fixtures/groups.toml", "--model", LENET)
    assert ran.code == 2
    assert "ckpt groups lock writes a lock of a spec" in ran.err


@pytest.mark.parametrize("form", ["toml", "json"])
def test_an_emitted_preset_is_the_same_spec(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The emitted text has the settings: numbers, words and lists."""
    given = ("--set", "lr=.5", "--set", "head_lr_mult=1e1", "--set", "head=fc3.*")
    ran = run_ckpt(capsys, "groups", "emit", "--preset", "head-lr", *given, "--as", form)
    assert parse_spec(parse_table(ran.out, form)) == param_group_preset(
        "head-lr", lr=0.5, head_lr_mult=10.0, head="fc3.*"
    )
    assert ran.code == 0


def test_the_json_document_of_emit_has_the_spec_and_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "groups", "emit", "--preset", "muon", "--set", "first_conv=[]", "--json")
    document = json.loads(ran.out)
    assert document["schema"] == "ckptkit.groups-emit/1"
    assert parse_spec(document["spec"]) == parse_spec(parse_table(document["text"], "toml"))


def test_emitted_python_runs_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    made: dict[str, object] = {}
    exec(run_ckpt(capsys, "groups", "emit", "--preset", "no-decay", "--model", LENET, "--as", "python").out, made)  # noqa: S102
    model = build()
    groups = made["param_groups"](model)  # type: ignore[operator]
    assert numbers(groups) == numbers(build_param_groups(model, param_group_preset("no-decay")))
    torch.optim.AdamW(groups)


def test_a_spec_in_yaml_is_read_and_printed_as_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "groups.yaml"
    spec.write_text("defaults: {lr: 1e-5}\ngroup:\n- {name: head, params: fc3.*, lr_mult: 10}\n- rest: true\n")
    assert run_ckpt(capsys, "groups", "validate", "--model", LENET, spec).out.startswith("10 trainable parameters")
    toml = run_ckpt(capsys, "groups", "emit", spec).out
    assert parse_spec(parse_table(toml, "toml")) == parse_spec(parse_table(spec.read_text(), "yaml"))


def test_the_table_of_a_checkpoint_prints_its_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    """The assumption is printed on stderr; stdout is the same as for the live model."""
    ran = run_ckpt(capsys, "groups", "table", "--model", SAVED, "--preset", "no-decay", "--json")
    assert "note: every parameter counts as trainable" in ran.err
    live = run_ckpt(capsys, "groups", "table", "--model", LENET, "--preset", "no-decay", "--json")
    assert live.err == ""
    found, expected = ([group["name"] for group in json.loads(one.out)["groups"]] for one in (ran, live))
    assert found == expected
    assert run_ckpt(capsys, "groups", "table", "--model", SAVED, "--preset", "no-decay", "-q").err == ""


@pytest.mark.parametrize(
    ("decay", "scale", "bars"),
    [("0.2", "log scale", [1, 9, 16, 24]), ("0.5", "", [3, 6, 12, 24])],
    ids=["log", "linear"],
)
def test_the_rate_of_each_layer_has_a_bar(
    decay: str, scale: str, bars: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bars are on a log scale from a ratio of 100; the JSON document has the layer of each parameter."""
    given = ("--preset", "gradual-unfreezing", "--set", "phase=3", "--set", f"layer_decay={decay}", "--set", "lr=1.0")
    ran = run_ckpt(capsys, "groups", "table", "--model", LENET, *given)
    drawn = [line.count("█") for line in ran.out.splitlines() if "█" in line]
    assert (drawn, "log scale" in ran.out) == (bars, bool(scale))
    assert "2 parameters that the spec freezes, 456 elements" in ran.out
    document = json.loads(run_ckpt(capsys, "groups", "table", "--model", LENET, *given, "--json").out)
    layers = {one["key"]: one["layer"] for group in document["groups"] for one in group["parameters"]}
    assert (layers["conv2.bias"], layers["fc3.weight"]) == (1, 4)
    assert [one["key"] for one in document["freeze"]] == ["conv1.weight", "conv1.bias"]
    assert document["groups"][0]["modifiers"] == ["depth"]


def test_the_table_has_optimizers_and_conditions(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "groups", "table", "--model", LENET, "--preset", "muon")
    head, hidden, others = ran.out.splitlines()[:3]
    assert "optimizer" in head
    assert "match { all = [{ ndim = 2 }" in hidden
    assert (" Muon " in hidden, " AdamW " in others) == (True, True)


def test_groups_of_several_optimizers_are_validated_together(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "groups", "validate", "--model", LENET, "--preset", "muon")
    assert (ran.code, ran.out.strip()) == (0, "10 trainable parameters, each in exactly one of 2 groups")


def test_a_spec_that_forbids_frozen_parameters_may_freeze_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The groups of both optimizers are built from one plan, so freezing for the first does not fail the second."""
    spec = tmp_path / "groups.toml"
    spec.write_text(
        'frozen = "error"\ndefaults.lr = 1e-3\n'
        '[[group]]\nname = "body"\nparams = "conv1.*"\nfreeze = true\n'
        '[[group]]\nname = "head"\nparams = "fc3.*"\noptimizer = "SGD"\n'
        '[[group]]\nname = "rest"\nrest = true\noptimizer = "AdamW"\n'
    )
    ran = run_ckpt(capsys, "groups", "validate", "--model", LENET, spec)
    assert (ran.code, ran.out, ran.err) == (0, "8 trainable parameters, each in exactly one of 2 groups\n", "")


def test_validate_warns_of_parameters_in_no_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """These parameters would train at the full rate without a message."""
    spec = tmp_path / "groups.toml"
    spec.write_text(
        'defaults.lr = 1e-3\n[[group]]\nname = "all"\nrest = true\n'
        '[[modifier]]\nlayers = ["conv{i:int}.*", "fc3.*"]\nlayer_decay = 0.5\n'
    )
    ran = run_ckpt(capsys, "groups", "validate", "--model", LENET, spec, "--json")
    (finding,) = json.loads(ran.out)["findings"]
    assert (ran.code, finding["code"], finding["severity"]) == (1, "groups.layer-unmatched", "warning")
    assert "4 parameters are in no layer of modifier 'modifier 1'" in finding["message"]


def test_validate_warns_of_options_for_an_unused_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a misspelled class, the group would train with the defaults of the class."""
    spec = tmp_path / "groups.toml"
    spec.write_text('[optimizers.AdamW]\nlr = 1e-3\n[[group]]\nname = "all"\nrest = true\noptimizer = "AdmaW"\n')
    ran = run_ckpt(capsys, "groups", "validate", "--model", LENET, spec, "--json")
    assert ran.code == 1
    assert [one["code"] for one in json.loads(ran.out)["findings"]] == ["groups.optimizer-unused"]


def test_layer_decay_outside_of_a_modifier_gets_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "groups.toml"
    spec.write_text('[defaults]\nlr = 1e-3\nlayer_decay = 0.75\n[[group]]\nname = "all"\nrest = true\n')
    ran = run_ckpt(capsys, "groups", "validate", "--model", LENET, spec)
    assert ran.code == 2
    assert "[[modifier]] layers = [" in ran.err


@needs_optimizer("Muon")
def test_vectors_in_a_group_for_muon_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Muon of torch refuses vectors too."""
    spec = tmp_path / "groups.toml"
    spec.write_text('[[group]]\nname = "all"\nrest = true\noptimizer = "Muon"\nlr = 0.02\n')
    ran = run_ckpt(capsys, "groups", "validate", "--model", LENET, spec, "--json")
    (finding,) = json.loads(ran.out)["findings"]
    assert (ran.code, finding["code"]) == (1, "groups.matrices-only")
    assert "5 parameters with fewer than two dimensions" in finding["message"]
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([torch.nn.Parameter(torch.zeros(3))])


def test_base_shapes_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base-shape file of mup (YAML) and a checkpoint of the base model give the same rates."""
    shapes = {name: parameter.shape for name, parameter in build().named_parameters()}
    grown = {"fc1.weight": [shapes["fc1.weight"][0] // 2, shapes["fc1.weight"][1] // 2]}
    base = {name: grown.get(name, list(shape)) for name, shape in shapes.items()}
    save_file({name: torch.zeros(shape) for name, shape in base.items()}, tmp_path / "base.safetensors")
    plain = {name: base[name] if name in grown else [None] * len(shape) for name, shape in shapes.items()}
    (tmp_path / "base.bsh").write_text(json.dumps(plain))
    rates = []
    for name in ("base.safetensors", "base.bsh"):
        given = ("--preset", "mup", "--set", f"base_shapes={tmp_path / name}")
        ran = run_ckpt(capsys, "groups", "table", "--model", LENET, *given, "--json")
        rates.append(
            {
                one["key"]: group["options"]["lr"]
                for group in json.loads(ran.out)["groups"]
                for one in group["parameters"]
            }
        )
    assert rates[0] == rates[1]
    assert {name for name, lr in rates[0].items() if lr == 5e-4} == {"fc1.weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "--model", LENET], "give a SPEC file, or --preset NAME"),
        (["table", "--model", LENET, "fixtures/groups.toml", "--preset", "muon"], "and not both"),
        (["table", "--model", LENET, "fixtures/groups.toml", "--set", "a=1"], "it needs --preset"),
        (["table", "--model", LENET, "--preset", "moun"], "there is no preset 'moun'"),
        (["table", "--model", LENET, "--preset", "muon", "--set", "rate=1"], "has no setting 'rate'"),
        (["table", "--model", LENET, "--preset", "muon", "--set", "lr=fast"], "lr is the string 'fast'"),
        (["table", "--model", "nowhere.pt", "--preset", "muon"], "nowhere.pt: no such file"),
        (["emit", "--preset", "muon", "--set", "first_conv=", "--as", "python"], "not of the form NAME=VALUE"),
        (["emit", "--preset", "no-decay", "--as", "python"], "Python code lists the names of a model"),
        (["emit", "--preset", "timm-layer-decay"], "'no_weight_decay' is computed from the model"),
    ],
)
def test_wrong_arguments_give_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "groups", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
