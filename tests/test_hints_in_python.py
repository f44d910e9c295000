"""An argument that the text of an error names is taken by the call, and ends its trouble."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit import convert, load_into, load_optimizer_state, merge, optimizer_state, plan_merge, plan_remap
from ckptkit.errors import CkptkitError, hint_for_python
from fixtures.lenet import build
from tests.helpers_hint_situations import TEN, randn
from tests.helpers_optim import OPTIMIZERS, Net, trained

_ARGUMENT = re.compile(r"(?<![\w.])([a-z_]+)=(True|\{[^{}]*\}|'[^']*'|\"[^\"]*\"|\[[^\[\]]*\])")
Call = Callable[..., object]


def _trained(**options: Any) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    return model, trained(model, OPTIMIZERS["AdamW"]([{"params": model.parameters(), **options}]))


def _resume(state: Any, model: nn.Module) -> Call:
    return lambda **more: load_optimizer_state(OPTIMIZERS["AdamW"](model.parameters()), model, state, **more)


def _another_head(_folder: Path) -> Call:
    return lambda **more: load_into(build(num_classes=4), TEN, **more)


def _no_value(_folder: Path) -> Call:
    return lambda **more: load_into(build(num_classes=10).to("meta"), TEN, **more)


def _too_large(_folder: Path) -> Call:
    return lambda **more: load_into(
        nn.Linear(2, 2).half(), {"weight": torch.full((2, 2), 1e6), "bias": randn(2)}, **more
    )


def _a_key_too_many(_folder: Path) -> Call:
    state = {**nn.Linear(2, 2).state_dict(), "other": randn(2)}
    return lambda **more: load_into(nn.Linear(2, 2), state, **{"on_unexpected": "error", **more})


def _a_key_too_few(_folder: Path) -> Call:
    return lambda **more: load_into(nn.Linear(2, 2), {"weight": randn(2, 2)}, **{"on_missing": "error", **more})


def _another_head_in_a_plan(_folder: Path) -> Call:
    return lambda **more: plan_merge(build(num_classes=4), TEN, **more)


def _a_prefix(_folder: Path) -> Call:
    donor = {f"module.{key}": value for key, value in build().state_dict().items()}
    return lambda **more: plan_merge(build(), donor, **more)


def _a_sparse_tensor(_folder: Path) -> Call:
    return lambda **more: plan_remap({"a": randn(2), "odd": torch.eye(3).to_sparse()}, **more)


def _an_output_that_exists(folder: Path) -> Call:
    (folder / "out.pt").write_bytes(b"")
    return lambda **more: convert(TEN, folder / "out.pt", **more)


def _an_output_without_a_format(folder: Path) -> Call:
    return lambda **more: convert(TEN, folder / "out.weights", **more)


def _code_that_is_not_known(folder: Path) -> Call:
    torch.save({"state_dict": {"a": randn(2)}, "act": nn.ReLU()}, folder / "odd.pt")
    return lambda **more: convert(folder / "odd.pt", folder / "out.pt", force=True, **more)


def _a_merge_that_casts(folder: Path) -> Call:
    base, donor = {"a": randn(2).half()}, {"a": torch.full((2,), 1e6)}
    return lambda **more: merge(base, donor, folder / "out.pt", **more)


def _a_state_of_another_shape(_folder: Path) -> Call:
    model, optimizer = _trained()
    return _resume(optimizer_state.to_named(optimizer.state_dict(), model), Net(7))


def _a_state_that_is_missing(_folder: Path) -> Call:
    model, optimizer = _trained()
    saved = optimizer.state_dict()
    del saved["state"][0]
    resume = _resume(saved, model)
    return lambda **more: resume(**{"on_missing": "error", **more})


def _a_stray_state(_folder: Path) -> Call:
    model, optimizer = _trained()
    saved = optimizer.state_dict()
    saved["state"][77] = saved["state"][0]
    return lambda **more: optimizer_state.to_named(saved, model, **more)


TROUBLES = [
    _another_head, _no_value, _too_large, _a_key_too_many, _a_key_too_few, _another_head_in_a_plan, _a_prefix,
    _a_sparse_tensor, _an_output_that_exists, _an_output_without_a_format, _code_that_is_not_known, _a_merge_that_casts,
    _a_state_of_another_shape, _a_state_that_is_missing, _a_stray_state,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("trouble", TROUBLES, ids=[trouble.__name__.strip("_") for trouble in TROUBLES])
def test_an_argument_in_an_error_ends_the_trouble(trouble: Callable[[Path], Call], tmp_path: Path) -> None:
    """Each ``name=value`` of a hint is given to the call, which may then be refused for another reason."""
    call, given = trouble(tmp_path), dict[str, Any]()
    for _ in range(8):
        try:
            call(**given)
        except CkptkitError as error:
            hint = error.call or hint_for_python(error.hint or "")
            found = [(name, ast.literal_eval(value)) for name, value in _ARGUMENT.findall(hint)]
            name, value = next((name, value) for name, value in found if not _is_given(given, name, value))
            both = isinstance(value, dict) and isinstance(given.get(name), dict)
            given = {**given, name: {**given[name], **value} if both else copy.copy(value)}
        else:
            assert given
            return
    raise AssertionError(given)


def _is_given(given: dict[str, Any], name: str, value: Any) -> bool:
    return name in given and (
        given[name] == value or (isinstance(value, dict) and value.items() <= given[name].items())
    )


def test_the_names_of_python_exist() -> None:
    """The functions that hints name in place of commands are public."""
    from ckptkit.errors import _FUNCTIONS, _METHODS, _PLANS

    for name in {*_FUNCTIONS.values(), *_METHODS.values(), *_PLANS.values()}:
        module, _, own = name.rpartition(".")
        assert hasattr(getattr(ckptkit, module) if module else ckptkit, own), name
