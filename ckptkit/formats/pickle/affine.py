"""Read how torch quantised a tensor of a pickle: its scales and zero points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ckptkit.core.checkpoint import Affine, Payload, TensorInfo, View
from ckptkit.core.checkpoint.reading import read_array
from ckptkit.core.files.payloads import Region
from ckptkit.formats.layout import Strided
from ckptkit.formats.torch.objects import StorageRef, TensorRef

__all__ = ["CODES_OF_QUANTIZED", "affine_of_pickle"]

# The dtype of the integers in a quantised tensor.
CODES_OF_QUANTIZED: Mapping[str, str] = MappingProxyType({"QI8": "I8", "QU8": "U8", "QI32": "I32"})


def affine_of_pickle(quantizer: object, codes: Payload, locate: Callable[[StorageRef], Region]) -> Affine | None:
    """Return the scales and zero points of ``quantizer``, as ``torch._utils._rebuild_qtensor`` takes it.

    ``locate`` finds the bytes of a storage. None is returned for a scheme that is not affine, and for one that torch
    would not read either.
    """
    if not isinstance(quantizer, tuple) or len(quantizer) < 3:
        return None
    scheme, scales, zeros, *axis = str(quantizer[0]), *quantizer[1:]
    if scheme == "tensor_affine" and isinstance(scales, float) and isinstance(zeros, int):
        return Affine(codes, (scales,), (zeros,), -1)
    is_per_channel = scheme == "channel_affine" and len(axis) == 1 and isinstance(axis[0], int)
    if is_per_channel and isinstance(scales, TensorRef) and isinstance(zeros, TensorRef):
        numbers = [tuple(_numbers(part, locate)) for part in (scales, zeros)]
        return Affine(codes, numbers[0], tuple(map(int, numbers[1])), axis[0])
    return None


def _numbers(tensor: TensorRef, locate: Callable[[StorageRef], Region]) -> list[float]:
    """Return the numbers of a small tensor."""
    storage = tensor.storage
    if storage is None or tensor.dtype not in {"F64", "F32", "I64", "I32"}:
        return []
    info = TensorInfo("", tensor.dtype, tensor.shape, View(0, tensor.offset, tensor.stride))
    numbers: list[float] = read_array(info, lambda _: Strided(storage.data or locate(storage), info), None).tolist()
    return numbers
