"""A zoo of modules that load with code of their own, each with state_dicts that it may get."""

# The arguments of hooks and of methods that load are those of torch.
# ruff: noqa: ARG001, ARG002, ARG004, PLR0917

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

Build = Callable[[], nn.Module]
State = OrderedDict[str, Any]


def linear(inputs: int = 3, outputs: int = 3) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def with_hook(hook: Callable[..., None], *, module: bool = False) -> nn.Module:
    """Return a model whose second layer has a pre-hook."""
    model = nn.Sequential(linear(), linear(), linear())
    register: Any = model[1]._register_load_state_dict_pre_hook
    register(hook, with_module=module)
    return model


def with_post_hook(hook: Callable[..., None], at: int | None = None) -> nn.Module:
    model = nn.Sequential(linear(), linear(), linear())
    register: Any = (model if at is None else model[at]).register_load_state_dict_post_hook
    register(hook)
    return model


def rename_old(state: State, prefix: str, *_: Any) -> None:
    for name in ("weight", "bias"):
        if f"{prefix}old_{name}" in state:
            state[f"{prefix}{name}"] = state.pop(f"{prefix}old_{name}")


def copy_old(state: State, prefix: str, *_: Any) -> None:
    if f"{prefix}old_weight" in state:
        state[f"{prefix}weight"] = state[f"{prefix}old_weight"]


def add_zeros(state: State, prefix: str, *_: Any) -> None:
    state.setdefault(f"{prefix}bias", torch.zeros(3))


def drop_bias(state: State, prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}bias", None)


def refuse_old(state: State, prefix: str, *_: Any) -> None:
    if f"{prefix}old_weight" in state:
        raise RuntimeError("this checkpoint is too old")


def report_error(
    state: State, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
) -> None:
    if f"{prefix}old_weight" in state:
        errors.append("this checkpoint is too old")


def report_missing(state: State, prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any) -> None:
    missing.append(f"{prefix}something")


def need_bias(state: State, prefix: str, *_: Any) -> None:
    state[f"{prefix}bias"] = state[f"{prefix}bias"]


def join_parts(state: State, prefix: str, *_: Any) -> None:
    if f"{prefix}part1" in state:
        state[f"{prefix}weight"] = torch.cat([state.pop(f"{prefix}part1"), state.pop(f"{prefix}part2")])


def transpose(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    if f"{prefix}kernel" in state:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel").t()


def cut(state: State, prefix: str, *_: Any) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"][:3]


def pad(state: State, prefix: str, *_: Any) -> None:
    """Add rows of zeros, which are made on the default device."""
    key = f"{prefix}weight"
    if key in state and state[key].shape == (2, 3):
        state[key] = torch.cat((state[key], torch.zeros(1, 3)))


def write_into_zeros(state: State, prefix: str, *_: Any) -> None:
    """Write the rows that there are into zeros, which are made on the default device."""
    key = f"{prefix}weight"
    if key in state and state[key].shape == (2, 3):
        state[key], rows = torch.zeros(3, 3), state[key]
        state[key][:2] = rows


def clear_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys.clear()


def clear_all(module: nn.Module, keys: Any) -> None:
    keys.missing_keys.clear()
    keys.unexpected_keys.clear()


class Upgrading(nn.Module):
    """Accepts the names of its first version, as torchvision's RPNHead, FPN and MLP do."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))

    def _load_from_state_dict(self, state: State, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") is None or metadata["version"] < 2:
            for name in ("weight", "bias"):
                if f"{prefix}conv.{name}" in state:
                    state[f"{prefix}conv.0.0.{name}"] = state.pop(f"{prefix}conv.{name}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Direct(nn.Module):
    """Writes its tensors itself, without the code of nn.Module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("scale", torch.ones(3))
        self.scale: torch.Tensor

    def _load_from_state_dict(
        self, state: State, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        if f"{prefix}packed" in state:
            packed = state[f"{prefix}packed"]
            self.weight.data.copy_(packed[0])
            with torch.no_grad():
                self.scale[:] = packed[1]
        else:
            missing.append(f"{prefix}packed")


class Resizing(nn.Module):
    """Gives its buffer the shape that is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2, 3))

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        if f"{prefix}table" in state:
            self.table = torch.zeros(state[f"{prefix}table"].shape)
        super()._load_from_state_dict(state, prefix, *rest)


class Delegating(nn.Module):
    """Loads and saves the state_dict of the model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(linear(), linear())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.model.load_state_dict(state, strict)


class Lenient(nn.Module):
    """Is never strict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=False)


class Stripping(nn.Module):
    """Takes keys with the prefix of DistributedDataParallel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({key.removeprefix("module."): value for key, value in state.items()}, strict)


class SavesLess(nn.Module):
    """Leaves its frozen part out of the state_dict, and load_state_dict still wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = linear(), linear()
        register: Any = self._register_state_dict_hook
        register(self._leave_out)

    @staticmethod
    def _leave_out(module: nn.Module, state: State, prefix: str, metadata: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}frozen")]:
            del state[key]


class Extra(nn.Module):
    """Has an extra state that its code takes only with a certain content."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.number = 1

    def get_extra_state(self) -> Any:
        return {"number": self.number}

    def set_extra_state(self, state: Any) -> None:
        self.number = state["number"]


class Slotted(nn.Module):
    """Loads with bound methods, and refers to its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()
        self.names = {"old_weight": "inner.weight", "old_bias": "inner.bias"}
        register: Any = self._register_load_state_dict_pre_hook
        register(self._rename)

    def _rename(self, state: State, prefix: str, *_: Any) -> None:
        for old, new in self.names.items():
            if f"{prefix}{old}" in state:
                state[f"{prefix}{new}"] = state.pop(f"{prefix}{old}")


def headless() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    model[1] = None  # type: ignore[assignment]
    return model


def headless_with_hook() -> nn.Module:
    model = nn.ModuleDict({"a": linear(), "b": headless()})
    register: Any = model["a"]._register_load_state_dict_pre_hook
    register(rename_old)
    return model


def tied_with_hook() -> nn.Module:
    model: Any = with_hook(rename_old)
    model[2].weight = model[1].weight
    tied: nn.Module = model
    return tied


def shared_module() -> nn.Module:
    layer = Upgrading()
    return nn.ModuleDict({"a": layer, "b": layer})


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 8, 3)), nn.utils.weight_norm(linear(8, 2)), linear(2, 2))


def new_weight_norm() -> nn.Module:
    first, second = parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), parametrizations.weight_norm(linear(8, 2))
    return nn.Sequential(first, second, linear(2, 2))


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).mT


def parametrized() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


def float_module(build: Build) -> Build:
    return lambda: build().half()


def hook_above() -> nn.Module:
    """Return a model whose hook is at the root, above modules without own code: shared, empty, and with a counter."""
    model = nn.Sequential(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)), linear(), nn.Sequential(), linear())
    model[1].register_buffer("unsaved", torch.zeros(3), persistent=False)
    model.append(model[3])
    register: Any = model._register_load_state_dict_pre_hook
    register(lambda state, *_: state.pop("old", None))
    return model


def hook_of_another_shape() -> nn.Module:
    """Return a model whose hook makes a value of a shape that does not fit, where the file has one that fits."""
    model = nn.Sequential(linear(), nn.Sequential(linear()))
    register: Any = model._register_load_state_dict_pre_hook
    register(lambda state, *_: state.update({"1.0.weight": torch.ones(5, 3)}) if "more" in state else None)
    return model


def hook_of_a_sibling() -> nn.Module:
    """Return a model whose hook of one layer changes what a later layer gets."""
    model, states = nn.Sequential(linear(), linear(), linear()), list[State]()
    register: Any = model._register_load_state_dict_pre_hook
    register(lambda state, *_: states.append(state))
    register = model[1]._register_load_state_dict_pre_hook
    register(lambda *_: states[-1].pop("2.weight", None))
    return model


def hook_of_an_absent_bias() -> nn.Module:
    """Return a model whose hook takes away what the file does not have, from a module without own code."""
    model = nn.Sequential(linear(), nn.Sequential(linear()))

    def take_away(state: State, *_: Any) -> None:
        if "1.0.bias" not in state:
            model[1][0].register_parameter("bias", None)  # type: ignore[index]

    register: Any = model._register_load_state_dict_pre_hook
    register(take_away)
    return model


MODULES: dict[str, Build] = {
    "hook above": hook_above,
    "hook above of another shape": hook_of_another_shape,
    "hook above of a sibling": hook_of_a_sibling,
    "hook above of an absent bias": hook_of_an_absent_bias,
    "weight norm": new_weight_norm,
    "old weight norm": old_weight_norm,
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(linear()), linear()),
    "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(linear()), linear()),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(linear()), linear()),
    "parametrized": parametrized,
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    "batch norm and hook": lambda: nn.Sequential(with_hook(rename_old), nn.BatchNorm1d(3), linear()),
    "sync batch norm": lambda: nn.Sequential(nn.SyncBatchNorm(4), linear()),
    "instance norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4), linear()),
    "instance norm affine": lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True), linear()),
    "instance norm tracked": lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    "attention": lambda: nn.Sequential(nn.MultiheadAttention(4, 2), linear()),
    "attention of three sizes": lambda: nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "lstm": lambda: nn.Sequential(nn.LSTM(3, 2), with_hook(rename_old)),
    "upgrading": lambda: nn.Sequential(Upgrading(), linear()),
    "upgrading root": Upgrading,
    "direct": lambda: nn.Sequential(linear(), Direct()),
    "resizing": lambda: nn.Sequential(linear(), Resizing()),
    "delegating": Delegating,
    "lenient": Lenient,
    "stripping": Stripping,
    "saves less": SavesLess,
    "extra": lambda: nn.Sequential(Extra(), linear()),
    "extra and hook": lambda: nn.Sequential(Extra(), with_hook(rename_old)),
    "bound method": lambda: nn.Sequential(Slotted(), linear()),
    "headless": headless,
    "headless and hook": headless_with_hook,
    "tied": tied_with_hook,
    "shared": shared_module,
    "renames": lambda: with_hook(rename_old),
    "copies": lambda: with_hook(copy_old),
    "adds": lambda: with_hook(add_zeros),
    "drops": lambda: with_hook(drop_bias),
    "refuses": lambda: with_hook(refuse_old),
    "reports": lambda: with_hook(report_error),
    "reports a missing key": lambda: with_hook(report_missing),
    "needs": lambda: with_hook(need_bias),
    "joins": lambda: with_hook(join_parts),
    "transposes": lambda: with_hook(transpose, module=True),
    "cuts": lambda: with_hook(cut),
    "pads": lambda: with_hook(pad),
    "writes into zeros": lambda: with_hook(write_into_zeros),
    "clears missing": lambda: with_post_hook(clear_missing),
    "clears missing of all before": lambda: with_post_hook(clear_missing, 1),
    "clears all": lambda: with_post_hook(clear_all, 2),
    "half": float_module(new_weight_norm),
}


def states(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the state_dicts that are tried with a module, each with a name."""
    own = MODULES[name]().state_dict()

    def changed(change: Callable[[State], Any], *, versions: bool = True) -> State:
        state: State = OrderedDict(own)
        change(state)
        if versions:
            state._metadata = own._metadata  # type: ignore[attr-defined]
        return state

    keys = list(own)
    middle = keys[len(keys) // 2]
    yield "own", own
    yield "plain", dict(own)
    yield "without the first", changed(lambda state: state.pop(keys[0]))
    yield "without the last", changed(lambda state: state.pop(keys[-1]), versions=False)
    yield "without the middle", changed(lambda state: state.pop(middle))
    yield "with one more", changed(lambda state: state.update({"1.more": torch.ones(1)}))
    yield "with one more at the top", changed(lambda state: state.update(more=torch.ones(1)))
    yield "with a number", changed(lambda state: state.update({"1.more": 3}))
    yield "another shape", changed(lambda state: state.update({middle: torch.ones(7, 5)}))
    yield "with a value", changed(lambda state: state.update({keys[-1]: "text"}))
    yield "empty", {}
    yield "prefixed", {f"module.{key}": value for key, value in own.items()}
    yield "old names", old_names(own)
    yield "running stats", {**own, "1.running_mean": torch.zeros(4), "1.running_var": torch.ones(4),
                            "0.running_mean": torch.zeros(4), "0.running_var": torch.ones(4)}  # fmt: skip
    yield "no counters", changed(lambda state: [state.pop(key) for key in keys if "num_batches" in key], versions=False)
    yield "parts", {**{key: value for key, value in own.items() if key != "1.weight"},
                    "1.part1": torch.ones(2, 3), "1.part2": torch.ones(1, 3)}  # fmt: skip
    yield "kernel", {**{key: value for key, value in own.items() if key != "1.weight"}, "1.kernel": torch.ones(3, 3)}
    yield "shorter", {**own, "1.weight": torch.ones(2, 3)}
    yield "longer", {**own, "1.weight": torch.ones(5, 3)}
    yield "packed", {**{key: value for key, value in own.items() if "weight" in key}, "1.packed": torch.ones(2, 3)}
    if name == "weight norm":
        yield "of old weight norm", old_weight_norm().state_dict()
        yield "of weight norm after old names", {**own, **old_weight_norm().state_dict()}
    if name == "old spectral norm":
        yield "of version 0", {key: value for key, value in own.items() if "weight_v" not in key}


def old_names(own: Any) -> State:
    """Return the state_dict with the names that hooks of the zoo rename."""
    renames = {"1.weight": "1.old_weight", "1.bias": "1.old_bias", "0.1.weight": "0.1.old_weight",
               "a.weight": "a.old_weight", "0.inner.weight": "0.old_weight", "0.conv.0.0.weight": "0.conv.weight",
               "0.conv.0.0.bias": "0.conv.bias", "conv.0.0.weight": "conv.weight", "conv.0.0.bias": "conv.bias",
               "a.conv.0.0.weight": "a.conv.weight", "b.conv.0.0.weight": "b.conv.weight",
               "1.1.weight": "1.1.old_weight"}  # fmt: skip
    return OrderedDict((renames.get(key, key), value) for key, value in own.items())


def joining_and_refusing() -> nn.Module:
    """Return a model that uses every field of the document of ``ckpt diff`` about own code."""
    model = nn.ModuleDict({"a": with_hook(join_parts), "b": with_hook(report_missing), "c": with_hook(drop_bias)})
    register: Any = model["a"][2]._register_load_state_dict_pre_hook  # type: ignore[index]
    register(report_error)
    return model
