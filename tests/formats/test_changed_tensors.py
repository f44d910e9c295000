"""A crafted pickle never makes the readers see other values than torch.load: they agree, or the file is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckptkit.errors import CkptkitError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.torch.changes import changing_attribute
from tests.helpers_formats import (
    bits,
    call,
    get,
    glob,
    mapping,
    number,
    put,
    several,
    storage,
    tensor,
    text,
    torch_zip,
    write,
)

RECORDS = {"0": bytes(range(16)), "1": bytes(range(64, 80))}
OTHER = tensor(storage("1"))
FLAT = tensor(storage("1"), size=(4,), stride=(1,))
HOOKS = call("collections.OrderedDict")
NEW_STATE = several(storage("1"), number(0), several(number(4)), several(number(1)))
VALUES = {"another tensor": OTHER, "a flat tensor": FLAT, "True": b"\x88", "None": b"N"}


def parameter(state: bytes, data: bytes | None = None) -> bytes:
    return call("torch._utils._rebuild_parameter_with_state", tensor() if data is None else data, b"\x89", HOOKS, state)


def from_type(kind: str, state: bytes) -> bytes:
    arguments = several(storage(), number(0), several(*[number(2)] * 2), several(number(2), number(1)), b"\x89", HOOKS)
    return call(
        "torch._tensor._rebuild_from_type_v2", glob("torch._utils._rebuild_tensor_v2"), glob(kind), arguments, state
    )


def with_attribute(name: str, value: bytes) -> Iterator[bytes]:
    """Yield tensors of which an attribute is set after building them, in each form of their state."""
    state = mapping({name: value})
    yield parameter(state)
    yield parameter(several(b"N", state))
    yield from_type("torch.Tensor", state)
    yield from_type("torch.nn.parameter.Parameter", several(b"}", state))


SETTABLE = sorted(
    name
    for name in dir(torch.nn.Parameter)
    for kind in torch.nn.Parameter.__mro__
    if hasattr(type(kind.__dict__.get(name)), "__set__")
)
PARAMETER = glob("torch.nn.parameter.Parameter")
PAIRS = b"](" + several(text("a"), tensor()) + b"e"
BYTES = tensor(storage("0", 16, "torch.ByteStorage"), size=(16,), stride=(1,))
DOUBLES = tensor(storage("0", 2, "torch.DoubleStorage"), size=(2,), stride=(1,))
COMPLEX = storage("0", 2, "torch.ComplexFloatStorage")
CHANGED = {
    "BUILD": tensor() + NEW_STATE + b"b",
    "BUILD of a storage only": tensor() + several(storage("1")) + b"b",
    "BUILD of three": tensor() + several(storage("1"), number(0), several(number(4))) + b"b",
    "BUILD of a tensor": tensor() + several(OTHER) + b"b",
    "BUILD of nothing": tensor() + b")b",
    "BUILD of a list": tensor() + b"](" + OTHER + b"eb",
    "BUILD of a parameter": parameter(b"N") + NEW_STATE + b"b",
    "BUILD of an old parameter": parameter(b"N") + several(OTHER, b"N", HOOKS, b"\x88", b"\x89") + b"b",
    "BUILD by memo": tensor() + put(5) + NEW_STATE + b"b0" + get(5),
    "BUILD after another use": several(tensor() + put(5), get(5) + NEW_STATE + b"b"),
    "BUILD of data": several(tensor() + put(5), parameter(b"N", get(5)), get(5) + NEW_STATE + b"b"),
    "BUILD of a storage": storage() + mapping({"dtype": glob("torch.int32")}) + b"b0" + tensor(),
    "twice in one state": parameter(mapping({"tag": text("x"), "real": OTHER, "data": tensor()})),
    "shared values": several(tensor(), parameter(mapping({"real": OTHER}))),
    "a state in a tuple": several(parameter(mapping({"data": OTHER})), number(1)),
    "NEWOBJ of a mapping": glob("collections.OrderedDict") + several(PAIRS) + b"\x81",
    "NEWOBJ of a set": glob("builtins.set") + several(PAIRS) + b"\x81",
    "NEWOBJ of a function": glob("torch._utils._rebuild_parameter") + several(tensor(), b"\x89", HOOKS) + b"\x81",
    "a Counter of pairs": call("collections.Counter", PAIRS),
    "conj that is false": tensor(COMPLEX, size=(2,), stride=(1,), more=mapping({"conj": b"\x89"})),
    "neg that is false": tensor(more=mapping({"neg": b"\x89"})),
    "no metadata": tensor(more=mapping({"other": b"\x88"})),
    "two types": several(tensor(), tensor(storage("0", 4, "torch.IntStorage"))),
    "two widths": several(tensor(), DOUBLES),
    "bytes first": several(BYTES, tensor(size=(4,), stride=(1,))),
    "an unused storage first": storage("0", 4, "torch.IntStorage") + b"0" + tensor(),
    "two sizes": several(tensor(), tensor(storage("0", 3), size=(3,), stride=(1,))),
    "meta": tensor(storage("1", location="meta")),
    "FloatTensor": glob("torch.FloatTensor") + several(b"](G" + bytes(8) + b"e") + b"R",
    "an empty Tensor": glob("torch.Tensor") + b")\x81" + NEW_STATE + b"b",
    "an empty parameter": PARAMETER + b")\x81" + several(OTHER, b"N", HOOKS, b"\x89", b"\x89") + b"b",
    "a Tensor of a tensor": call("torch.Tensor", OTHER),
}
UNCHANGED = {
    "a tag": parameter(mapping({"tag": text("x")})),
    "a tag of a tensor": from_type("torch.Tensor", mapping({"tag": OTHER})),
    "a method": parameter(mapping({"numel": number(3)})),
    "slots": parameter(several(mapping({"tag": text("x")}), mapping({"more": OTHER}))),
    "gradients": parameter(mapping({"requires_grad": b"\x89", "grad": OTHER, "_backward_hooks": HOOKS})),
    "its own data": parameter(mapping({"data": tensor(), "requires_grad": b"\x89"})),
    "no state": parameter(b"N"),
    "NEWOBJ of a parameter": PARAMETER + several(tensor(), b"\x89") + b"\x81",
    "NEWOBJ of an empty mapping": mapping({"v": tensor()}) + glob("collections.OrderedDict") + b")\x810",
    "state of a mapping": HOOKS + mapping({"_metadata": b"}"}) + b"b0" + tensor(),
    "BUILD that requires gradients": parameter(b"N") + several(b"\x89", b"\x89", HOOKS) + b"b",
}  # fmt: skip


def of_torch(path: str) -> dict[str, torch.Tensor] | None:
    """Return what ``torch.load`` reads, flat and by key, or None if it refuses the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = torch.load(path, weights_only=True)
        except Exception:  # noqa: BLE001 - whatever it raises, it refuses
            return None
    flat: dict[str, torch.Tensor] = {}
    stack = [("", loaded)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, torch.Tensor):
            flat[key] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(f"{key}.{name}".removeprefix("."), item) for name, item in items]
    return flat


def of_ckptkit(path: str) -> dict[str, tuple[tuple[int, ...], str, bytes]] | None:
    try:
        with open_checkpoint(path) as checkpoint:
            return {key: (info.shape, info.dtype, checkpoint.read_bytes(key)) for key, info in checkpoint.items()}
    except CkptkitError:
        return None


CODES = {torch.float32: "F32", torch.int32: "I32", torch.float64: "F64", torch.uint8: "U8", torch.complex64: "C64"}


def agrees(path: str) -> bool | None:
    """Return whether both read the same, or None if ckptkit refuses the file."""
    read = of_ckptkit(path)
    loaded = of_torch(path)
    if read is None or loaded is None:
        return None if read is None else True
    return read == {key: (tuple(value.shape), CODES[value.dtype], bits(value)) for key, value in loaded.items()}


@pytest.mark.parametrize("value", VALUES)
def test_each_attribute_that_a_state_can_set_is_followed_or_refused(tmp_path: Path, value: str) -> None:
    """The oracle is torch.load, for every attribute of a parameter that has a setter."""
    assert {"data", "real", "imag", "__class__"} <= set(SETTABLE)
    wrong = []
    for name in SETTABLE:
        for number_, made in enumerate(with_attribute(name, VALUES[value])):
            if agrees(write(tmp_path, torch_zip(mapping({"w": made}), RECORDS))) is False:
                wrong.append((name, number_))
    assert wrong == []


@pytest.mark.parametrize("name", CHANGED)
def test_each_way_of_changing_a_tensor_is_followed_or_refused(tmp_path: Path, name: str) -> None:
    for data in (
        torch_zip(mapping({"w": CHANGED[name]}), RECORDS),
        torch_zip(mapping({"w": tensor(), "x": mapping({"w": CHANGED[name]})}), RECORDS),
    ):
        assert agrees(write(tmp_path, data)) is not False


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_state_that_changes_no_value_is_read(tmp_path: Path, name: str) -> None:
    """Attributes of the Python object, and what concerns only gradients, stay readable."""
    path = write(tmp_path, torch_zip(mapping({"w": UNCHANGED[name]}), RECORDS))
    loaded = of_torch(path)
    read = of_ckptkit(path)
    assert read is not None
    if loaded is not None:
        assert {key: item[2] for key, item in read.items()} == {key: bits(item) for key, item in loaded.items()}


def test_every_settable_attribute_is_known() -> None:
    """A setter that a new version of torch adds to Tensor must be judged here."""
    unknown = [name for name in SETTABLE if not changing_attribute({name: None}, lambda _: False)]
    concern_only_gradients = {"requires_grad", "grad", "_grad", "_backward_hooks"}
    assert set(unknown) == concern_only_gradients
