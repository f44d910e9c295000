"""A call that a hint names alone, without a command, ends the trouble where it is made as the hint says."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptkit
from ckptkit import load_into, optimizer_state, param_group_preset, preflight, rebind, stats, validate_param_groups
from ckptkit.errors import CkptkitError
from ckptkit.param_groups.parse import parse_spec
from fixtures.lenet import build
from tests.helpers_hint_situations import TEN
from tests.helpers_hint_sources import PLACES, SOURCES, covers, read_source
from tests.helpers_optim import Net

_CALL = re.compile(r"[\w.]*\w\((?!s\))")
Look = Callable[[], object]


@dataclass(frozen=True)
class _Case:
    """Trouble, the hint that tells how to end it, and the code that does what the hint tells."""

    make: Callable[[Path], tuple[Look, dict[str, Any]]]
    hint: str
    code: str


CASES: list[_Case] = []
SPEC = {"group": [{"name": "all", "rest": True}]}
SPEC_OF_ALL = {"group": [{"name": "all", "params": "*"}]}
_PARTS = [{"group": [{"name": name, "params": f"{name}.*"}]} for name in ("fc", "head")]
_Make = Callable[[Path], tuple[Look, dict[str, Any]]]


def case(hint: str, code: str) -> Callable[[_Make], _Make]:
    """Add a function that makes trouble: it returns a call that shows the hint, and the names that ``code`` uses."""

    def add(make: _Make) -> _Make:
        CASES.append(_Case(make, hint, code))
        return make

    return add


def _hints(look: Look) -> list[str]:
    """Return the hints of the error that a call raises, or of the findings that it returns."""
    try:
        found: Any = look()
    except CkptkitError as error:
        return [str(error)]
    return [finding.hint for finding in getattr(found, "findings", ())]


def _validated(model: nn.Module, groups: Any = None, **names: Any) -> tuple[Look, dict[str, Any]]:
    """Return a look at the groups, and the names of the model, of the groups or the optimizer, and others."""
    groups = [{"params": list(model.parameters())}] if groups is None else groups
    return lambda: validate_param_groups(model, groups), {
        "model": model,
        "groups": groups,
        "optimizer": groups,
        **names,
    }


def _stepped(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@case("param_groups/live.py: make params a list: list(...)", "groups[0]['params'] = list(model.parameters())")
def _an_iterator(_: Path) -> tuple[Look, dict[str, Any]]:
    return _validated(model := nn.Linear(2, 2), [{"params": model.parameters()}])


@case(
    "param_groups/live.py: make params a list in the order of model.named_parameters()",
    "groups[0]['params'] = [tensor for _, tensor in model.named_parameters()]",
)
def _a_set(_: Path) -> tuple[Look, dict[str, Any]]:
    return _validated(model := nn.Linear(2, 2), [{"params": set(model.parameters())}])


@case("param_groups/live.py: use .parameters() of a module", "groups[0]['params'] = list(model.parameters())")
def _a_module(_: Path) -> tuple[Look, dict[str, Any]]:
    return _validated(model := nn.Linear(2, 2), [{"params": [model]}])


@case(
    "param_groups/validate/membership.py: remove the parameter from the groups, or unfreeze it: requires_grad_(True)",
    "model.weight.requires_grad_(True)",
)
def _a_frozen_parameter(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    return _validated(model)


@case(
    "param_groups/validate/membership.py: use the parameter that it was computed from: model.named_parameters()",
    "groups[0]['params'] = [tensor for _, tensor in model.named_parameters()]",
)
def _a_computed_tensor(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2)
    return _validated(model, [{"params": [model.weight * 2, model.bias]}])


def _two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


@case("param_groups/validate/model.py: .clone() one of them", "two.weight.data = two.weight.data.clone()")
def _one_memory(_: Path) -> tuple[Look, dict[str, Any]]:
    model = _two()
    model[1].weight.data = model[0].weight.data
    return _validated(model, two=model[1])


@case(
    "param_groups/validate/model.py: copy.deepcopy() one of the modules",
    "model[1] = copy.deepcopy(model[1]); groups[0]['params'] = list(model.parameters())",
)
def _one_module_twice(_: Path) -> tuple[Look, dict[str, Any]]:
    layer = nn.Linear(2, 2)
    return _validated(nn.Sequential(layer, layer), copy=copy)


@case(
    "param_groups/validate/model.py: make the nn.Parameter last: nn.Parameter(values.to(device))",
    "del model.scale; model.scale = nn.Parameter(values.to(device)); groups[0]['params'] = list(model.parameters())",
)
def _a_computed_attribute(_: Path) -> tuple[Look, dict[str, Any]]:
    model: Any = nn.Linear(2, 2)
    values = torch.ones(2)
    model.scale = nn.Parameter(values).to(torch.float64)
    return _validated(model, nn=nn, values=values, device="cpu")


@case("param_groups/validate/modules.py: call .eval() on the frozen modules", "model[1].eval()")
def _a_frozen_norm_in_training(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].requires_grad_(False)
    return _validated(model, [{"params": list(model[0].parameters())}])


@case(
    "param_groups/validate/modules.py: call XX.requires_grad_(XX)", "model[0].requires_grad_(False); groups[0]['params'"
    "] = list(model[1].parameters()); del model[0].requires_grad",
)  # fmt: skip
def _an_assignment_that_freezes_nothing(_: Path) -> tuple[Look, dict[str, Any]]:
    model: Any = _two()
    model[0].requires_grad = False
    return _validated(model)


def _with_lr(count: int, **options: Any) -> tuple[Look, dict[str, Any]]:
    model, lr = _two(), torch.tensor(0.1)
    groups = [{"params": list(model[at].parameters()), "lr": lr} for at in range(count)]
    optimizer = torch.optim.AdamW(groups)
    for group in optimizer.param_groups:
        group.update(options)
    return _validated(model if count == 2 else model[0], optimizer, lr=lr, group=optimizer.param_groups[-1])


@case("param_groups/validate/optimizer_rules.py: make lr a number, float(lr)", "group['lr'] = float(lr)")
def _a_tensor_as_rate(_: Path) -> tuple[Look, dict[str, Any]]:
    return _with_lr(1, foreach=True)


@case("param_groups/validate/optimizer_rules.py: a tensor of its own: lr.clone()", "group['lr'] = lr.clone()")
def _one_tensor_for_two_rates(_: Path) -> tuple[Look, dict[str, Any]]:
    return _with_lr(2, foreach=False)


@case(
    'param_groups/validate/rates.py: before you build the scheduler: group.pop("initial_lr", None)',
    'group.pop("initial_lr", None); schedulers[0] = build(optimizer)',
)
def _a_rate_of_an_earlier_schedule(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    group["initial_lr"] = 1.0

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    group["lr"] = 0.1
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 3)]
    return lambda: validate_param_groups(model, optimizer, schedulers=schedulers), {
        "group": group, "schedulers": schedulers, "build": scheduler, "optimizer": optimizer,
    }  # fmt: skip


@case("param_groups/validate/state.py: drop the state: optimizer.state.pop(tensor)", "optimizer.state.pop(tensor)")
def _state_of_another_tensor(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2)
    optimizer, tensor = torch.optim.AdamW(model.parameters()), torch.zeros(3)
    optimizer.state[tensor] = {"step": torch.tensor(1.0)}
    return _validated(model, optimizer, tensor=tensor)


@case("param_groups/validate/state.py: drop the state: optimizer.state.pop(key)", "optimizer.state.pop(key)")
def _state_under_a_number(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    optimizer.state[7] = {}
    return _validated(model, optimizer, key=7)


@case("param_groups/validate/state.py: or start without state: optimizer.state.clear()", "optimizer.state.clear()")
def _state_of_another_class(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2)
    optimizer = _stepped(model)
    optimizer.state[model.weight]["momentum_buffer"] = torch.zeros(2, 2)
    return _validated(model, optimizer)


@case("param_groups/validate/state.py: rebind(optimizer, model) lays the state out", "rebind(optimizer, model)")
def _state_in_another_layout(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Conv2d(2, 3, 3)
    optimizer = _stepped(model, fused=True)
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    return _validated(model, optimizer, rebind=rebind)


@case("param_groups/validate/state.py: its own copy.deepcopy()", "two.load_state_dict(copy.deepcopy(saved))")
def _one_state_for_two_optimizers(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    one, two = _stepped(model[0]), _stepped(model[1])
    saved = one.state_dict()
    two.load_state_dict(saved)
    return lambda: validate_param_groups(model, [one, two]), {"two": two, "copy": copy, "saved": saved}


# Loading.


def _loading(model: nn.Module, state: Any, **options: Any) -> tuple[Look, dict[str, Any]]:
    return lambda: load_into(model, state, **options), {"model": model, "state": state, "load_into": load_into}


@case(
    "loading/decision.py: call load_into in torch.inference_mode()",
    "with inference_mode(): look()",
)
def _made_in_inference_mode(_: Path) -> tuple[Look, dict[str, Any]]:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    look, names = _loading(model, nn.Linear(2, 2).state_dict())
    return look, {**names, "inference_mode": torch.inference_mode, "look": look}


@case("loading/decision.py: memory for each element: tensor.clone()", "model.weight.data = tensor.clone()")
def _a_repeated_row(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2)
    model.weight.data = torch.ones(1, 2).expand(2, 2)
    look, names = _loading(model, nn.Linear(2, 2).state_dict())
    return look, {**names, "tensor": model.weight.data}


@case("loading/decision.py: or call model.to_empty(device=...) first", "model.to_empty(device='cpu')")
def _without_memory(_: Path) -> tuple[Look, dict[str, Any]]:
    return _loading(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2).state_dict())


@case("readiness/init.py: load_into(model, init) loads the values", "load_into(model, init)")
def _not_loaded(_: Path) -> tuple[Look, dict[str, Any]]:
    model = build(num_classes=10)
    return lambda: preflight(model, init=TEN), {"model": model, "init": TEN, "load_into": load_into}


@case("readiness/init.py: load_into(model, init) loads all tensors", "load_into(model, init)")
def _loaded_in_part(_: Path) -> tuple[Look, dict[str, Any]]:
    model = build(num_classes=10)
    model.load_state_dict({key: value for key, value in torch.load(TEN).items() if "fc1" in key}, strict=False)
    return lambda: preflight(model, init=TEN), {"model": model, "init": TEN, "load_into": load_into}


# Arguments.


def _given(call: Callable[[Any], object], wrong: Any, **names: Any) -> tuple[Look, dict[str, Any]]:
    given = [wrong]
    return lambda: call(given[0]), {"given": given, "text": wrong, **names}


@case("optimizer_state/forms.py: give optimizer.state_dict()", "given[0] = optimizer.state_dict()")
def _an_optimizer_as_state(_: Path) -> tuple[Look, dict[str, Any]]:
    model = Net()
    optimizer = _stepped(model)
    return _given(lambda state: optimizer_state.to_named(state, model), optimizer, optimizer=optimizer)


@case("optimizer_state/model.py: make one with to_named(state, names)", "given[0] = to_named(state, names)")
def _a_plain_state(_: Path) -> tuple[Look, dict[str, Any]]:
    names = Net()
    state = _stepped(names).state_dict()
    return _given(lambda one: optimizer_state.prune(one, drop=["head.*"]), state, to_named=optimizer_state.to_named,
                  names=names, state=state)  # fmt: skip


@case("rules/load.py: parse it first: tomllib.loads(text)", "import tomllib; given[0] = tomllib.loads(text)")
def _the_text_of_rules(_: Path) -> tuple[Look, dict[str, Any]]:
    return _given(lambda rules: ckptkit.diff(TEN, TEN, rules), '[[rule]]\nfrom = "fc1.*"\nto = "fc1.*"\n')


@case("param_groups/parse.py: parse it first: tomllib.loads(text)", "import tomllib; given[0] = tomllib.loads(text)")
def _the_text_of_a_spec(_: Path) -> tuple[Look, dict[str, Any]]:
    return _given(lambda spec: ckptkit.plan_param_groups(build(), spec), '[[group]]\nname = "all"\nrest = true\n')


@case("plans/recipes/parse.py: parse it first: tomllib.loads(text)", "import tomllib; given[0] = tomllib.loads(text)")
def _the_text_of_a_recipe(_: Path) -> tuple[Look, dict[str, Any]]:
    inputs = f'[[input]]\npath = "{TEN}"\n[[input]]\npath = "{TEN}"\nname = "b"\n'
    return _given(ckptkit.plan_recipe, f'version = 1\nmethod = "average"\n{inputs}')


@case("param_groups/explain.py: use a name of model.named_parameters()", "given[0] = next(model.named_parameters())[0]")
def _a_number_as_name(_: Path) -> tuple[Look, dict[str, Any]]:
    return _given(lambda name: ckptkit.explain_param_group(build(), SPEC, name), 3, model=build())


@case("optimizer_state/groups.py: plan_param_groups(model, spec) makes groups",
      "given[0] = plan_param_groups(model, spec)")  # fmt: skip
def _groups_of_other_types(_: Path) -> tuple[Look, dict[str, Any]]:
    model = Net()
    state = optimizer_state.to_named(_stepped(model).state_dict(), model)
    return _given(lambda groups: optimizer_state.resplit(state, groups), [{"params": []}],
                  plan_param_groups=ckptkit.plan_param_groups, model=model, spec=SPEC)  # fmt: skip


@case("param_groups/rebind/placement.py: pass it as spec=: rebind(optimizer, model, spec=spec)",
      "given[0] = lambda: rebind(optimizer, model, spec=spec)")  # fmt: skip
def _a_spec_in_place_of_a_group(_: Path) -> tuple[Look, dict[str, Any]]:
    model = Net()
    parts = (model.qkv, model.norm, model.fc)
    optimizer = torch.optim.AdamW([{"params": [one for part in parts for one in part.parameters()], "name": "all"}])
    return _given(lambda call: call(), lambda: rebind(optimizer, model, add_missing=SPEC),
                  rebind=rebind, optimizer=optimizer, model=model, spec=SPEC)  # fmt: skip


def _combined(first: Any, second: Any, **names: Any) -> tuple[Look, dict[str, Any]]:
    """Return a look at two specs in one, of which ``given`` has the second, and the names of both."""
    spec, other = parse_spec(first), parse_spec(second)
    return _given(
        lambda one: one() if callable(one) else spec.combined_with(one), other, spec=spec, other=other, **names
    )


@case(
    "param_groups/spec/combining.py: choose one: dataclasses.replace(spec, XX=XX)",
    "import dataclasses; given[0] = dataclasses.replace(other, optimizer='AdamW')",
)
def _two_optimizers(_: Path) -> tuple[Look, dict[str, Any]]:
    return _combined({"optimizer": "AdamW", **_PARTS[0]}, {"optimizer": "SGD", **_PARTS[1]})


@case("param_groups/spec/combining.py: choose one before: spec.XX(XX=XX)", "given[0] = other.with_defaults(lr=0.5)")
def _two_defaults(_: Path) -> tuple[Look, dict[str, Any]]:
    return _combined(
        {"defaults": {"lr": 0.5}, **_PARTS[0]}, param_group_preset("no-decay", Net()).with_defaults(lr=0.1)
    )


@case(
    "param_groups/spec/combining.py: with which this is decided: spec.combined_with(other, model)",
    "given[0] = lambda: spec.combined_with(other, model)",
)
def _groups_that_may_overlap(_: Path) -> tuple[Look, dict[str, Any]]:
    return _combined(*_PARTS, model=Net())


@case(
    "param_groups/spec/combining.py: or change the options by a modifier: spec.with_modifier(...)",
    "given[0] = lambda: spec.with_modifier('head', 'head.*', lr_mult=10)",
)
def _groups_that_overlap(_: Path) -> tuple[Look, dict[str, Any]]:
    look, names = _combined(SPEC_OF_ALL, _PARTS[1])
    names["given"][0] = lambda: names["spec"].combined_with(names["other"], Net())
    return look, names


@case(
    "param_groups/compare/spec.py: build the groups from the spec again",
    "given[0] = AdamW(build_param_groups(model, spec))  # not load_state_dict()",
)
def _options_that_a_spec_does_not_have(_: Path) -> tuple[Look, dict[str, Any]]:
    model, spec = Net(), {"defaults": {"lr": 0.1, "weight_decay": 0.5}, **SPEC}
    return _given(lambda optimizer: validate_param_groups(model, optimizer, spec=spec), torch.optim.AdamW(
        [{"params": list(model.parameters()), "name": "all"}], lr=0.1), AdamW=torch.optim.AdamW, model=model, spec=spec,
        build_param_groups=ckptkit.build_param_groups)  # fmt: skip


@case("param_groups/spec_findings.py: unfreeze the parameters that must train: requires_grad_(True)",
      "model.requires_grad_(True)")  # fmt: skip
def _a_model_that_is_frozen(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2).requires_grad_(False)
    return lambda: ckptkit.plan_param_groups(model, SPEC), {"model": model}


@case("readiness/training.py: unfreeze the parameters that must train: requires_grad_(True)",
      "model.requires_grad_(True)")  # fmt: skip
def _nothing_to_train(_: Path) -> tuple[Look, dict[str, Any]]:
    model = nn.Linear(2, 2).requires_grad_(False)
    return lambda: preflight(model, optimizer="AdamW"), {"model": model}


@case("rules/apply.py: or allow it with parse_rules(..., allow_unused=True)",
      "given[0] = parse_rules(drop=['zz.*'], allow_unused=True)")  # fmt: skip
def _a_rule_without_use(_: Path) -> tuple[Look, dict[str, Any]]:
    rules = ckptkit.parse_rules(drop=["zz.*"])
    return _given(lambda one: stats(TEN, one), rules, parse_rules=ckptkit.parse_rules)


@case(
    "formats/torch/tree.py: save optimizer.state_dict() too",
    "save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, text)",
)
def _a_file_without_the_optimizer(folder: Path) -> tuple[Look, dict[str, Any]]:
    path, model = str(folder / "run.pt"), nn.Linear(2, 2)
    torch.save({"model": model.state_dict()}, path)
    return _given(lambda name: ckptkit.open_optimizer(name).close(), path, save=torch.save, model=model,
                  optimizer=_stepped(model))  # fmt: skip


@case("core/checkpoint/reading.py: read the bytes with read_bytes()", "given[0] = lambda key: read_bytes(key)")
def _without_a_dtype_of_numpy(folder: Path) -> tuple[Look, dict[str, Any]]:
    save_file({"a": torch.zeros(2, 2, dtype=torch.uint8)}, folder / "a.safetensors")
    content = (
        (folder / "a.safetensors").read_bytes().replace(b'"dtype":"U8","shape":[2,2]', b'"dtype":"F4","shape":[2,4]')
    )
    (folder / "a.safetensors").write_bytes(content)
    opened = ckptkit.open_checkpoint(folder / "a.safetensors")
    return _given(lambda read: read("a"), opened.numpy, read_bytes=opened.read_bytes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", CASES, ids=[one.make.__name__.strip("_") for one in CASES])
def test_a_call_in_a_hint_ends_the_trouble(one: _Case, tmp_path: Path) -> None:
    """The hint is shown, names the call that is made, and is not shown again."""
    look, names = one.make(tmp_path)
    words = re.compile(".*".join(map(re.escape, one.hint.partition(": ")[2].split("XX"))))
    told = [hint for hint in _hints(look) if words.search(hint)]
    assert told, _hints(look)
    named = {name.rpartition(".")[2] for name in _CALL.findall(told[0])}
    assert any(name in one.code for name in named), (named, one.code)
    exec(one.code, names)  # noqa: S102 - what a hint says
    if "look" not in names:  # else the code looks again itself
        assert not [hint for hint in _hints(look) if words.search(hint)]


# Hints that name a call and that no case follows, each with the reason.
_LIBRARY = "needs the library that it names"
_ADVICE = "tells how to write the training script, which no call of ckptkit changes"
_PYTHON = "the words for Python of a hint with a command: tests/test_hints.py follows the command"
NOT_FOLLOWED: dict[str, str] = {
    "adapters/peft_config.py: save_pretrained": _LIBRARY,
    "rules/transformers/operations.py: load the checkpoint with from_pretrained": _LIBRARY,
    "optimizer_state/compare.py: call optimizer.eval()": _LIBRARY,
    "optimizer_state/loading/refusals.py: load it with the load_state_dict() of": _LIBRARY,
    "loading/transfer.py: only state_dict() of its module makes this tensor": _LIBRARY,
    "param_groups/validate/optimizer_rules.py: call optimizer.eval()": _LIBRARY,
    "param_groups/validate/membership.py: before deepspeed.initialize()": _LIBRARY,
    "param_groups/validate/modules.py: call model.tie_weights()": _LIBRARY,
    "readiness/init.py: as by model.tie_weights()": _LIBRARY,
    "loading/one_load.py: call model.to_empty(device=...), and load": "followed by tests/test_load_shards.py",
    "loading/one_load.py: build the optimizer after load_into(..., assign=True)": _ADVICE,
    "loading/decision.py: build the model on a real device": "followed above, with to_empty",
    "optimizer_state/loading/checking.py: a hook of the optimizer changed it": "names a cause",
    "optimizer_state/loading/names.py: validate_param_groups(model, optimizer) tells what": "names where to look",
    "param_groups/validate/membership.py: named_parameters(remove_duplicate=False)": "names a cause",
    "param_groups/validate/modules.py: convert the whole module: .to()": _ADVICE,
    "readiness/step_findings.py: ": _ADVICE,
    "readiness/training.py: build the optimizer from build_param_groups(model, spec)": _ADVICE,
    "param_groups/spec_findings.py: unfreeze with requires_grad_(True), or": "as the case of a frozen model",
    "param_groups/spec_findings.py: unfreeze them with requires_grad_(True), remove": "as the case of a frozen model",
    "param_groups/explain.py: lists the names of the parameters": "names where to look",
    "checks/reading/__init__.py: torch.load(XX, map_location": "needs a file that was saved on another device",
    "checks/single_tensors.py: torch.set_flush_denormal(True)": "changes how numbers are computed, not the file",
    "core/config_files.py: an object with to_dict()": "names what is accepted",
    "formats/live/__init__.py: save the state_dict() of the model with torch.save": "ends the use of a model",
    "formats/torch/checkpoint.py: state_dict": "needs the classes of the object in the file",
    "formats/torch/zip.py: save the state_dict()": "only readers that take no archive of code say it",
    "plans/adapters/extract.py: ": _PYTHON,
    "plans/adapters/tied.py: ": _PYTHON,
    "plans/deltas/base.py: open_checkpoint(patch).metadata has the digests": _PYTHON,
}  # fmt: skip


def test_every_hint_that_names_a_call_is_followed() -> None:
    """Each such hint of an error or a finding is in a case, or in the list above."""
    told = [f"{PLACES[path]}: {hint}" for path in SOURCES for hint in read_source(path).hints if _CALL.search(hint)]
    parts = [*(one.hint for one in CASES), *NOT_FOLLOWED]
    assert [part for part in parts if not any(covers(part, hint) for hint in told)] == []
    assert [hint for hint in told if not any(covers(part, hint) for part in parts)] == []
