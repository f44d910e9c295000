"""Whether two objects that torch loaded are the same: types, values to the last bit, order, and who is who."""

from __future__ import annotations

import collections
import math
import struct
from typing import Any

import numpy as np
import torch

from tests.helpers_outputs import raw


class _Twins:
    """Which object of one side is which of the other; both are kept alive, so that no identity comes twice."""

    def __init__(self) -> None:
        self.twin: dict[int, int] = {}
        self.back: dict[int, int] = {}
        self.alive: list[Any] = []

    def meet(self, one: Any, other: Any, path: str) -> bool:
        """Return whether they have met before; raises where either has met somebody else."""
        left, right = id(one), id(other)
        assert self.twin.get(left, right) == right, f"{path}: one object became two, or two became one"
        assert self.back.get(right, left) == left, f"{path}: one object became two, or two became one"
        known = left in self.twin
        self.twin[left], self.back[right] = right, left
        self.alive += [one, other]
        return known


def assert_same(one: Any, other: Any) -> None:
    """Raise where two loaded objects differ in anything: type, value, order, attributes, identity, shared memory."""
    _compare(one, other, "root", _Twins(), {})


def _compare(one: Any, other: Any, path: str, twins: _Twins, storages: dict[int, int]) -> None:
    assert type(one) is type(other), f"{path}: {type(one)} became {type(other)}"
    if isinstance(one, float):
        assert struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other)), path
        return
    # Small values are one object to Python for reasons of its own.
    if one is None or isinstance(one, bool | int | str | bytes | complex | torch.dtype | torch.device | type):
        assert one == other, f"{path}: {one!r} became {other!r}"
        return
    if not isinstance(one, np.generic) and not (isinstance(one, tuple) and not one) and twins.meet(one, other, path):
        return
    if isinstance(one, torch.Tensor):
        _compare_tensors(one, other, path, storages)
    elif isinstance(one, np.ndarray | np.generic):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert one.tobytes() == other.tobytes(), path
    elif isinstance(one, dict):
        assert len(one) == len(other), f"{path}: {list(one)} became {list(other)}"
        if isinstance(one, collections.defaultdict):
            assert one.default_factory is other.default_factory, path
        for number, (left, right) in enumerate(zip(one.items(), other.items(), strict=True)):
            _compare(left[0], right[0], f"{path}, key {number}", twins, storages)
            _compare(left[1], right[1], f"{path}[{left[0]!r}]", twins, storages)
    elif isinstance(one, list | tuple | collections.deque):
        assert len(one) == len(other), path
        assert getattr(one, "maxlen", None) == getattr(other, "maxlen", None), path
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            _compare(left, right, f"{path}[{number}]", twins, storages)
    elif isinstance(one, torch.Generator):
        assert torch.equal(one.get_state(), other.get_state()), path
    elif isinstance(one, np.random.Generator):
        _compare(one.bit_generator.state, other.bit_generator.state, path, twins, storages)
    elif not hasattr(one, "__dict__"):
        assert one == other, f"{path}: {one!r} became {other!r}"
    if hasattr(one, "__dict__"):
        attributes = [list(vars(thing).items()) for thing in (one, other)]
        assert len(attributes[0]) == len(attributes[1]), path
        for left, right in zip(*attributes, strict=True):
            _compare(left[0], right[0], f"{path}, an attribute", twins, storages)
            _compare(left[1], right[1], f"{path}.{left[0]}", twins, storages)


def _compare_tensors(one: torch.Tensor, other: torch.Tensor, path: str, storages: dict[int, int]) -> None:
    def told(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.layout, tensor.requires_grad, tensor.device, tensor.is_quantized

    assert told(one) == told(other), f"{path}: {told(one)} became {told(other)}"
    if one.layout != torch.strided:
        assert torch.equal(one.to_dense(), other.to_dense()), path
        return
    if one.device.type == "meta":
        return
    places = (one.stride(), one.storage_offset(), one.is_conj(), one.is_neg())
    assert places == (other.stride(), other.storage_offset(), other.is_conj(), other.is_neg()), path
    if one.is_quantized:
        assert torch.equal(one.int_repr(), other.int_repr()), path
        assert one.qscheme() == other.qscheme(), path
        assert torch.equal(one.dequantize(), other.dequantize()), path
        return
    assert raw(one) == raw(other), f"{path}: its values changed"
    if one.numel():
        here, there = one.untyped_storage().data_ptr(), other.untyped_storage().data_ptr()
        assert storages.setdefault(here, there) == there, f"{path}: memory that was shared is not, or the other way"
        assert storages.setdefault(-there - 1, here) == here, f"{path}: memory that was apart is shared"
