"""Find what decoders of torchao's flattened tensors need: the metadata that torchao writes for each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from ckptkit.core.dtypes import dtype_code
from ckptkit.quantized.known import Known

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_torchao"]

# The classes whose weight is ``(codes - zero point) * scale``, with codes that are not packed.
_CLASSES: Final = frozenset({"Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"})
# The size of the groups of codes of 4 bits. MXTensor has codes of 8 bits, too.
_GROUPS: Final = {"MXTensor": 32, "NVFP4Tensor": 16}


def of_torchao(known: Known) -> Mapping[str, Setting]:
    """Return the sizes of blocks and the dtype of the weight, and which form codes of 4 bits have.

    Raises ``UnknownFormError`` for other classes of tensors, and where the metadata of the file does not describe the
    tensor.
    """
    from ckptkit.values.dequantize.model import BrokenPartError, UnknownFormError

    try:
        described = json.loads(known.metadata.get(known.key, ""))
    except (ValueError, RecursionError):
        described = None
    name = described.get("_type") if isinstance(described, dict) else None
    if not isinstance(name, str):
        raise UnknownFormError("without metadata that names its class")
    fields = described.get("_data")
    fields = fields if isinstance(fields, dict) else {}
    if name in _GROUPS:
        return _of_groups(name, fields)
    if name == "Int4Tensor":
        return _of_int4(known, fields)
    if name not in _CLASSES:
        raise UnknownFormError(f"as {name}")
    block, dtype = fields.get("block_size"), fields.get("dtype")
    if not isinstance(block, list) or not all(type(size) is int and size > 0 for size in block):
        raise BrokenPartError("scales", f"cannot be placed: block_size is {str(block)[:80]}")
    return {"block": tuple(block), **_dtype(dtype)}


def _of_int4(known: Known, fields: Mapping[str, object]) -> Mapping[str, Setting]:
    """Return the settings of codes of 4 bits with scales and offsets by groups of columns."""
    from ckptkit.values.dequantize.model import BrokenPartError, UnknownFormError

    block = fields.get("block_size")
    if not isinstance(block, list) or len(block) < 2 or not all(type(size) is int and size > 0 for size in block):
        raise BrokenPartError("scales", f"cannot be placed: block_size is {str(block)[:80]}")
    if "zeros" not in known.parts or any(size != 1 for size in block[:-1]):
        raise UnknownFormError(f"as Int4Tensor in blocks of {block}")
    return {"form": "int4", "group_size": block[-1]}


def _of_groups(name: str, fields: Mapping[str, object]) -> Mapping[str, Setting]:
    """Return the settings of a class with a scale for each group of codes in a row."""
    from ckptkit.values.dequantize.model import BrokenPartError, UnknownFormError

    size, kind = fields.get("block_size"), fields.get("elem_dtype")
    code = kind.get("_data") if isinstance(kind, Mapping) else kind
    if fields.get("is_swizzled_scales"):
        raise UnknownFormError(f"as {name} with scales in the layout of a GPU")
    if type(size) is not int or size < 1:
        raise BrokenPartError("scales", f"cannot be placed: block_size is {str(size)[:80]}")
    dtype = _dtype(fields.get("orig_dtype"))
    if name == "MXTensor" and code in ("float8_e4m3fn", "float8_e5m2"):
        return {"block": (1, size), **dtype}
    if name == "MXTensor" and code in ("fp6_e2m3", "fp6_e3m2"):
        return {"form": "mxfp6", "kind": str(code).removeprefix("fp6_"), "group_size": size, **dtype}
    if name == "MXTensor" and code != "float4_e2m1fn_x2":
        raise UnknownFormError(f"as {name} of {str(code)[:80]}")
    if size != _GROUPS[name]:
        raise UnknownFormError(f"as {name} in groups of {size}")
    return {"form": "mxfp4" if name == "MXTensor" else "nvfp4", **dtype}


def _dtype(described: object) -> Mapping[str, Setting]:
    code = dtype_code(str(described.get("_data"))) if isinstance(described, Mapping) else None
    return {} if code is None else {"dtype": code}
