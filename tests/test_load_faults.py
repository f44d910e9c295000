"""A read that fails while a model is loaded: the error says what was replaced, and it is true."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptkit import LoadError, load_into, open_checkpoint
from ckptkit.errors import ChangedError, CkptkitError, PathError
from ckptkit.loading.copying import Copier
from ckptkit.plans.produce import Producer
from tests.helpers_outputs import raw, same_state

KEYS = ("0.weight", "0.bias", "1.weight", "1.bias")


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def legacy(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


SAVERS: dict[str, Callable[[Any, Path], object]] = {
    "model.safetensors": save_file, "model.pt": torch.save, "model.pth": legacy,
}  # fmt: skip


@pytest.fixture(params=SAVERS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name: str = request.param
    path = tmp_path / name
    SAVERS[name](net(1).state_dict(), path)
    return path


def before_call(
    patch: pytest.MonkeyPatch, number: int, act: Callable[[], object], owner: type = Copier, name: str = "copy_part"
) -> None:
    """Act once, before the call of this number of a method; by default before a copy."""
    method, calls = getattr(owner, name), itertools.count()

    def acting(*given: Any) -> Any:
        if next(calls) == number:
            act()
        return method(*given)

    patch.setattr(owner, name, acting)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def rewrite(path: Path) -> None:
    """Write other values in place, as a trainer does that saves again while the file is read."""
    other = path.with_suffix(".new")
    SAVERS[path.name](net(2).state_dict(), other)
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(1, 1))


def break_disk(patch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    patch.setattr(os, "preadv", broken)


Fault = tuple[Callable[[pytest.MonkeyPatch, Path], object], str, type[CkptkitError]]
FAULTS: dict[str, Fault] = {
    "truncated": (lambda _, path: truncate(path), "the file became shorter while it was read", ChangedError),
    "written": (lambda _, path: rewrite(path), "the file changed while it was read", ChangedError),
    "unreadable": (lambda patch, _: break_disk(patch), "input/output error", PathError),
}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_an_error_while_loading_says_what_was_replaced(
    fault: Fault,
    at: int,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tensors called replaced have new values, and those that are not named have the old ones."""
    act, reason, kind = fault
    model, old, new = net(0), net(0).state_dict(), net(1).state_dict()
    before_call(monkeypatch, at, lambda: act(monkeypatch, path))
    with pytest.raises(LoadError) as caught:
        load_into(model, path)
    error = caught.value
    assert isinstance(error.__cause__, kind)
    assert error.reason.startswith(f"loading stopped half way: {reason}; ")
    assert error.path == str(path)
    assert "rollback=True" in (error.hint or "")
    assert len(error.replaced) >= at
    state = model.state_dict()
    for key in KEYS:
        if key in error.replaced and kind is not ChangedError:
            assert raw(state[key]) == raw(new[key])
        if key not in error.replaced + error.partly:
            assert raw(state[key]) == raw(old[key])
            assert repr(key) in error.reason


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_rollback_restores_the_model(
    fault: Fault,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is that of the read, and the model is as it was."""
    act, reason, kind = fault
    model = net(0)
    before_call(monkeypatch, 2, lambda: act(monkeypatch, path))
    with pytest.raises(kind, match=reason) as caught:
        load_into(model, path, rollback=True)
    assert not isinstance(caught.value, LoadError)
    assert same_state(model.state_dict(), net(0).state_dict())


def test_a_replaced_file_loads_the_file_that_was_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file under the same name does not mix with the first one."""
    model = net(0)

    def replace() -> None:
        SAVERS[path.name](net(2).state_dict(), path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    before_call(monkeypatch, 1, replace)
    load_into(model, path)
    assert same_state(model.state_dict(), net(1).state_dict())


def test_a_file_that_changed_before_loading_is_refused(path: Path) -> None:
    """The size and the time of the open file are compared before the first copy."""
    model = net(0)
    with open_checkpoint(path) as checkpoint:
        rewrite(path)
        with pytest.raises(ChangedError):
            load_into(model, checkpoint)
    assert same_state(model.state_dict(), net(0).state_dict())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_nothing_is_assigned_before_all_is_read(fault: Fault, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With assign=True, a failed read leaves the model as it was, and is not a LoadError."""
    act, reason, kind = fault
    model = net(0)
    before = dict(model.named_parameters())
    before_call(monkeypatch, 2, lambda: act(monkeypatch, path), Producer, "tensor")
    with pytest.raises(kind, match=reason) as caught:
        load_into(model, path, assign=True)
    assert not isinstance(caught.value, LoadError)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert same_state(model.state_dict(), net(0).state_dict())


def test_an_interrupt_is_not_wrapped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C stays Ctrl-C; with rollback the model is restored first."""

    def stop() -> None:
        raise KeyboardInterrupt

    model = net(0)
    before_call(monkeypatch, 2, stop)
    with pytest.raises(KeyboardInterrupt):
        load_into(model, path, rollback=True)
    assert same_state(model.state_dict(), net(0).state_dict())
