"""Compare two objects that torch loaded: types, values bit by bit, order, identity of objects, and shared memory."""

from __future__ import annotations

import collections
import math
import struct

import numpy as np
import torch

from tests.helpers_outputs import raw

__all__ = ["assert_same"]


def assert_same(first: object, second: object) -> None:
    """Raise ``AssertionError`` unless both objects have the same types, values, order, identities and shared memory."""
    _compare(first, second, "root", _Identities(), {})


class _Identities:
    """The object on one side for each object on the other; both stay alive, so that no id is used again."""

    def __init__(self) -> None:
        self.second_of: dict[int, int] = {}
        self.first_of: dict[int, int] = {}
        self.alive: list[object] = []

    def pair(self, first: object, second: object, path: str) -> bool:
        """Return whether these objects are a pair already; raise if one of them has another partner."""
        left, right = id(first), id(second)
        assert self.second_of.get(left, right) == right, f"{path}: one object became two, or two became one"
        assert self.first_of.get(right, left) == left, f"{path}: one object became two, or two became one"
        known = left in self.second_of
        self.second_of[left], self.first_of[right] = right, left
        self.alive += [first, second]
        return known


def _compare(first: object, second: object, path: str, identities: _Identities, storages: dict[int, int]) -> None:
    assert type(first) is type(second), f"{path}: {type(first)} became {type(second)}"
    if isinstance(first, float):
        assert isinstance(second, float)
        assert struct.pack("d", first) == struct.pack("d", second) or (math.isnan(first) and math.isnan(second)), path
        return
    # Python may use one object for equal small values, so their identity says nothing.
    if first is None or isinstance(first, bool | int | str | bytes | complex | torch.dtype | torch.device | type):
        assert first == second, f"{path}: {first!r} became {second!r}"
        return
    has_identity = not isinstance(first, np.generic) and not (isinstance(first, tuple) and not first)
    if has_identity and identities.pair(first, second, path):
        return
    _compare_content(first, second, path, identities, storages)
    if hasattr(first, "__dict__"):
        attributes = [list(vars(side).items()) for side in (first, second)]
        assert len(attributes[0]) == len(attributes[1]), path
        for left, right in zip(*attributes, strict=True):
            _compare(left[0], right[0], f"{path}, an attribute", identities, storages)
            _compare(left[1], right[1], f"{path}.{left[0]}", identities, storages)


def _compare_content(
    first: object, second: object, path: str, identities: _Identities, storages: dict[int, int]
) -> None:
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        _compare_tensors(first, second, path, storages)
    elif isinstance(first, np.ndarray | np.generic):
        assert isinstance(second, np.ndarray | np.generic)
        assert (first.dtype, first.shape) == (second.dtype, second.shape), path
        assert first.tobytes() == second.tobytes(), path
    elif isinstance(first, dict):
        assert isinstance(second, dict)
        assert len(first) == len(second), f"{path}: {list(first)} became {list(second)}"
        if isinstance(first, collections.defaultdict):
            assert isinstance(second, collections.defaultdict)
            assert first.default_factory is second.default_factory, path
        for number, (left, right) in enumerate(zip(first.items(), second.items(), strict=True)):
            _compare(left[0], right[0], f"{path}, key {number}", identities, storages)
            _compare(left[1], right[1], f"{path}[{left[0]!r}]", identities, storages)
    elif isinstance(first, list | tuple | collections.deque):
        assert isinstance(second, list | tuple | collections.deque)
        assert len(first) == len(second), path
        assert getattr(first, "maxlen", None) == getattr(second, "maxlen", None), path
        for number, (left, right) in enumerate(zip(first, second, strict=True)):
            _compare(left, right, f"{path}[{number}]", identities, storages)
    elif isinstance(first, torch.Generator):
        assert isinstance(second, torch.Generator)
        assert torch.equal(first.get_state(), second.get_state()), path
    elif isinstance(first, np.random.Generator):
        assert isinstance(second, np.random.Generator)
        _compare(first.bit_generator.state, second.bit_generator.state, path, identities, storages)
    elif not hasattr(first, "__dict__"):
        assert first == second, f"{path}: {first!r} became {second!r}"


def _compare_tensors(first: torch.Tensor, second: torch.Tensor, path: str, storages: dict[int, int]) -> None:
    def properties(tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.dtype, tensor.shape, tensor.layout, tensor.requires_grad, tensor.device, tensor.is_quantized

    def strides(tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()

    assert properties(first) == properties(second), f"{path}: {properties(first)} became {properties(second)}"
    if first.layout != torch.strided:
        assert torch.equal(first.to_dense(), second.to_dense()), path
        return
    if first.device.type == "meta":
        return
    assert strides(first) == strides(second), f"{path}: {strides(first)} became {strides(second)}"
    if first.is_quantized:
        assert torch.equal(first.int_repr(), second.int_repr()), path
        assert first.qscheme() == second.qscheme(), path
        assert torch.equal(first.dequantize(), second.dequantize()), path
        return
    assert raw(first) == raw(second), f"{path}: its values changed"
    if first.numel():
        left, right = first.untyped_storage().data_ptr(), second.untyped_storage().data_ptr()
        # Keys for the other direction are negative, so that both directions fit into one dictionary.
        assert storages.setdefault(left, right) == right, f"{path}: shared memory became separate, or the reverse"
        assert storages.setdefault(-right - 1, left) == left, f"{path}: separate memory became shared"
