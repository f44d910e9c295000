"""Table D: a tensor that reaches beyond its storage is refused before memory is allocated; odd tensors are listed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers_formats import (
    call,
    glob,
    mapping,
    saved,
    several,
    storage,
    tensor,
    text,
    torch_zip,
)
from tests.hostile.contract import Accepted, Refused, assert_accepted, assert_refused, written


def with_value(value: bytes, records: dict[str, bytes] | None = None) -> Callable[[Path], Path]:
    """Return a function that writes a checkpoint with this value beside a valid tensor."""
    return written(torch_zip(mapping({"w": tensor(), "v": value}), records))


def v3(dtype: str) -> bytes:
    """Return the pickle of a tensor of four bytes, in the form for dtypes without a storage class."""
    untyped = storage("1", 16, "torch.storage.UntypedStorage")
    return call(
        "torch._utils._rebuild_tensor_v3", untyped, b"K\0", several(b"K\4"), several(b"K\1"), b"\x89N", glob(dtype)
    )


class Marked(torch.Tensor):
    """An unknown subclass of Tensor."""


def kinds() -> bytes:
    """Return a file with a tensor of every kind that torch saves, other than dense tensors."""
    with warnings.catch_warnings(action="ignore"):
        return saved(
            {
                "w": torch.ones(2),
                "meta": torch.empty(3, 3, device="meta"),
                "sparse": torch.eye(3).to_sparse(),
                "quantized": torch.quantize_per_tensor(torch.ones(3, 3), 0.5, 0, torch.qint8),
                "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
                "subclass": torch.ones(3, 3).as_subclass(Marked),
            }
        )


def dtensor() -> bytes:
    """Return the pickle of a ``DTensor``, which wraps the tensor of one process."""
    cls = glob("torch.distributed.tensor.DTensor")
    shape, device = several(b"K\4"), call("torch.device", text("cpu"))
    args = several(cls, glob("torch.float32"), shape, several(b"K\1"), b"K\0", b"N", device, b"\x89")
    return call(
        "torch._tensor._rebuild_from_type_v2",
        glob("torch._utils._rebuild_wrapper_subclass"),
        cls,
        args,
        mapping({"_local_tensor": tensor()}),
    )


TWO = {"0": bytes(16), "1": bytes(16)}
SEEN_AS_BYTES = tensor(storage("0", 16, "torch.ByteStorage"), size=(4,), stride=(1,))
EXPANDED = tensor(size=(2**40,), stride=(0,))


def converted(directory: Path) -> list[str | Path]:
    return ["convert", with_value(EXPANDED)(directory), "-o", "o.safetensors"]


REFUSED: dict[str, Refused] = {
    "D1 stride": Refused(
        with_value(tensor(stride=(1000, 1))), "'v': the view ends at byte 4008 of storage '0', which has 16"
    ),
    "D1 offset": Refused(with_value(tensor(offset=100)), "'v': the view ends at byte 416 of storage '0', which has 16"),
    "D2 shape": Refused(
        with_value(tensor(size=(2**40, 2**40))), "'v': the shape [1099511627776, 1099511627776] overflows"
    ),
    "D4 size": Refused(
        with_value(tensor(size=(-2, 2))), "a size or stride of a tensor is below 0 or above 2^63: (-2, 2)"
    ),
    "D4 stride": Refused(
        with_value(tensor(stride=(-2, 1))), "a size or stride of a tensor is below 0 or above 2^63: (-2, 1)"
    ),
    "D4 offset": Refused(with_value(tensor(offset=-1)), "the offset of a tensor is -1, below 0"),
    "D5 rank": Refused(with_value(tensor(size=(4,))), "a tensor has 1 dimensions and 2 strides"),
    "D6 more stored": Refused(
        with_value(b"N", {"0": bytes(20)}), "storage '0': the pickle says 16 bytes, the archive has 20"
    ),
    "D6 less stored": Refused(
        with_value(b"N", {"0": bytes(12)}), "storage '0': the pickle says 16 bytes, the archive has 12"
    ),
    "D6 2^40": Refused(
        with_value(tensor(storage("1", 2**40)), {"0": bytes(16), "1": bytes(16)}),
        "storage '1': the pickle says 4398046511104 bytes, the archive has 16",
    ),
    "D6 negative": Refused(with_value(tensor(storage("1", -1))), "a storage with an unknown type, key or size"),
    "D7 missing": Refused(with_value(b"N", {}), "storage '0' is not in the archive"),
    "D7 a key that climbs": Refused(
        with_value(tensor(storage("../data/0"))), "storage '../data/0' is not in the archive"
    ),
    "D8 two sizes": Refused(with_value(tensor(storage("0", 5))), "storage '0' has two sizes, 16 and 20 bytes"),
    "D8 two locations": Refused(
        with_value(tensor(storage(location="cuda:0"))), "storage '0' has two locations, 'cpu' and 'cuda:0'"
    ),
    "D11 a storage of no known dtype": Refused(
        with_value(tensor(storage("1", 4, "torch.Float3Storage"))), "unknown type"
    ),
}
ACCEPTED: dict[str, Accepted] = {
    "D3 expanded": Accepted(with_value(EXPANDED), "", "[1099511627776]   4.4 TB"),
    "D9 two dtypes": Accepted(with_value(SEEN_AS_BYTES), "named with two types, F32 and U8: torch gives", "F32"),
    "D10 location": Accepted(with_value(tensor(storage("1", location="cuda:9999")), TWO), "", "v"),
    "D11 dtype": Accepted(with_value(v3("torch.float3"), TWO), "", "torch.float3 (unknown)"),
    "D12 empty": Accepted(with_value(tensor(size=(0, 5), stride=(5, 1), offset=99)), "", "[0, 5]"),
    "D12 scalar": Accepted(with_value(tensor(size=(), stride=())), "", "[]"),
    "D12 1,000 dimensions": Accepted(with_value(tensor(size=(1,) * 1000, stride=(1,) * 1000)), "", str([1] * 1000)),
    "D13 float8": Accepted(written(saved({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, legacy=True)), "", "F8_E4M3"),
    "D14 DTensor": Accepted(with_value(dtensor()), "is split among ranks", "F32 (dtensor)"),
    **{f"D14 {kind}": Accepted(written(kinds), "", f"({kind})") for kind in ("sparse", "quantized", "nested")},
}
UNWRITABLE: dict[str, Refused] = {
    "D9 two dtypes": Refused(with_value(SEEN_AS_BYTES), "2 tensors cannot be copied: 'w' (its storage is named with"),
    "D3 expanded": Refused(converted, "not enough disk space: 4.4 TB needed, "),
    "D11 dtype": Refused(with_value(v3("torch.float3"), TWO), "'v' cannot be copied: its dtype is not known"),
    "D11 class": Refused(
        with_value(glob("torch.FloatTensor") + several(b"](G" + bytes(8) + b"e") + b"R"),
        "'v' cannot be copied: a call of torch.FloatTensor makes it, and the file has no storage with its bytes",
    ),
    "D14 DTensor": Refused(with_value(dtensor()), "'v' cannot be copied: it is a DTensor"),
    "D14 all": Refused(written(kinds), "5 tensors cannot be copied: 'meta' (it was saved from the meta device"),
}
OTHER = tuple(f"{name} written" for name in UNWRITABLE)


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_tensor_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_tensor_is_listed(name: str, tmp_path: Path) -> None:
    assert_accepted(tmp_path, ACCEPTED[name])


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_tensor_that_cannot_be_written_is_refused_by_name(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, UNWRITABLE[name], command="convert")
