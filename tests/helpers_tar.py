"""Build tar archives as torch 0.1 wrote them, which no current torch can write."""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ckptkit.core.dtypes import DTYPES

KINDS = {
    "F64": "Double",
    "F32": "Float",
    "F16": "Half",
    "I64": "Long",
    "I32": "Int",
    "I16": "Short",
    "I8": "Char",
    "U8": "Byte",
}


class Pickler(pickle.Pickler):
    """A pickler like that of torch 0.1: tensors and module classes are persistent ids."""

    def persistent_id(self, thing: Any) -> Any:
        if type(thing) is torch.Tensor:
            return str(self.keys[id(thing)])
        if isinstance(thing, type) and issubclass(thing, nn.Module) and thing not in self.seen:
            self.seen.add(thing)
            return thing, "net.py", "class Net: ..."
        return None

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, nn.Parameter):
            return copyreg.__newobj__, (nn.Parameter, self.data[id(thing)]), (False, False, OrderedDict())  # type: ignore[attr-defined]
        return NotImplemented

    keys: Mapping[int, int]
    data: Mapping[int, torch.Tensor]
    seen: set[type]


def kind_of(tensor: torch.Tensor, what: str) -> Any:
    code = next(dtype.code for dtype in DTYPES.values() if dtype.torch_name == str(tensor.dtype).removeprefix("torch."))
    return getattr(torch, KINDS[code] + what)


def parts(
    thing: object,
    tensors: Sequence[torch.Tensor],
    data: Mapping[int, torch.Tensor] | None = None,
    views: Sequence[tuple[int, int, int, int]] = (),
    of: Mapping[int, int] | None = None,
) -> dict[str, bytes]:
    """Return the four members for ``thing`` and its ``tensors``; ``of`` gives the position of each viewed storage."""
    keys = {id(tensor): 7_000_000 + index for index, tensor in enumerate(tensors)}
    storages: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor)
    numbers = {cdata: 1000 + index for index, cdata in enumerate(storages)}
    stored, placed, objects = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(len(storages), stored, 2)
    for cdata, tensor in storages.items():
        pickle.dump((numbers[cdata], "cpu", kind_of(tensor, "Storage")), stored, 2)
        raw = bytes(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).tolist())
        stored.write(struct.pack("<q", len(raw) // tensor.element_size()) + raw)
    pickle.dump(list(views), stored, 2)
    pickle.dump(len(tensors), placed, 2)
    for index, tensor in enumerate(tensors):
        number = (of or {}).get(index, numbers[tensor.untyped_storage()._cdata])
        pickle.dump((keys[id(tensor)], number, kind_of(tensor, "Tensor")), placed, 2)
        rank = tensor.dim()
        sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        placed.write(struct.pack("<i4x", rank) + struct.pack(f"<{2 * rank + 1}q", *sizes))
    pickler = Pickler(objects, 2)
    pickler.keys, pickler.data, pickler.seen = keys, data or {}, set()
    pickler.dump(thing)
    info = {"protocol_version": 1000, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 8}}
    return {
        "sys_info": pickle.dumps(info, 2),
        "pickle": objects.getvalue(),
        "tensors": placed.getvalue(),
        "storages": stored.getvalue(),
    }


def tar_of(members: Sequence[tuple[str, bytes]], **fields: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                if name == "pickle":
                    setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar(members: Mapping[str, bytes]) -> bytes:
    return tar_of(list(members.items()))
