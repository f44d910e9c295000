"""Conversions between live tensors and stored bytes keep every bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from ckptkit import Checkpoint, TensorInfo
from ckptkit.core.checkpoint import View
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import ModelError, PlanError
from tests.features import FLOAT4, needs_dtype
from tests.helpers_outputs import dtype_of, raw, state_dicts, tensor_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning"),
]


@settings(deadline=None, max_examples=100)
@given(state_dicts())
def test_a_state_dict_is_described(state: dict[str, torch.Tensor]) -> None:
    """Key, dtype, shape, strides and sharing are described, and reading gives an equal tensor."""
    checkpoint = as_checkpoint(state, "state")
    assert list(checkpoint) == list(state)
    for key, tensor in state.items():
        info = checkpoint[key]
        assert (dtype_of(info.dtype), info.shape, info.kind) == (tensor.dtype, tuple(tensor.shape), "dense")
        assert info.view is not None
        assert (info.view.offset, info.view.stride) == (tensor.storage_offset(), tensor.stride())
        assert checkpoint.read_bytes(key) == raw(tensor)
        read = checkpoint.read(key)
        assert raw(read) == raw(tensor)
        assert not tensor.numel() or read.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        for other, info_there in checkpoint.items():
            shares = tensor.untyped_storage()._cdata == state[other].untyped_storage()._cdata
            assert info_there.view is not None
            assert (info.view.storage == info_there.view.storage) == shares


@settings(deadline=None, max_examples=100)
@given(state_dicts())
def test_a_span_is_the_bytes_from_first_to_last_element(state: dict[str, torch.Tensor]) -> None:
    """The span, viewed with the strides of the tensor, gives the tensor."""
    checkpoint = as_checkpoint(state, "state")
    for key, tensor in state.items():
        span = checkpoint.span(key)
        assert span is not None
        data = bytearray(b"".join(bytes(chunk) for chunk in span.chunks()))
        assert len(data) == span.nbytes
        if tensor.numel():
            plain = torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype)
            assert raw(plain.as_strided(tensor.shape, tensor.stride())) == raw(tensor)


def test_conjugate_and_negative_views_are_read_resolved() -> None:
    """Their stored bytes differ from their values, so there is no span."""
    wave = tensor_of("C64", (3, 2))
    views = {"conj": wave.conj(), "neg": torch._neg_view(wave), "both": wave.conj().imag}
    checkpoint = as_checkpoint(views, "state")
    for key, tensor in views.items():
        assert checkpoint.read_bytes(key) == raw(tensor)
        assert checkpoint.span(key) is None


@needs_dtype("F4")
def test_float4_counts_elements_and_copies_bytes() -> None:
    """The shape in torch counts bytes of two elements; the description counts elements."""
    packed = torch.arange(6, dtype=torch.uint8).view(FLOAT4[0]).reshape(2, 3)
    checkpoint = as_checkpoint({"w": packed}, "state")
    assert (checkpoint["w"].dtype, checkpoint["w"].shape, checkpoint["w"].nbytes) == ("F4", (2, 6), 6)
    assert checkpoint.read_bytes("w") == bytes(range(6))
    assert as_checkpoint({"w": packed.t()}, "state")["w"].kind == "packed"


def test_a_model_on_the_meta_device_has_shapes_and_ties_but_no_values() -> None:
    """Descriptions are complete, and reading raises an error with the reason."""
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        model["b"].weight = model["a"].weight
    checkpoint = as_checkpoint(model, "model")
    first, second = checkpoint["a.weight"].view, checkpoint["b.weight"].view
    assert isinstance(first, View)
    assert first == second
    with pytest.raises(ModelError, match=r"'a\.weight' has no values: it is a meta tensor"):
        checkpoint.read("a.weight")


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.Sequential(nn.ReLU(), nn.LazyBatchNorm1d())])
def test_tensors_of_lazy_modules_are_described_without_elements(lazy: nn.Module) -> None:
    """They have no shape and no values yet, and the hint says how to get them."""
    for thing in (lazy, dict(lazy.state_dict())):
        checkpoint = as_checkpoint(thing, "model")
        key = next(iter(checkpoint))
        assert str(checkpoint[key]) == "F32 [0] (uninitialised)"
        with pytest.raises(ModelError, match="has no values: it is an uninitialised tensor") as caught:
            checkpoint.read(key)
        assert caught.value.hint == "run one forward pass first"


def odd_kinds() -> dict[str, torch.Tensor]:
    plain = torch.ones(2, 2)
    return {
        "sparse": plain.to_sparse(),
        "csr": plain.to_sparse_csr(),
        "quantized": torch._empty_affine_quantized([2, 2], scale=0.1, zero_point=0, dtype=torch.qint8),
        "subclass": plain.as_subclass(type("Mine", (torch.Tensor,), {})),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize(("key", "kind"), [("sparse",) * 2, ("csr", "sparse"), ("quantized",) * 2, ("subclass",) * 2,
                                           ("nested",) * 2])  # fmt: skip
def test_other_kinds_are_listed_and_not_read(key: str, kind: str) -> None:
    """Tensors without plain bytes are described and cannot be read."""
    checkpoint = as_checkpoint({key: odd_kinds()[key]}, "state")
    assert checkpoint[key].kind == kind
    with pytest.raises(ModelError, match=f"it is a {kind} tensor"):
        checkpoint.payload(key)


def test_other_values_are_entries_and_versions_are_kept() -> None:
    """Extra state, an epoch and a submodule that is None become entries."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(1, 1))
    model[1] = None  # type: ignore[assignment]
    checkpoint = as_checkpoint(model, "model")
    assert [(entry.path, entry.type) for entry in checkpoint.entries] == [("1", "absent module")]
    assert checkpoint.versions["0"] == 2
    state: dict[str, Any] = {"w": torch.ones(1), "epoch": 3, "args": {"lr": 1}}
    found = as_checkpoint(state, "state")
    assert [(entry.path, entry.type, entry.value) for entry in found.entries] == [
        ("epoch", "int", 3),
        ("args", "dict", None),
    ]


def test_numbers_that_json_cannot_hold_are_entries_as_text() -> None:
    """Non-finite floats and very large integers become text."""
    state: dict[str, Any] = {"a": float("nan"), "b": float("-inf"), "c": 10**5000, "d": 0.5, "e": "text", "f": True}
    entries = as_checkpoint(state, "state").entries
    assert [entry.value for entry in entries] == ["nan", "-inf", "an integer of 16610 bits", 0.5, "text", True]
    json.dumps([entry.value for entry in entries], allow_nan=False)


def test_a_state_dict_that_fails_is_a_refusal() -> None:
    """An error in a hook or in extra state is reported on one line."""

    class Failing(nn.Linear):
        def get_extra_state(self) -> float:
            return 1 / 0

    model = Failing(1, 1)
    with pytest.raises(ModelError, match=r"^state_dict\(\) of model failed: ZeroDivisionError: "):
        as_checkpoint(model, "model")
    model.state_dict = lambda **_: [1]  # type: ignore[method-assign,assignment]
    with pytest.raises(ModelError, match=r"^state_dict\(\) of model returned a list, not a mapping$"):
        as_checkpoint(model, "model")


def test_descriptions_have_no_bytes_and_checkpoints_stay_themselves() -> None:
    """A mapping of TensorInfo can be planned and not read; a Checkpoint is returned as it is."""
    described = as_checkpoint({"w": TensorInfo("w", "F32", (2,))}, "base")
    assert isinstance(described, Checkpoint)
    assert as_checkpoint(described, "base") is described
    with pytest.raises(PlanError, match="'w' is a description without values"):
        described.read_bytes("w")
