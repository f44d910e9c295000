"""``load_into`` changes only the loaded tensors, and a failure restores the model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit.loading.snapshot
from ckptkit import load_into
from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, TensorInfo
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import FormatError, ModelError
from ckptkit.loading.snapshot import Snapshot
from ckptkit.loading.watch import named_tensors
from tests.helpers_outputs import raw, tensor_of


class Net(nn.Module):
    """A model with a body, a head, a tie and a buffer that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.wte = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.wte.weight
        self.register_buffer("cache", torch.arange(3.0), persistent=False)
        self.cache: torch.Tensor


def pinned(model: nn.Module) -> dict[str, tuple[int, int, torch.dtype, bytes]]:
    """Return the object, the memory and the bits of every tensor, by name."""
    return {name: (id(t), t.data_ptr(), t.dtype, raw(t)) for name, t in named_tensors(model).items()}


def hooked(act: Callable[[Any], None]) -> Net:
    model = Net()

    def hook(module: Net, _: object) -> None:
        act(module)

    model.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return model


BODY = {key: tensor for key, tensor in Net().state_dict().items() if key.startswith("body.")}


def fail(_: Net) -> None:
    raise ValueError("this model takes\nno state")


def stop(_: Net) -> None:
    raise KeyboardInterrupt


def change_kept(model: Net) -> None:
    model.head.bias.data.add_(1)


def change_kept_sign(model: Net) -> None:
    model.head.bias.data.zero_().neg_()


def replace_kept(model: Net) -> None:
    model.head.bias = nn.Parameter(model.head.bias.detach().clone())


def remove_kept(model: Net) -> None:
    del model.head.bias
    model.head.bias = None  # type: ignore[assignment]


def narrow_kept(model: Net) -> None:
    model.head.bias.data = model.head.bias.data.half()


def shorten_kept(model: Net) -> None:
    model.head.bias.data = model.head.bias.data[:2].clone()


def replace_module(model: Net) -> None:
    model.head = nn.Linear(4, 6)


def untie_memory(model: Net) -> None:
    first = model.body[0]
    assert isinstance(first, nn.Linear)
    first.bias.data = model.cache.new_zeros(8)[:4].copy_(first.bias.data)
    second = model.body[1]
    assert isinstance(second, nn.BatchNorm1d)
    second.bias.data = first.bias.data


FAULTS: dict[str, tuple[Callable[[Net], None], type[BaseException], str]] = {
    "a hook raises": (fail, ModelError, "load_state_dict failed: this model takes no state"),
    "interrupted": (stop, KeyboardInterrupt, ""),
    "a kept parameter changed": (change_kept, ModelError, "'head.bias' was not loaded, but it changed"),
    "the sign of its zero": (change_kept_sign, ModelError, "'head.bias' was not loaded, but it changed"),
    "a kept parameter replaced": (replace_kept, ModelError, "'head.bias' would be replaced while loading"),
    "a kept parameter removed": (remove_kept, ModelError, "'head.bias' would be replaced while loading"),
    "its dtype changed": (narrow_kept, ModelError, "'head.bias' was not loaded, but it changed"),
    "its shape changed": (shorten_kept, ModelError, "'head.bias' was not loaded, but it changed"),
    "a module replaced": (replace_module, ModelError, "'head.weight' would be replaced while loading"),
    "memory shared anew": (
        untie_memory,
        ModelError,
        "whether 'body.0.bias' and 'body.1.bias' share memory",
    ),
}


@pytest.mark.parametrize("in_memory", [1 << 28, 1], ids=["in memory", "in a file"])
@pytest.mark.parametrize(("fault", "kind", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_failure_restores_everything(
    fault: Callable[[Net], None],
    kind: type[BaseException],
    reason: str,
    in_memory: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Objects, bits, dtypes and shapes are restored, also of tensors that were already loaded."""
    monkeypatch.setattr(ckptkit.loading.snapshot, "_IN_MEMORY", in_memory)
    model = hooked(fault)
    before = pinned(model)
    state = {key: tensor_of("F32", tensor.shape) if tensor.is_floating_point() else tensor + 5
             for key, tensor in BODY.items()}  # fmt: skip
    if fault is untie_memory:
        state["body.1.bias"] = state["body.0.bias"]
    with pytest.raises(kind) as caught:
        load_into(model, state, rollback=True)
    assert reason in str(caught.value)
    assert pinned(model) == before


@pytest.mark.parametrize("assign", [False, True], ids=["in place", "assigned"])
def test_a_failed_read_does_not_change_the_model(assign: bool) -> None:
    """Other tensors are already loaded when the last tensor cannot be read, and are restored."""
    whole = as_checkpoint(Net(), "donor")

    def payload(info: TensorInfo) -> Payload:
        if info.key == "head.bias":
            raise FormatError("the file ends within 'head.bias'")
        return whole.payload(info.key)

    model = Net()
    before = pinned(model)
    with pytest.raises(FormatError):
        load_into(
            model, Checkpoint(dict(whole), Access(payload), Description("broken", "test")), assign=assign, rollback=True
        )
    assert pinned(model) == before


def test_a_cache_that_a_hook_rewrites_is_noted() -> None:
    """A hook may rewrite a buffer that is in no checkpoint, and a note says so."""
    report = load_into(hooked(lambda model: model.cache.mul_(2)), Net())
    assert [(f.severity, f.code, f.key) for f in report.findings] == [("note", "load.derived", "cache")]


def test_a_view_of_a_loaded_parameter_is_reported() -> None:
    """A buffer that is a view of a loaded parameter changes with it, and is not reported as kept."""
    model = nn.Linear(3, 3, bias=False)
    model.register_buffer("first_row", model.weight.detach()[0])
    report = load_into(model, {"weight": torch.ones(3, 3)})
    assert [(f.severity, f.code, f.key) for f in report.findings] == [("warning", "load.shared", "first_row")]


def test_tensors_that_cannot_be_compared_are_noted() -> None:
    """A sparse buffer is kept while a hook runs, and a note says that its bits were not compared."""
    model = nn.Linear(2, 2, bias=False)
    model.register_load_state_dict_post_hook(lambda *_: None)  # type: ignore[no-untyped-call]
    model.register_buffer("mask", torch.eye(2).to_sparse(), persistent=False)
    report = load_into(model, {"weight": torch.ones(2, 2)})
    assert [(f.severity, f.code, f.key) for f in report.findings] == [("note", "load.unproved", "mask")]


class Packed(nn.Parameter):
    """A parameter of a class of its own, as the weights of quantised layers are."""


def test_a_kept_parameter_of_any_class_does_not_hinder_others() -> None:
    """An adapter loads beside weights that only their class can rebuild."""
    model = nn.Linear(2, 2)
    model.weight = Packed(torch.full((2, 2), 3.0))
    model.register_buffer("mask", torch.eye(2).to_sparse())
    report = load_into(model, {"bias": torch.ones(2)})
    assert (report.loaded, report.kept) == (("bias",), ("weight", "mask"))
    assert type(model.weight) is Packed
    assert model.weight.eq(3).all()
    load_into(model, {"weight": torch.ones(2, 2)})
    assert type(model.weight) is Packed
    assert model.weight.eq(1).all()


@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "not persistent"])
def test_tensors_on_the_meta_device_are_refused(persistent: bool) -> None:
    """A tensor on the meta device that is not loaded would have no value, so it is refused."""
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("rope", torch.empty(2, device="meta"), persistent=persistent)
    before = copy.deepcopy(model.weight)
    with pytest.raises(ModelError, match="'rope' is on the meta device"):
        load_into(model, {"weight": torch.ones(2, 2)})
    assert torch.equal(model.weight, before)


def test_a_full_disk_is_reported_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full, the hint names the needed size and TMPDIR."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    monkeypatch.setattr(ckptkit.loading.snapshot, "_IN_MEMORY", 1)
    model = Net()
    before = pinned(model)
    with pytest.raises(ModelError) as caught:
        load_into(model, BODY, rollback=True)
    assert caught.value.reason.endswith("no space left on device")
    size = sum(tensor.nbytes for tensor in dict.fromkeys(named_tensors(model).values()))
    assert caught.value.hint == f"set TMPDIR to a directory with {size} B free"
    assert pinned(model) == before


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: tensor_of("F32", (3, 5)).t(),
    "channels last": lambda: tensor_of("F16", (2, 3, 4, 4)).contiguous(memory_format=torch.channels_last),
    "a slice": lambda: tensor_of("BF16", (9,))[2:7],
    "a scalar": lambda: tensor_of("F64", ()),
    "empty": lambda: torch.empty(0, 3),
    "integers": lambda: tensor_of("I64", (4,)),
    "booleans": lambda: tensor_of("BOOL", (4,)),
    "complex": lambda: tensor_of("C64", (4,)),
    "conjugate": lambda: tensor_of("C64", (4,)).conj(),
    "eight bits": lambda: tensor_of("F8_E4M3", (4,)),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_snapshot_restores_every_bit(make: Callable[[], torch.Tensor]) -> None:
    """A snapshot restores tensors of every dtype and layout, with NaNs of any bits."""
    model = nn.Module()
    model.register_buffer("w", make())
    tensor = named_tensors(model)["w"]
    before = raw(tensor)
    with Snapshot(model) as snapshot:
        assert snapshot.is_unchanged("w")
        if tensor.numel():
            tensor.zero_()
            assert not snapshot.is_unchanged("w")
        assert snapshot.restore() == []
    assert raw(tensor) == before


def test_a_tensor_that_cannot_be_restored_is_named() -> None:
    """An expanded tensor cannot be written, so a change of its base cannot be undone."""
    base = torch.zeros(1)
    model = nn.Module()
    model.register_buffer("w", base.expand(3))
    with Snapshot(model) as snapshot:
        base.fill_(1)
        assert snapshot.restore() == ["w"]


def test_inference_tensors_are_refused() -> None:
    """torch copies values into an inference tensor before it raises; within inference mode they can be loaded."""
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    before = raw(model.weight), raw(model.bias)
    with pytest.raises(ModelError, match=r"^'weight' was made in inference mode"):
        load_into(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert (raw(model.weight), raw(model.bias)) == before
    with torch.inference_mode():
        load_into(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert raw(model.weight) == raw(torch.ones(2, 2))


class Scaled(nn.Linear):
    """A module with extra state in its state_dict, as 8-bit layers have."""

    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra.clone() if isinstance(self.extra, torch.Tensor) else self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_that_is_a_tensor_goes_to_its_module() -> None:
    """The module makes a new tensor for each state_dict, so identity is not checked."""
    model = Scaled(torch.zeros(3))
    report = load_into(model, Scaled(torch.arange(3.0)))
    assert torch.equal(model.extra, torch.arange(3.0))
    assert [(one.code, one.key) for one in report.findings] == [("load.unproved", "_extra_state")]


def test_extra_state_that_is_not_a_tensor_has_one_finding() -> None:
    report = load_into(Scaled({"a": 1}), Scaled({"a": 2}))
    assert [(one.code, one.key) for one in report.findings] == [("load.skipped", "_extra_state")]


def fail_late(*_: object) -> None:
    raise RuntimeError("too late")


def test_rollback_restores_the_extra_state() -> None:
    """A module fails after another one got its extra state."""
    model = nn.Sequential(Scaled(torch.zeros(3)), nn.Linear(2, 2))
    model[1].register_load_state_dict_post_hook(fail_late)  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="too late"):
        load_into(model, nn.Sequential(Scaled(torch.ones(3)), nn.Linear(2, 2)), rollback=True)
    assert isinstance(model[0], Scaled)
    assert torch.equal(model[0].extra, torch.zeros(3))


def test_an_extra_state_that_cannot_be_copied_refuses_a_rollback() -> None:
    """torch copies no tensor that was computed with gradients."""

    class Computed(Scaled):
        def get_extra_state(self) -> Any:
            return self.weight.sum(0)

    model = Computed(None)
    before = raw(model.weight)
    with pytest.raises(ModelError, match=r"^'_extra_state' cannot be copied, so it could not be restored"):
        load_into(model, {"weight": torch.ones(2, 2), "_extra_state": torch.ones(2)}, rollback=True)
    assert raw(model.weight) == before
