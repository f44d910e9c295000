"""A wrong argument of a public function is refused by an error of ckptkit, never by a raw error of Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import optimizer_state
from ckptkit.cli import main
from tests.helpers_cli import ROOT
from tests.helpers_public import public_functions, public_methods

LENET = ROOT / "fixtures" / "lenet_10class.pth"

# A value of each type that a caller may pass by mistake.
WRONG: Mapping[str, Callable[[], object]] = {
    "None": lambda: None,
    "int": lambda: 7,
    "float": lambda: 2.5,
    "NaN": lambda: float("nan"),
    "object": object,
    "list of int": lambda: [1, 2],
    "bytes": lambda: b"bytes",
    "empty string": lambda: "",
    "string": lambda: "no such thing",
    "class": lambda: int,
    "module class": lambda: nn.Linear,
    "function": lambda: lambda *_: None,
    "empty mapping": dict,
    "mapping of int": lambda: {1: 2},
    "empty tuple": lambda: (),
    "generator": lambda: (item for item in (1, 2)),
    "tensor": lambda: torch.ones(2),
    "list of tensor": lambda: [torch.ones(2)],
    "module": lambda: nn.Linear(1, 1),
    "optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),
}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _state(model: nn.Module) -> ckptkit.OptimizerState:
    return optimizer_state.to_named(_optimizer(model).state_dict(), model)


SPEC = {"group": [{"name": "all", "rest": True}]}


def _lora() -> dict[str, object]:
    adapter = {
        "base_model.model.fc.lora_A.weight": torch.ones(1, 2),
        "base_model.model.fc.lora_B.weight": torch.ones(2, 1),
    }
    return {
        "base": {"fc.weight": torch.ones(2, 2)},
        "adapter": adapter,
        "lora_config": {"peft_type": "LORA", "r": 1, "lora_alpha": 1},
    }


def _adapter() -> dict[str, object]:
    lora = _lora()
    return {"source": lora["adapter"], "adapter": "kohya", "lora_config": lora["lora_config"]}


def _tuned() -> dict[str, object]:
    return {"base": {"fc.weight": torch.zeros(2, 2)}, "tuned": {"fc.weight": torch.ones(2, 2)}}


def _good(function: str, folder: Path) -> dict[str, Any]:
    """Return arguments with which the function works."""
    model = nn.Linear(2, 2)
    state = {key: value.detach() for key, value in nn.Linear(2, 2).state_dict().items()}
    table: dict[str, Callable[[], dict[str, Any]]] = {
        "assert_loads": lambda: {"model": model, "checkpoint": state},
        "assert_param_groups": lambda: {"model": model, "groups": _optimizer(model)},
        "assert_same_weights": lambda: {"a": state, "b": dict(state)},
        "build_param_groups": lambda: {"model": model, "spec": SPEC},
        "choose_output": lambda: {"path": folder / "a.safetensors"},
        "compare_values": lambda: {"expected": state, "found": model},
        "convert": lambda: {"source": state, "out": folder / "d.safetensors", "force": True},
        "convert_adapter": lambda: {**_adapter(), "out": folder / "h.safetensors", "force": True},
        "diff": lambda: {"expected": model, "found": state},
        "diff_locks": lambda: {"expected": _lock(), "found": _lock()},
        "execute": lambda: {
            "plan": ckptkit.plan_remap(state),
            "sources": state,
            "out": ckptkit.choose_output(folder / "b.safetensors", force=True),
        },
        "explain_param_group": lambda: {"model": model, "spec": SPEC, "name": "bias"},
        "apply_delta": lambda: {
            "base": state,
            "patch": _patch(state, folder),
            "out": folder / "h.safetensors",
            "force": True,
        },
        "make_delta": lambda: {"base": state, "new": state, "out": folder / "i.safetensors", "force": True},
        "plan_apply_delta": lambda: {"base": state, "patch": _patch(state, folder)},
        "digest": lambda: {"checkpoint": state},
        "check_digests": lambda: {"recorded": ckptkit.digest(state), "checkpoint": state},
        "extract_lora": lambda: {**_tuned(), "out": folder / "adapter_model.safetensors", "rank": 1, "force": True},
        "load_into": lambda: {"model": model, "checkpoint": state},
        "load_optimizer_state": lambda: {"optimizer": _optimizer(model), "model": model, "state": _trained()},
        "load_plan": lambda: {"path": _saved_plan(folder), "sources": {"source": LENET}},
        "load_rules": lambda: {"path": _saved_rules(folder)},
        "lock_document": lambda: {"lock": _lock()},
        "lock_optimizer": lambda: {"model": model, "groups": _optimizer(model)},
        "lock_param_groups": lambda: {"model": model, "spec": SPEC},
        "merge": lambda: {"base": state, "donors": state, "out": folder / "f.safetensors", "force": True},
        "merge_lora": lambda: {**_lora(), "out": folder / "g.safetensors", "force": True},
        "open_checkpoint": lambda: {"path": LENET},
        "open_optimizer": lambda: {"path": ROOT / "fixtures" / "lenet_ddp.pt"},
        "optimizer_state_diff": lambda: {"saved": _state(model), "live": _state(model)},
        "order_like": lambda: {"state": _state(model), "model": model},
        "param_group_phases": lambda: {"name": "gradual-unfreezing", "model": model},
        "param_group_preset": lambda: {"name": "no-decay", "model": model},
        "param_group_preset_names": dict,
        "parse_lock": lambda: {"document": ckptkit.lock_document(_lock())},
        "parse_rules": dict,
        "plan_convert_adapter": _adapter,
        "plan_extract_lora": lambda: {**_tuned(), "rank": 1},
        "plan_lora": _lora,
        "plan_merge": lambda: {"base": state, "donors": state},
        "plan_param_groups": lambda: {"model": model, "spec": SPEC},
        "plan_recipe": lambda: {
            "recipe": {"method": "average", "input": [{"name": "a"}, {"name": "b"}]},
            "inputs": {"a": state, "b": state},
        },
        "plan_remap": lambda: {"source": state},
        "preflight": lambda: {"model": model},
        "preset_names": dict,
        "preset_rules": lambda: {"name": "llama-meta-to-hf", "variables": {"heads": 2, "kv_heads": 2}},
        "prune": lambda: {"state": _state(model), "drop": "bias"},
        "rebind": lambda: {"optimizer": _optimizer(model), "model": model},
        "remap": lambda: {"state": _state(model), "rules": ["*=fc.*"]},
        "resplit": lambda: {"state": _state(model), "groups": _state(model)},
        "run_checks": lambda: {"checkpoint": state},
        "save_plan": lambda: {
            "plan": ckptkit.plan_remap(LENET),
            "path": folder / "saved.json",
            "sources": LENET,
            "force": True,
        },
        "stats": lambda: {"checkpoint": state},
        "suggest_rules": lambda: {"expected": model, "found": state, "rules": []},
        "to_dict": lambda: {"state": _state(model)},
        "to_named": lambda: {"state": _optimizer(model).state_dict(), "names": model},
        "validate_param_groups": lambda: {"model": model, "groups": _optimizer(model)},
        "write_optimizer_state": lambda: {
            "state": _state(model),
            "output": ckptkit.choose_output(folder / "o.pt", force=True),
        },
    }
    return table[function]()


@cache
def _lock() -> ckptkit.ParamGroupsLock:
    model = nn.Linear(2, 2)
    return ckptkit.lock_optimizer(model, _optimizer(model))


def _saved_plan(folder: Path) -> Path:
    path = folder / "plan.json"
    if not path.exists():
        assert main(["remap", str(LENET), "-o", str(folder / "c.safetensors"), "--plan", str(path), "-q"]) == 0
    return path


def _patch(base: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / "patch.safetensors"
    ckptkit.make_delta(base, base, path, force=True)
    return path


def _saved_rules(folder: Path) -> Path:
    path = folder / "rules.toml"
    path.write_text('keep = ["fc1.*"]', encoding="utf-8")
    return path


def _trained() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = _optimizer(model)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@cache
def _methods() -> dict[str, dict[str, Any]]:
    """Return, for each method with arguments of a public class, arguments with which it works."""
    model = nn.Linear(2, 2)
    checkpoint = ckptkit.open_checkpoint(LENET)
    spec = ckptkit.param_group_preset("no-decay", lr=0.1)
    state = _state(model)
    plan = ckptkit.plan_remap(model)
    report = ckptkit.stats(model)
    rule = spec.rules[0]
    table: dict[str, dict[str, Any]] = {
        "Checkpoint.check_unchanged": {},
        "Checkpoint.numpy": {"key": "fc3.bias"},
        "Checkpoint.payload": {"key": "fc3.bias"},
        "Checkpoint.read": {"key": "fc3.bias"},
        "Checkpoint.read_bytes": {"key": "fc3.bias"},
        "Checkpoint.span": {"key": "fc3.bias"},
        "Checkpoint.state_dict": {},
        "Checkpoint.with_as_entries": {"keys": ["fc3.bias"]},
        "Checkpoint.without": {"keys": ["fc3.bias"]},
        "OptimizerState.group_of": {"name": "bias"},
        "OptimizerState.slot": {"name": "momentum_buffer"},
        "ParamGroupSpec.combined_with": {"other": spec.with_defaults()},
        "ParamGroupSpec.defaults_for": {"rule": rule},
        "ParamGroupSpec.freeze": {"params": "fc.*"},
        "ParamGroupSpec.optimizer_of": {"rule": rule},
        "ParamGroupSpec.with_defaults": {"lr": 0.1},
        "ParamGroupSpec.with_group": {"name": "head", "params": "fc.*"},
        "ParamGroupSpec.with_modifier": {"name": "less", "params": "fc.*", "lr_mult": 0.1},
        "Plan.materialize": {"sources": model},
        "Plan.tensors": {"sources": model},
        "Report.raise_for_errors": {},
        "StateDictStats.modules": {"depth": 1},
    }
    owners: dict[str, object] = {
        "Checkpoint": checkpoint,
        "OptimizerState": state,
        "ParamGroupSpec": spec,
        "Plan": plan,
        "Report": ckptkit.Report(),
        "StateDictStats": report,
    }
    return {name: {"self": owners[name.partition(".")[0]], **arguments} for name, arguments in table.items()}


@pytest.mark.parametrize("name", sorted(public_functions()))
def test_wrong_types_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With right arguments the function works. With one wrong argument it works, or raises an error of ckptkit."""
    monkeypatch.chdir(tmp_path)
    refusals = (AssertionError,) if name.startswith("assert_") else ()
    assert "\n".join(_raw_errors(public_functions()[name], lambda: _good(name, tmp_path), refusals)) == ""


@pytest.mark.parametrize("name", sorted(_methods()))
def test_wrong_types_are_refused_by_methods(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of public classes refuse wrong arguments too; an unknown key of a mapping is a ``KeyError``."""
    monkeypatch.chdir(tmp_path)
    refusals = (KeyError,) if name.startswith("Checkpoint.") else ()
    assert "\n".join(_raw_errors(public_methods()[name], lambda: _methods()[name], refusals)) == ""


def test_every_method_is_in_the_table() -> None:
    """A new method with arguments needs a row, which says how it is called rightly."""
    internal = {"Checkpoint.with_configuration", "Checkpoint.with_entries", "Checkpoint.with_warnings"}
    of_executors = {"RayExecutor.shutdown", "RayExecutor.submit"}  # as in concurrent.futures
    assert set(public_methods()) - internal - of_executors == set(_methods())


def _raw_errors(
    function: Callable[..., object], good: Callable[[], dict[str, Any]], refusals: tuple[type[Exception], ...] = ()
) -> Iterator[str]:
    """Yield each call with one wrong argument that raises another error than one of ckptkit or of ``refusals``."""
    function(**good())
    refused: tuple[type[Exception], ...] = (ckptkit.CkptkitError, *refusals)
    for parameter, kind, wrong in _mistakes(function):
        call = f"{function.__qualname__}({parameter}={kind})"
        try:
            function(**{**good(), parameter: wrong})
        except refused as error:
            if isinstance(error, ckptkit.ArgumentError) and parameter not in str(error):
                yield f"{call} is refused without the name of the argument: {error}"
        except Exception as error:  # noqa: BLE001 - every other error is what this test looks for
            yield f"{call}: {type(error).__name__}: {error}"


def _mistakes(function: Callable[..., object]) -> Iterator[tuple[str, str, object]]:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        names = ["lr"] if parameter.kind is inspect.Parameter.VAR_KEYWORD else [parameter.name]
        for name in names:
            # A module can be called too, and fails when it is.
            kinds = [kind for kind in WRONG if (name, kind) != ("progress", "module")]
            yield from ((name, kind, WRONG[kind]()) for kind in kinds)


@pytest.mark.parametrize(
    "name", ["diff", "load_into", "merge", "plan_merge", "plan_remap", "run_checks", "stats", "suggest_rules"]
)
def test_the_words_of_rules_have_their_place(name: str, tmp_path: Path) -> None:
    """``strip="auto"`` is an option of the command: the error names the argument of Python."""
    with pytest.raises(
        ckptkit.ArgumentError, match=rf"{name}\(\) has no argument strip .give rules=parse_rules\(strip="
    ):
        public_functions()[name](**_good(name, tmp_path), strip="auto")


@pytest.mark.parametrize(
    ("name", "argument", "hint"),
    [
        ("load_into", "strict", r'on_missing="error" and on_unexpected="error"'),
        ("load_into", "map_location", "whatever its"),
        ("load_into", "device", "move the model"),
        ("diff", "strict", "loads_strict"),
    ],
)
def test_arguments_of_torch_and_of_commands_are_answered(name: str, argument: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ckptkit.ArgumentError, match=rf"{name}\(\) has no argument {argument} \(.*{hint}"):
        public_functions()[name](**_good(name, tmp_path), **{argument: True})


def test_what_another_function_takes_is_answered() -> None:
    """A method of merging is of a recipe, options of groups are of a spec, and a class is not yet a model."""
    with pytest.raises(ckptkit.ArgumentError, match=r"merge\(\) has no argument method \(.*plan_recipe"):
        ckptkit.merge({}, {}, "out.pt", method="linear")  # type: ignore[call-arg]
    with pytest.raises(ckptkit.ArgumentError, match=r"no argument lr \(.*param_group_preset\('no-decay', lr=1e-3\)"):
        ckptkit.build_param_groups(torch.nn.Linear(2, 2), lr=0.1)  # type: ignore[call-arg]
    with pytest.raises(ckptkit.ModelError, match=r"model is the class Linear \(give an instance of it: Linear\(\)"):
        ckptkit.load_into(torch.nn.Linear, {})  # type: ignore[arg-type]
