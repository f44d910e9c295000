"""Odd models, optimizers, schedulers and losses: every function gives a report, or refuses with a ``CkptkitError``.

A row is here because it raised another exception once, or because its neighbour did. Two of them ended the process.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, SequentialLR, StepLR

import ckptkit
from ckptkit.errors import CkptkitError
from ckptkit.render.findings import findings_document, findings_page
from ckptkit.render.page import as_text
from ckptkit.render.preflight import preflight_document, preflight_page
from tests.helpers_cli import run_ckpt

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns about most of these

SPEC = {
    "defaults": {"lr": 0.1},
    "group": [{"rest": True}],
    "modifier": [{"match": {"ndim": 1}, "weight_decay": 0.0}],
}


def attempt(call: Callable[[], Any]) -> Any:
    """Return the result of ``call``, rendered in every way if it is a report; or the error that ckptkit raised."""
    try:
        result = call()
    except CkptkitError as error:
        result = error
    if isinstance(result, CkptkitError):
        assert result.reason.strip()
        assert "\n" not in str(result)
    if isinstance(result, ckptkit.Preflight):
        list(as_text(preflight_page(result)))
        json.dumps(preflight_document(result), allow_nan=False)
    elif isinstance(result, ckptkit.Report):
        list(as_text(findings_page(result)))
        json.dumps(findings_document(result), allow_nan=False)
    if isinstance(result, ckptkit.Report):
        result._repr_html_()
        assert str(result)
    return result


def codes(result: Any) -> set[str]:
    return {finding.code for finding in result.findings}


def loss(model: nn.Module) -> torch.Tensor:
    return torch.as_tensor(model(torch.ones(2, 3))).float().abs().sum()


# Models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.l(x)


def having(**members: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model that also has these members; a function makes its member."""

    def build() -> nn.Module:
        model = Net()
        for name, member in members.items():
            setattr(model, name, member() if callable(member) and not isinstance(member, type) else member)
        return model

    return build


def parameter(make: Callable[[], torch.Tensor], *, trains: bool = False) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(make(), requires_grad=trains)


def overriding(**methods: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model of a class that overrides these methods."""
    return type("Odd", (Net,), methods)


def raising(*_: object, **__: object) -> Any:
    raise RuntimeError("not\nnow")


def without_argument(self: nn.Module, prefix: str = "", recurse: bool = True) -> Any:
    return nn.Module.named_parameters(self, prefix, recurse)


def old_named_modules(self: nn.Module, memo: Any = None, prefix: str = "") -> Any:
    return nn.Module.named_modules(self, memo, prefix)


def with_entry(table: str, name: Any, value: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model with an entry in a private table that ``register_...`` would have refused."""

    def build() -> nn.Module:
        model = Net()
        getattr(model, table)[name] = value
        return model

    return build


def without_method(name: str) -> Callable[[], nn.Module]:
    """Return a builder of a model where a value hides a method of its weight, as after a forgotten call."""

    def build() -> nn.Module:
        model = Net()
        setattr(model.l.weight, name, False)
        return model

    return build


def freed() -> nn.Module:
    model = Net()
    model.l.weight.untyped_storage().resize_(0)
    return model


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net()


def answering_everything(self: nn.Module, name: str) -> Any:
    try:
        return nn.Module.__getattr__(self, name)
    except AttributeError:
        return lambda *_, **__: self


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


MODELS: dict[str, Callable[[], Any]] = {
    "empty": nn.Module,
    "not a model": lambda: 3,
    "a class": lambda: Net,
    "meta": lambda: Net().to("meta"),
    "lazy": having(lazy=lambda: nn.LazyLinear(3)),
    "sparse": having(p=parameter(lambda: torch.eye(3).to_sparse(), trains=True)),
    "csr": having(p=parameter(lambda: torch.eye(3).to_sparse_csr())),
    "quantized": having(p=parameter(quantized)),
    "nested": having(p=parameter(nested, trains=True)),
    "float8": having(p=parameter(lambda: torch.ones(3).to(torch.float8_e5m2), trains=True)),
    "complex": having(p=parameter(lambda: torch.ones(3, dtype=torch.complex64), trains=True)),
    "integers": having(p=parameter(lambda: torch.arange(3)), q=parameter(lambda: torch.ones(3) > 0)),
    "no elements": having(p=parameter(lambda: torch.empty(0, 3), trains=True)),
    "expanded": having(p=parameter(lambda: torch.ones(1).expand(3), trains=True)),
    "odd names": having(d=lambda: nn.ParameterDict({"a b": torch.ones(3), "\u202e\n*{": torch.ones(3)})),
    "freed": freed,
    "in inference mode": in_inference_mode,
    "script": lambda: torch.jit.trace(Net(), torch.ones(2, 3)),  # type: ignore[no-untyped-call]
    "text as a parameter": with_entry("_parameters", "odd", "text"),
    "number as the name of a parameter": with_entry("_parameters", 3, nn.Parameter(torch.ones(3))),
    "number as a buffer": with_entry("_buffers", "odd", 3),
    "text as a module": with_entry("_modules", "odd", "text"),
    "requires_grad_ = False": without_method("requires_grad_"),
    "never initialised": overriding(__init__=lambda *_: None),
    "failing named_parameters": overriding(named_parameters=raising),
    "old named_parameters": overriding(named_parameters=without_argument),
    "old named_modules": overriding(named_modules=old_named_modules),
    "failing state_dict": overriding(state_dict=raising),
    "list as state_dict": overriding(state_dict=lambda *_, **__: [1]),
    "failing copy": overriding(__deepcopy__=raising),
    "no copy": overriding(__deepcopy__=lambda *_: None),
    "another copy": overriding(__deepcopy__=lambda *_: nn.Linear(3, 3, bias=False)),
    "every attribute": overriding(__getattr__=answering_everything),
    "failing truth": overriding(__bool__=raising, __len__=raising, __iter__=raising),
    "failing equality": overriding(__eq__=raising, __hash__=None),
    "failing property": overriding(device=property(raising), no_weight_decay=raising),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_odd_models(name: str) -> None:
    """A model that cannot be listed, copied or read is refused in one sentence; any other gets a report."""
    model = MODELS[name]()
    groups = attempt(lambda: ckptkit.build_param_groups(model, SPEC))
    attempt(lambda: ckptkit.plan_param_groups(model, ckptkit.param_group_preset("timm-weight-decay", model, lr=0.1)))
    attempt(lambda: ckptkit.preflight(model, groups=SPEC, optimizer="SGD", dry_step=loss, init={"w": torch.ones(1)}))
    if isinstance(groups, list):
        attempt(lambda: ckptkit.validate_param_groups(model, groups, spec=SPEC))
    if isinstance(model, nn.Module) and name not in {"never initialised", "failing named_parameters"}:
        try:
            optimizer = SGD(list(model.parameters()), lr=0.1, momentum=0.9)
        except Exception:  # noqa: BLE001 - torch refuses it, so there is nothing to check
            return
        attempt(lambda: ckptkit.validate_param_groups(model, optimizer))
        attempt(lambda: ckptkit.preflight(model, optimizer=optimizer, resume=model))
        attempt(lambda: ckptkit.load_optimizer_state(optimizer, model, optimizer.state_dict()))
        attempt(lambda: ckptkit.rebind(optimizer, model))


# Optimizers


def group_with(**options: Any) -> Callable[[Net], Any]:
    """Return a builder of an optimizer with these options in its group."""

    def build(model: Net) -> Any:
        optimizer = AdamW(model.parameters())
        optimizer.param_groups[0].update(options)
        return optimizer

    return build


def optimizer_with(**attributes: Any) -> Callable[[Net], Any]:
    """Return a builder of an optimizer with these attributes."""

    def build(model: Net) -> Any:
        optimizer: Any = AdamW(model.parameters())
        for name, value in attributes.items():
            setattr(optimizer, name, value)
        return optimizer

    return build


def state_of(make: Callable[[torch.Tensor], Any]) -> Callable[[Net], Any]:
    """Return a builder of an optimizer with this state for each parameter."""

    def build(model: Net) -> Any:
        optimizer = AdamW(model.parameters())
        for tensor in model.parameters():
            optimizer.state[tensor] = make(tensor)
        return optimizer

    return build


def slots(**odd: Any) -> Callable[[Net], Any]:
    """Return a builder of an optimizer with these values in the state of each parameter; a function makes its value."""

    def make(tensor: torch.Tensor) -> dict[str, Any]:
        usual = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
        return {**usual, **{name: value(tensor) if callable(value) else value for name, value in odd.items()}}

    return state_of(make)


def freed_like(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.ones(tensor.shape)
    made.untyped_storage().resize_(0)
    return made


def in_itself(_: torch.Tensor) -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


class Bare:
    """An optimizer that has nothing but groups."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]


class Unready:
    """A wrapper that has its groups only later."""

    @property
    def param_groups(self) -> Any:
        raise RuntimeError("prepare() first")


class Exits(AdamW):
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002 - torch's signature
        sys.exit(3)


class Unsaved(AdamW):
    """An optimizer that can be neither copied nor saved."""

    __deepcopy__ = __getstate__ = state_dict = raising


FLAGS = ("amsgrad", "capturable", "foreach", "fused", "maximize", "decoupled_weight_decay", "differentiable")
OPTIMIZERS: dict[str, Callable[[Net], Any]] = {
    **{f"{flag} is an array": group_with(**{flag: np.ones(2)}) for flag in FLAGS},
    **{
        f"lr is {value!r:.40}": group_with(lr=value)
        for value in (
            *(None, "0.1", float("nan"), 10**400, 1j, True, [0.1], np.ones(2), torch.ones(2), torch.empty(0)),
            *(torch.empty((), device="meta"), torch.tensor(1j), torch.tensor(0.1, requires_grad=True)),
        )
    },
    "betas is an array": group_with(betas=np.ones(2), eps="x", weight_decay=np.ones(2)),
    "betas is a generator": group_with(betas=(beta for beta in (0.9, 0.9)), initial_lr=np.ones(2)),
    "names are numbers": group_with(param_names=[1, 2], name={}),
    "names are an array": group_with(param_names=np.array(["a", "b"]), name=torch.ones(2)),
    "an option without a name": lambda model: AdamW([{"params": model.parameters(), None: 1, ("a", 1): np.ones(2)}]),  # type: ignore[arg-type]
    "no groups": optimizer_with(param_groups=[]),
    "groups are None": optimizer_with(param_groups=None),
    "groups are a dict": optimizer_with(param_groups={"a": 1}),
    "groups are lists": optimizer_with(param_groups=[[1]]),
    "params are missing": optimizer_with(param_groups=[{"lr": 0.1}]),
    "params are a tuple": lambda model: optimizer_with(param_groups=({"params": tuple(model.parameters())},))(model),
    "params are a dict": lambda model: optimizer_with(param_groups=[{"params": dict(model.named_parameters())}])(model),
    "params are other things": optimizer_with(param_groups=[{"params": [np.ones(3), None, "a"]}]),
    "foreign params": lambda _: AdamW([nn.Parameter(torch.ones(3)), nn.UninitializedParameter()]),
    "defaults are None": optimizer_with(defaults=None),
    "defaults are a list": optimizer_with(defaults=[1]),
    "state is None": optimizer_with(state=None),
    "state is a list": optimizer_with(state=[1]),
    "state under odd keys": optimizer_with(state={"all": {"a": 1}, 3: torch.ones(3), None: None, (1, 2): [3]}),
    "state of a parameter is a tensor": state_of(lambda _: torch.ones(3)),
    "state of a parameter is a list": state_of(lambda _: [1, torch.ones(3)]),
    "slots without names": state_of(lambda _: {0: torch.ones(3), ("a",): 1, None: torch.ones(1)}),
    "huge step": slots(step=10**400),
    "sparse step": slots(step=torch.ones(1).to_sparse()),
    "complex step": slots(step=torch.tensor(1j)),
    "text as step": slots(step="one"),
    "numpy slots": slots(step=np.int64(3), exp_avg=np.ones(3)),
    "nested slot": slots(exp_avg=lambda _: nested()),
    "quantized slot": slots(exp_avg=lambda _: quantized()),
    "sparse slot": slots(exp_avg=lambda _: torch.eye(3).to_sparse()),
    "csr slot": slots(exp_avg=lambda _: torch.eye(3).to_sparse_csr(), exp_avg_sq=None),
    "only freed slots": slots(exp_avg=freed_like, exp_avg_sq=freed_like),
    "float8 slot": slots(exp_avg=lambda tensor: torch.zeros_like(tensor).to(torch.float8_e4m3fn)),
    "freed slot": slots(exp_avg=freed_like),
    "slot in itself": slots(exp_avg=in_itself),
    "module as slot": slots(exp_avg=lambda _: nn.Linear(2, 2), function=lambda _: max),
    "only groups": lambda model: Bare(model.parameters()),
    "groups later": lambda _: Unready(),
    "exits": lambda model: Exits(model.parameters()),
    "unsaved": lambda model: Unsaved(model.parameters()),
    "two": lambda model: [AdamW([model.l.weight]), SGD([model.l.bias], lr=0.1)],
    "a dict": lambda model: {"a": AdamW(model.parameters())},
    "arrays": lambda _: [np.ones(3)],
    "an unknown name": lambda _: "AdamX",
    "a function": lambda _: functools.partial(AdamW, lr=0.1),
    "another class": lambda _: dict,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_odd_optimizers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Odd options and state are findings or errors for every function, and for the commands that read the file."""
    model = Net()
    optimizer = OPTIMIZERS[name](model)
    attempt(lambda: ckptkit.validate_param_groups(model, optimizer, spec=SPEC))
    lock = attempt(lambda: ckptkit.lock_optimizer(model, optimizer))
    if isinstance(lock, ckptkit.ParamGroupsLock):
        assert ckptkit.parse_lock(json.loads(json.dumps(ckptkit.lock_document(lock)))).fingerprint == lock.fingerprint
    attempt(lambda: ckptkit.preflight(model, optimizer=optimizer, groups=SPEC, dry_step=loss))
    try:
        state = optimizer.state_dict()
    except Exception:  # noqa: BLE001 - torch itself fails here
        state = None
    if state is not None:
        attempt(lambda: ckptkit.preflight(model, optimizer=optimizer, resume=model, resume_optimizer=state))
        attempt(lambda: ckptkit.load_optimizer_state(optimizer, model, state))
        path = tmp_path / "state.pt"
        try:
            torch.save(state, path)
        except Exception:  # noqa: BLE001 - torch cannot save it
            path.unlink(missing_ok=True)
        if path.exists():
            assert run_ckpt(capsys, "optim", "show", path, "--json").code in {0, 1, 2}
    attempt(lambda: ckptkit.rebind(optimizer, model))
    attempt(lambda: ckptkit.rebind(optimizer, Net(), guess=True))


@pytest.mark.parametrize("flag", FLAGS)
def test_an_option_that_is_neither_true_nor_false_is_an_error(flag: str) -> None:
    """A step would fail with it; a numpy bool is fine."""
    model = Net()
    report = ckptkit.validate_param_groups(model, group_with(**{flag: np.ones(2)})(model))
    assert [f.severity for f in report.findings if f.code == "groups.option-value" and flag in f.message] == ["error"]
    assert codes(ckptkit.validate_param_groups(model, group_with(maximize=np.bool_(True))(model))) == set()


# Schedulers and losses


class Failing:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Loop:
    """A scheduler that is its own part."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self._schedulers, self.base_lrs, self.last_epoch = optimizer, [self], 3, "a"

    def step(self) -> None:
        return


def changed(**attributes: Any) -> Callable[[Any], Any]:
    def build(optimizer: Any) -> Any:
        scheduler = copy.copy(StepLR(optimizer, 2))
        vars(scheduler).update(attributes)
        return scheduler

    return build


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "failing": lambda _: Failing(),
    "loop": Loop,
    "number": lambda _: 3,
    "text": lambda _: "StepLR",
    "class": lambda _: StepLR,
    "None in a list": lambda _: [None],
    "as Lightning returns it": lambda optimizer: [{"scheduler": StepLR(optimizer, 2), "interval": "step"}],
    "in lists": lambda optimizer: [[StepLR(optimizer, 2)]],
    "parts": lambda optimizer: SequentialLR(optimizer, [StepLR(optimizer, 2), LambdaLR(optimizer, lambda _: 1)], [1]),
    "base_lrs are None": changed(base_lrs=None),
    "base_lrs are texts": changed(base_lrs=["a", "b"]),
    "base_lrs are arrays": changed(base_lrs=[np.ones(2)]),
    "last_epoch is None": changed(last_epoch=None),
    "last_epoch is a tensor": changed(last_epoch=torch.ones(2)),
    "optimizer is None": changed(optimizer=None),
    "parts are numbers": changed(_schedulers=[3, None]),
}


@pytest.mark.parametrize("rate", [10**400, np.ones(2), torch.empty((), device="meta"), None], ids=type)
def test_odd_rates_of_tied_parameters(rate: Any) -> None:
    """A rate that is not a number is not compared with the rates of other groups."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    groups: list[dict[str, Any]] = [
        {"params": [model[0].weight]},
        {"params": [model[0].bias, model[1].bias], "lr": 0.5},
    ]
    optimizer = AdamW(groups)
    optimizer.param_groups[0]["lr"] = rate
    assert "groups.tied" not in codes(attempt(lambda: ckptkit.validate_param_groups(model, optimizer)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_odd_schedulers(name: str) -> None:
    """A scheduler that cannot be read is refused by its class; odd attributes are not compared."""
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    schedulers = SCHEDULERS[name](optimizer)
    attempt(lambda: ckptkit.validate_param_groups(model, optimizer, schedulers=schedulers, spec=SPEC))
    attempt(lambda: ckptkit.preflight(model, optimizer=optimizer, schedulers=schedulers))
    attempt(lambda: ckptkit.rebind(optimizer, model, schedulers=schedulers))


def clearing(model: nn.Module) -> torch.Tensor:
    value = loss(model)
    for module in model.modules():
        module._parameters.clear()
    return value


def with_autocast(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss(model)


LOSSES: dict[str, tuple[Any, bool]] = {  # the function, and whether the step fails
    "usual": (loss, False),
    "autocast": (with_autocast, False),
    "one element": (lambda model: loss(model).reshape(1), False),
    "NaN": (lambda model: loss(model) * float("nan"), False),
    "exit": (lambda _: sys.exit(3), True),
    "division": (lambda _: 1 / 0, True),
    "None": (lambda _: None, True),
    "a float": (lambda _: 1.5, True),
    "a tuple": (lambda model: (loss(model), 1), True),
    "a vector": (lambda model: model(torch.ones(2, 3)), True),
    "complex": (lambda model: loss(model) * 1j, True),
    "meta": (lambda _: torch.ones((), device="meta", requires_grad=True), True),
    "sparse": (lambda _: torch.ones(1, requires_grad=True).to_sparse(), True),
    "constant": (lambda _: torch.ones(()), True),
    "integer": (lambda _: torch.tensor(1), True),
    "after backward": (lambda model: [value := loss(model), value.backward()][0], True),  # type: ignore[no-untyped-call]
    "without an argument": (lambda: 1, True),
    "not a function": ("loss", True),
    "no parameters left": (clearing, False),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_odd_losses(name: str) -> None:
    """A loss that is not a tensor of one real number is a finding, also where the function ends the program."""
    function, fails = LOSSES[name]
    report = attempt(lambda: ckptkit.preflight(Net(), optimizer="AdamW", dry_step=function))
    assert isinstance(report, ckptkit.Preflight)
    assert ("preflight.step-failed" in codes(report)) == fails
