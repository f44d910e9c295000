"""A path may stand where the Python API takes a checkpoint, rules, a spec or a lock; what a call opens, it closes."""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptkit
from ckptkit import (
    CkptkitError,
    GroupsError,
    Output,
    OutputError,
    PathError,
    PlanError,
    RuleError,
    build_param_groups,
    choose_output,
    compare_values,
    diff,
    diff_locks,
    execute,
    explain_param_group,
    load_into,
    load_optimizer_state,
    load_plan,
    load_rules,
    lock_document,
    lock_param_groups,
    open_checkpoint,
    open_optimizer,
    optimizer_state_diff,
    param_group_phases,
    param_group_preset,
    parse_lock,
    plan_extract_lora,
    plan_lora,
    plan_merge,
    plan_param_groups,
    plan_remap,
    preflight,
    rebind,
    run_checks,
    save_plan,
    stats,
    suggest_rules,
    validate_param_groups,
)
from ckptkit.cli import main
from ckptkit.integrations.base import ParamGroupsCheck
from ckptkit.optimizer_state.groups import resplit
from ckptkit.optimizer_state.naming import parameters_of, to_named
from ckptkit.optimizer_state.pruning import prune
from ckptkit.optimizer_state.remapping import remap
from ckptkit.testing import assert_loads, assert_same_weights
from fixtures.lenet import Net
from tests.helpers_cli import ROOT, run_ckpt

TEN = str(ROOT / "fixtures/lenet_10class.pth")
DDP = str(ROOT / "fixtures/lenet_ddp.pt")
ZEROS = {key: torch.zeros_like(tensor) for key, tensor in torch.load(TEN, weights_only=True).items()}
SPEC = str(ROOT / "fixtures/groups.toml")
MISSING = "nowhere.pt"
FACTORS = {"fc3.lora_A.weight": torch.ones(1, 84), "fc3.lora_B.weight": torch.ones(10, 1)}
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}


@contextmanager
def same_descriptors() -> Iterator[None]:
    """Fail if the process has other open descriptors after the block than before, also where the block raises."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not list the open descriptors of a process")
    gc.freeze()  # no file of an earlier test is closed inside the block, and there is less to collect than all objects
    before = sorted(os.readlink(f"/proc/self/fd/{number}") for number in _descriptors())
    try:
        yield
    finally:
        after = sorted(os.readlink(f"/proc/self/fd/{number}") for number in _descriptors())
        gc.unfreeze()
        assert after == before


def _descriptors() -> list[str]:
    return [number for number in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{number}")]


def net() -> Net:
    """Return the network with the weights of the fixture."""
    model = Net()
    model.load_state_dict(torch.load(TEN, weights_only=True))
    return model


def trained(model: nn.Module) -> dict[str, list[float]]:
    """Return the values of a model, which can be compared."""
    return {key: tensor.flatten()[:3].tolist() for key, tensor in model.state_dict().items()}


def loaded(checkpoint: Any) -> object:
    model = Net()
    report = load_into(model, checkpoint)
    return report.loaded, report.coverage, trained(model)


def plan_of(plan: ckptkit.Plan) -> object:
    return [(step.out.key, step.out.dtype, step.out.shape, step.sources, step.rule) for step in plan.steps]


def differences(result: ckptkit.StateDictDiff) -> object:
    return [pair.key for pair in result.matched], result.missing, result.unexpected, result.shape_mismatched


def found_codes(report: ckptkit.Report) -> object:
    return {finding.code for finding in report.findings if finding.code != "check.no-checksum"}


def groups_of(plan: Any) -> object:
    return [(group.name, [parameter.name for parameter in group.parameters]) for group in plan.groups]


# Each function that takes a checkpoint, with each of the arguments that may be one, and what is compared of its result.
TAKES_CHECKPOINT: Mapping[str, Callable[[Any], object]] = {
    "diff expected": lambda given: differences(diff(given, net())),
    "diff found": lambda given: differences(diff(net(), given)),
    "compare_values expected": lambda given: compare_values(given, net()).equal,
    "compare_values found": lambda given: compare_values(net(), given).equal,
    "stats": lambda given: {key: tensor.numbers for key, tensor in stats(given).tensors.items()},
    "digest": lambda given: ckptkit.digest(given).contents,
    "check_digests": lambda given: ckptkit.check_digests(ckptkit.digest(TEN), given).ok,
    "make_delta base": lambda given: ckptkit.make_delta(given, net()).counts,
    "make_delta new": lambda given: ckptkit.make_delta(net(), given).counts,
    "run_checks": lambda given: found_codes(run_checks(given, fast=True)),
    "run_checks like": lambda given: found_codes(run_checks(TEN, like=given)),
    "suggest_rules expected": lambda given: suggest_rules(given, DDP).toml().partition("\n")[2],
    "suggest_rules found": lambda given: suggest_rules({"module.fc3.bias": torch.ones(10)}, given).rules,
    "plan_remap": lambda given: plan_of(plan_remap(given, ["fc3.*=head.*"])),
    "plan_remap like": lambda given: plan_of(plan_remap(TEN, like=given)),
    "plan_merge base": lambda given: plan_of(plan_merge(given, TEN)),
    "plan_merge donor": lambda given: plan_of(plan_merge(TEN, given)),
    "plan_merge donors": lambda given: plan_of(plan_merge(TEN, [given, given])),
    "plan_lora": lambda given: plan_of(plan_lora(given, FACTORS, CONFIG)),
    "plan_extract_lora": lambda given: plan_of(plan_extract_lora(ZEROS, given, 2)),
    "load_into": loaded,
    "preflight init": lambda given: preflight(net(), init=given).init,
    "preflight resume": lambda given: preflight(net(), resume=given).resume,
    "plan_param_groups": lambda given: groups_of(plan_param_groups(given, SPEC)),
    "lock_param_groups": lambda given: groups_of(lock_param_groups(given, SPEC)),
    "explain_param_group": lambda given: explain_param_group(given, SPEC, "fc3.weight").options,
    "param_group_preset": lambda given: param_group_preset("no-decay", given, lr=0.1),
    "param_group_phases": lambda given: param_group_phases("gradual-unfreezing", given, lr=0.1),
    "parameters_of": lambda given: parameters_of(given).shapes,
    "assert_loads": lambda given: assert_loads(net(), given),
    "assert_same_weights": lambda given: assert_same_weights(net(), given),
}
# These read values, which a description does not have.
READS_VALUES = {
    "compare_values expected",
    "compare_values found",
    "stats",
    "digest",
    "check_digests",
    "make_delta base",
    "make_delta new",
    "run_checks like",
    "load_into",
    "assert_same_weights",
    "preflight init",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TAKES_CHECKPOINT)
def test_a_checkpoint_may_be_given_in_every_form(name: str) -> None:
    """The result is that of an open Checkpoint; a path is closed, and a Checkpoint of the caller stays open."""
    call = TAKES_CHECKPOINT[name]
    with open_checkpoint(TEN) as checkpoint:
        expected = call(checkpoint)
        assert checkpoint.read("fc3.bias").shape == (10,)
        described = dict(checkpoint.items())
    with same_descriptors():
        assert call(TEN) == call(Path(TEN)) == expected
    assert call(net()) == call(net().state_dict()) == expected
    if name not in READS_VALUES:
        assert call(described) == expected


FAILS: Mapping[str, Callable[[], object]] = {
    "diff": lambda: diff(TEN, MISSING),
    "diff rules": lambda: diff(TEN, DDP, ["absent.*=*"]),
    "stats": lambda: stats(TEN, {"rule": [{"from": "fc3.bias", "to": "c", "op": {"cast": {"dtype": "F16"}}}]}),
    "run_checks": lambda: run_checks(TEN, like=MISSING),
    "suggest_rules": lambda: suggest_rules(TEN, MISSING),
    "make_delta": lambda: ckptkit.make_delta(TEN, DDP),
    "plan_apply_delta": lambda: ckptkit.plan_apply_delta(TEN, TEN),
    "plan_remap": lambda: plan_remap(TEN, dtype="I64"),
    "plan_merge": lambda: plan_merge(TEN, [DDP, MISSING]),
    "plan_lora": lambda: plan_lora(TEN, TEN, CONFIG),
    "plan_lora config": lambda: plan_lora(TEN, TEN),
    "plan_extract_lora": lambda: plan_extract_lora(TEN, DDP, 2),
    "load_into": lambda: load_into(nn.Linear(2, 2), TEN),
    "preflight": lambda: preflight(net(), init=TEN, resume=MISSING),
    "plan_param_groups": lambda: plan_param_groups(TEN, [{"params": "absent.*"}]),
    "explain_param_group": lambda: explain_param_group(TEN, SPEC, "absent"),
    "param_group_preset": lambda: param_group_preset("mup", TEN),
    "load_optimizer_state": lambda: load_optimizer_state(torch.optim.Adam(net().parameters()), net(), DDP),
    "optimizer_state_diff": lambda: optimizer_state_diff(DDP, MISSING),
    "assert_loads": lambda: assert_loads(TEN, DDP, rules=["absent.*=*"]),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_call_that_raises_closes_what_it_opened(name: str) -> None:
    with same_descriptors(), pytest.raises(CkptkitError):
        FAILS[name]()


def test_the_other_forms_of_a_path_work() -> None:
    """``PATH::a.b`` opens a mapping inside a file, and ``py:`` builds a model, as on the command line."""
    with same_descriptors():
        assert diff("py:fixtures.lenet:build(num_classes=10)", f"{DDP}::model", ["module.*=*"]).loads
        live = explain_param_group("py:fixtures.lenet:build", SPEC, "fc3.bias").parameter
    with pytest.raises(PathError) as caught:
        diff("fixtures.lenet:build", TEN)
    assert caught.value.hint == "for a live model write py:fixtures.lenet:build"
    assert live.classes  # only the live model has the class of the module


@pytest.mark.parametrize("given", [b"a.pt", 3, None, nn.Linear], ids=repr)
def test_another_value_than_a_checkpoint_is_refused(given: Any) -> None:
    for name, call in TAKES_CHECKPOINT.items():
        if name.startswith(("diff", "stats", "plan", "load_into", "explain")) and not name.endswith("like"):
            with pytest.raises(CkptkitError) as caught:
                call(given)
            assert not isinstance(caught.value, PathError), name


RULES = '[[rule]]\nfrom = "module.*"\nto = "*"\n'


def state_of(rules: Any) -> object:
    return list(remap(to_named(read_optimizer(), names=named_parameters()), rules).names)


def named_parameters() -> list[str]:
    return [f"module.{name}" for name, _ in Net().named_parameters()]


def read_optimizer() -> Any:
    return torch.load(DDP, weights_only=True)["optimizer"]


TAKES_RULES: Mapping[str, Callable[[Any], object]] = {
    "diff": lambda rules: differences(diff(TEN, DDP, rules)),
    "stats": lambda rules: list(stats(DDP, rules).tensors),
    "digest": lambda rules: list(ckptkit.digest(DDP, rules).tensors),
    "run_checks": lambda rules: found_codes(run_checks(DDP, rules, fast=True, like=TEN)),
    "plan_remap": lambda rules: [step.out.key for step in plan_remap(DDP, rules).steps],
    "plan_merge": lambda rules: [step.sources for step in plan_merge(TEN, DDP, rules).steps],
    "plan_lora": lambda rules: plan_of(
        plan_lora(TEN, {f"module.{key}": tensor for key, tensor in FACTORS.items()}, CONFIG, rules)
    ),
    "plan_extract_lora": lambda rules: [step.out.key for step in plan_extract_lora(ZEROS, DDP, 1, rules).steps],
    "load_into": lambda rules: load_into(Net(), DDP, rules).loaded,
    "preflight": lambda rules: preflight(net(), init=DDP, rules=rules).init,
    "remap of a state": state_of,
    "assert_loads": lambda rules: assert_loads(net(), DDP, rules=rules),
    "assert_same_weights": lambda rules: assert_same_weights(TEN, DDP, rules=rules),
}


@pytest.mark.parametrize("name", TAKES_RULES)
def test_rules_may_be_a_file(name: str, tmp_path: Path) -> None:
    """A TOML file, given as a str or as a Path, means the same as the list of renames."""
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    call = TAKES_RULES[name]
    expected = json.dumps(call(["module.*=*"]), default=str).replace("--rename 'module.*=*'", "RULE")
    for given in (str(path), path):
        with same_descriptors():
            found = json.dumps(call(given), default=str)
        assert found.replace("rule 'module.*=*' (line 1)", "RULE") == expected


def test_a_rename_is_told_from_the_path_of_rules(tmp_path: Path) -> None:
    """A string that is a rename, and no file, gets the list to pass; a file of that name is read."""
    with pytest.raises(RuleError, match="names no file") as caught:
        diff(TEN, DDP, "module.*=*")
    assert caught.value.hint == "pass a list: rules=['module.*=*']"
    with pytest.raises(RuleError, match="a mapping with the key 'module") as mapping:
        diff(TEN, DDP, {"module.*": "*"})
    assert mapping.value.hint == "pass renames as a list: rules=['module.*=*']"
    with pytest.raises(RuleError, match=r"rules is a text, not the path of a file \(parse it first"):
        diff(TEN, DDP, RULES)
    with pytest.raises(PathError, match=r"rules\.tml") as unread:
        diff(TEN, DDP, "rules.tml")
    assert "list of renames" in (unread.value.hint or "")
    path = tmp_path / "a=b.toml"
    path.write_text(RULES)
    assert diff(TEN, DDP, path).loads
    path.write_text("[[rule]]\n")
    with pytest.raises(RuleError) as wrong:
        diff(TEN, DDP, path)
    assert (wrong.value.path, wrong.value.reason.partition(":")[0]) == (str(path), "line 1")


def test_rules_get_variables_and_the_configuration_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each form of ``config`` gives the same rules; the file beside a checkpoint, or its model, is the default."""
    path = tmp_path / "rules.toml"
    path.write_text('[vars]\nheads = "config:heads"\n' + RULES)
    config = tmp_path / "config.json"
    config.write_text('{"heads": 4}')
    expected = load_rules(path, variables={"heads": 4})
    for given in ({"heads": 4}, config, str(config), tmp_path, _Configuration()):
        assert load_rules(path, config=given) == expected
    with pytest.raises(RuleError, match=r"no config\.json"):
        load_rules(path)
    with pytest.raises(RuleError, match=r"no config\.json"):
        diff(TEN, DDP, path)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(Path(DDP).read_bytes())
    assert diff(TEN, weights, path).loads
    model = tmp_path / "model.pt"
    model.write_bytes(Path(TEN).read_bytes())
    assert diff(model, DDP, path).loads  # it is beside the model, and not beside the checkpoint
    ran = run_ckpt(capsys, "diff", model, DDP, "--rules", path)
    assert ran.code == 0, ran.err
    assert plan_remap(DDP, path, like=model).steps
    assert run_ckpt(capsys, "remap", DDP, "-o", tmp_path / "o.pt", "--like", model, "--rules", path).code == 0
    with pytest.raises(RuleError, match="the configuration is"):
        load_rules(path, config=3)
    assert load_rules("preset:gpt2-hf-to-nanogpt") == ckptkit.preset_rules("gpt2-hf-to-nanogpt")


class _Configuration:
    def to_dict(self) -> dict[str, object]:
        """Return the settings, as a configuration of transformers does."""
        return {"heads": 4}


def with_new_head() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net()
    optimizer = torch.optim.SGD([parameter for name, parameter in model.named_parameters() if "fc3" not in name], 0.1)
    return model, optimizer


def rebound(spec: Any) -> object:
    model, optimizer = with_new_head()
    return [finding.message for finding in rebind(optimizer, model, spec=spec).findings]


def validated(**settings: Any) -> object:
    model = net()
    optimizer = torch.optim.SGD(build_param_groups(model, SPEC), lr=0.5)
    return validate_param_groups(model, optimizer, **settings)


TAKES_SPEC: Mapping[str, Callable[[Any], object]] = {
    "build_param_groups": lambda spec: [
        {**group, "params": len(group["params"])} for group in build_param_groups(Net(), spec)
    ],
    "plan_param_groups": lambda spec: groups_of(plan_param_groups(Net(), spec)),
    "lock_param_groups": lambda spec: lock_param_groups(Net(), spec),
    "explain_param_group": lambda spec: explain_param_group(Net(), spec, "fc3.bias"),
    "validate_param_groups": lambda spec: validated(spec=spec),
    "rebind": rebound,
    "preflight": lambda spec: preflight(net(), groups=spec, optimizer="SGD").groups,
    "callback": lambda spec: ParamGroupsCheck(spec=spec).run(
        model := net(), [torch.optim.SGD(build_param_groups(model, SPEC), lr=0.5)], []
    ),
}


@pytest.mark.parametrize("name", TAKES_SPEC)
def test_a_spec_may_be_a_file(name: str, tmp_path: Path) -> None:
    """A TOML file, as a str or as a Path, and a JSON file mean the same as their content."""
    table = {
        "defaults": {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4},
        "group": [{"name": "head", "params": "fc3.*", "lr": 0.01}, {"name": "base", "rest": True}],
    }
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(table))
    call = TAKES_SPEC[name]
    expected = call(table)
    for given in (SPEC, Path(SPEC), path):
        with same_descriptors():
            assert call(given) == expected


def test_a_spec_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PathError) as unread:
        build_param_groups(Net(), "no-decay")
    assert "param_group_preset" in (unread.value.call or "")
    path = tmp_path / "groups.toml"
    path.write_text("[[group]]\nrest = true\n[[gruop]]\n")
    with pytest.raises(GroupsError, match="unknown key 'gruop'") as wrong:
        build_param_groups(Net(), path)
    assert wrong.value.path == str(path)


def test_a_lock_may_be_a_file(tmp_path: Path) -> None:
    """Locks are read where they are compared, and where an optimizer state gets their groups."""
    path = tmp_path / "groups.lock.json"
    lock = lock_param_groups(net(), SPEC)
    path.write_text(json.dumps(lock_document(lock)))
    state = to_named(torch.optim.SGD(net().parameters(), lr=1.0).state_dict(), names=net())
    with same_descriptors():
        assert parse_lock(path) == parse_lock(str(path)) == lock
        assert diff_locks(path, lock) == diff_locks(lock, lock)
        assert validated(lock=path) == validated(lock=lock)
        assert resplit(state, str(path)) == resplit(state, lock)
        assert ParamGroupsCheck(lock=path).lock == lock
        with pytest.raises(PathError):
            diff_locks(lock, tmp_path / "absent.json")
        path.write_text("{}")
        with pytest.raises(GroupsError, match="not a valid lock") as caught:
            ParamGroupsCheck(lock=path)
    assert caught.value.path == str(path)


def test_an_optimizer_state_may_be_a_file(tmp_path: Path) -> None:
    """The state is loaded, compared and measured from a path as from what ``open_optimizer`` returns."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    path = tmp_path / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    for given in (path, str(path), f"{path}::optimizer"):
        fresh = torch.optim.AdamW(model.parameters(), lr=0.5)
        with same_descriptors():
            assert load_optimizer_state(fresh, model, given).ok
            assert not optimizer_state_diff(given, optimizer.state_dict(), names=model).findings
            measured = preflight(model, resume=path, resume_optimizer=given, optimizer=fresh).resume
        assert str(fresh.state_dict()["state"]) == str(optimizer.state_dict()["state"])
        with open_optimizer(path) as state:
            assert measured == preflight(model, resume=path, resume_optimizer=state, optimizer=fresh).resume
    saved = to_named(optimizer.state_dict(), names=model)
    assert prune(saved, path).names == prune(saved, model).names
    ckptkit.write_optimizer_state(saved, tmp_path / "state.pt")
    assert not optimizer_state_diff(tmp_path / "state.pt", path, names=model).findings


@pytest.mark.parametrize("form", [str, Path, dict, open_checkpoint], ids=["str", "Path", "dict", "open"])
def test_a_plan_is_executed_on_every_form_of_its_inputs(form: Any, tmp_path: Path) -> None:
    """The output is a path too, and each way to get the tensors of the plan opens and closes its inputs."""
    given = torch.load(TEN, weights_only=True) if form is dict else form(TEN)
    plan = plan_remap(given, ["fc3.*=head.*"])
    wanted = {key.replace("fc3", "head"): tensor for key, tensor in torch.load(TEN, weights_only=True).items()}
    with same_descriptors():
        for number, sources in enumerate((given, {"source": given})):
            execute(plan, sources, tmp_path / f"{number}.safetensors")
            assert_same_weights(tmp_path / f"{number}.safetensors", wanted)
            assert_same_weights(plan.materialize(sources), wanted)
            assert_same_weights(dict(plan.tensors(sources)), wanted)
        with pytest.raises(OutputError, match="exists"):
            execute(plan, given, tmp_path / "0.safetensors")
    if isinstance(given, ckptkit.Checkpoint):
        given.close()


def test_one_call_reads_and_writes_paths(tmp_path: Path) -> None:
    """Rules, the configuration of an adapter, sizes and dtypes may be what the plans take; all is closed."""
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(FACTORS, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "rules.toml").write_text(RULES)
    out = tmp_path / "out"
    out.mkdir()
    with same_descriptors():
        ckptkit.convert(TEN, tmp_path / "shards", dtype=torch.float64, max_shard_size="100kB")
        ckptkit.merge(TEN, DDP, tmp_path / "merged.pt", str(tmp_path / "rules.toml"))
        ckptkit.merge_lora(TEN, adapter, tmp_path / "folded.pt")
        ckptkit.extract_lora(TEN, tmp_path / "folded.pt", out / "adapter_model.safetensors", 1)
        with pytest.raises(PathError):
            ckptkit.merge(TEN, [DDP, MISSING], tmp_path / "other.pt")
    assert_same_weights(TEN, tmp_path / "shards", check_dtype=False)
    assert_same_weights(tmp_path / "merged.pt", {key.removeprefix("module."): tensor for key, tensor in _ddp().items()})
    weight = torch.load(TEN, weights_only=True)["fc3.weight"]
    folded = torch.load(tmp_path / "folded.pt", weights_only=True)["fc3.weight"]
    torch.testing.assert_close(folded, weight + 2 * FACTORS["fc3.lora_B.weight"] @ FACTORS["fc3.lora_A.weight"])


def _ddp() -> dict[str, torch.Tensor]:
    return dict(torch.load(DDP, weights_only=True)["model"])


def test_a_plan_is_read_from_its_file(tmp_path: Path) -> None:
    """The plan that ``save_plan`` writes is the plan that was made, and its inverse undoes it."""
    path = tmp_path / "plan.json"
    plan = plan_remap(DDP, ["module.*=*"])
    with same_descriptors():
        save_plan(plan, path, DDP)
        assert load_plan(path, {"source": DDP}) == plan
        inverse = load_plan(str(path), {"source": TEN}, invert=True)
        with pytest.raises(PlanError) as caught:
            load_plan(path, {"source": TEN})
        execute(path, DDP, tmp_path / "out.pt")
        execute(inverse, {"source": tmp_path / "out.pt"}, tmp_path / "back.pt", verify=True)
    assert load_plan(path, DDP) == plan
    assert [step.out.key for step in inverse.steps] == list(torch.load(DDP, weights_only=True)["model"])
    assert_same_weights(f"{DDP}::model", tmp_path / "back.pt")
    assert caught.value.path
    with pytest.raises(OutputError, match=r"already exists.*force=True"):
        save_plan(plan, path, DDP)
    with pytest.raises(OutputError, match="is an input"):
        save_plan(plan, DDP, DDP, force=True)
    with pytest.raises(PlanError):
        save_plan(plan, path, TEN, force=True)
    assert load_plan(path, DDP) == plan


def test_save_plan_writes_what_the_command_writes(tmp_path: Path) -> None:
    """The two files are the same, byte for byte, for one input and for two."""
    out, command, call = (str(tmp_path / name) for name in ("out.pt", "command.json", "call.json"))
    assert main(["remap", TEN, "-o", out, "--rename", "fc3.*=head.*", "--plan", command, "-q"]) == 0
    save_plan(plan_remap(TEN, ["fc3.*=head.*"]), call, TEN)
    assert Path(call).read_bytes() == Path(command).read_bytes()
    options = ["--on-mismatch", "skip", "--rename", "module.*=*", "--force", "-q"]
    assert main(["merge", TEN, DDP, "-o", out, *options, "--plan", command]) == 0
    merged = plan_merge(TEN, DDP, ["module.*=*"], on_mismatch="skip")
    save_plan(merged, call, {"base": TEN, "donor": DDP}, force=True)
    assert Path(call).read_bytes() == Path(command).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16", "BF16"], ids=str)
def test_a_dtype_may_be_that_of_torch(dtype: Any) -> None:
    assert plan_of(plan_remap(TEN, dtype=dtype)) == plan_of(plan_remap(TEN, dtype="BF16"))


@pytest.mark.parametrize("dtype", [torch.int64, int, 3, "half a float"], ids=str)
def test_a_dtype_that_floats_cannot_have_is_refused(dtype: Any) -> None:
    with pytest.raises(PlanError, match="dtype"):
        plan_remap(TEN, dtype=dtype)


@pytest.mark.parametrize(
    ("size", "count"),
    [(20, 20), ("20", 20), ("2GB", 2 * 10**9), ("1.5 kB", 1500), ("500MiB", 500 * 2**20), ("1t", 10**12)],
    ids=str,
)
def test_the_size_of_a_shard_may_have_a_unit(size: Any, count: int) -> None:
    assert choose_output("shards", max_shard_size=size).max_shard_size == count


@pytest.mark.parametrize(
    "size", ["huge", "", "2 apples", "-1GB", 2.5, True, "9" * 400, 0, -3, "0kB"], ids=lambda s: str(s)[:9]
)
def test_another_size_of_a_shard_is_refused(size: Any) -> None:
    with pytest.raises(OutputError) as caught:
        choose_output("shards", max_shard_size=size)
    assert caught.value.path == "shards"


def test_the_configuration_of_an_adapter_may_be_a_file(tmp_path: Path) -> None:
    """The file, its directory and its content give one plan; the file beside the adapter is the default."""
    from safetensors.torch import save_file

    save_file(FACTORS, tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(CONFIG))
    expected = plan_of(plan_lora(TEN, FACTORS, CONFIG))
    with same_descriptors():
        for given in (config, str(config), tmp_path, CONFIG):
            assert plan_of(plan_lora(TEN, FACTORS, given)) == expected
        for adapter in (tmp_path, str(tmp_path), tmp_path / "adapter_model.safetensors"):
            assert plan_of(plan_lora(TEN, adapter)) == expected
    for wrong in (3, ["r"], nn.Linear):
        with pytest.raises(RuleError, match="the configuration is"):
            plan_lora(TEN, FACTORS, wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="the scale is unknown") as caught:
        plan_lora(TEN, FACTORS)
    assert caught.value.hint == "give it as lora_config"


def test_base_shapes_may_be_a_file(tmp_path: Path) -> None:
    """A checkpoint of the smaller model, and a JSON file of shapes, are read by the preset."""
    small = {"fc1.weight": torch.ones(4, 2), "fc1.bias": torch.ones(4), "fc2.weight": torch.ones(2, 4)}
    large = {"fc1.weight": torch.ones(8, 2), "fc1.bias": torch.ones(8), "fc2.weight": torch.ones(2, 8)}
    torch.save(small, tmp_path / "small.pt")
    (tmp_path / "small.json").write_text(json.dumps({key: list(value.shape) for key, value in small.items()}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = param_group_preset("mup", large, lr=0.1, base_shapes=small)
        with same_descriptors():
            for name in ("small.pt", "small.json"):
                assert param_group_preset("mup", large, lr=0.1, base_shapes=tmp_path / name) == expected
            with pytest.raises(PathError):
                param_group_preset("mup", large, lr=0.1, base_shapes=tmp_path / "absent.pt")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Output("x.pt", "pickle"),
        lambda: Output("x", "torch", max_shard_size=10),
        lambda: Output("x", "safetensors", max_shard_size=0),
        lambda: Output("x", "safetensors", max_shard_size="2GB"),  # type: ignore[arg-type]
        lambda: Output("x.pt", "torch", force="yes"),  # type: ignore[arg-type]
        lambda: Output(None, "torch"),  # type: ignore[arg-type]
        lambda: choose_output("a\0.pt"),
        lambda: choose_output("a\ud800.pt"),
        lambda: choose_output("SHARDS.PT", max_shard_size=10),
    ],
)
def test_an_output_that_cannot_be_is_refused_where_it_is_made(make: Callable[[], Output]) -> None:
    """An unknown format was written as a torch file, and a name that no file can have was an error of Python."""
    with pytest.raises(CkptkitError):
        make()


ONE_SHARD = "is one of 3 shards, by its name: no other shard is read"
OPENING: dict[str, Callable[[str, str], object]] = {
    "diff": lambda path, _: diff(nn.Linear(2, 2), path),
    "load_into": lambda path, _: load_into(nn.Linear(2, 2), path),
    "stats": lambda path, _: stats(path),
    "plan_remap": lambda path, _: plan_remap(path),
    "convert": ckptkit.convert,
    "assert_loads": lambda path, _: ckptkit.testing.assert_loads(nn.Linear(2, 2), path, fresh="bias"),
}


@pytest.mark.parametrize("call", OPENING.values(), ids=OPENING)
def test_what_the_reader_of_a_path_warns_of_is_a_warning_of_python(
    call: Callable[[str, str], object], tmp_path: Path
) -> None:
    """It names the path. Nobody else sees the Checkpoint of the path."""
    path = str(tmp_path / "model-00001-of-00003.safetensors")
    save_file({"weight": torch.ones(2, 2)}, path)
    with pytest.warns(UserWarning, match=ONE_SHARD) as caught:
        call(path, str(tmp_path / "out.pt"))
    assert [str(one.message).startswith(path) for one in caught] == [True]
    assert caught[0].filename == __file__  # the line of the caller


def test_what_is_reported_or_was_seen_does_not_warn(tmp_path: Path) -> None:
    """``run_checks`` has a finding for each warning, and the caller has the Checkpoint. Notes do not warn."""
    path = tmp_path / "model-00001-of-00003.safetensors"
    save_file({"weight": torch.ones(2, 2)}, path)
    assert any(ONE_SHARD in finding.message for finding in run_checks(path).findings)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.warnings
        diff(nn.Linear(2, 2), checkpoint)
    arrays = tmp_path / "arrays.pt"
    torch.save({"weight": torch.ones(2, 2).numpy()}, arrays)
    with open_checkpoint(arrays) as checkpoint:
        assert [getattr(warning, "severity", "") for warning in checkpoint.warnings] == ["note"]
    stats(arrays)
