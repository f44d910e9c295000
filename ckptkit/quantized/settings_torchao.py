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


def of_torchao(known: Known) -> Mapping[str, Setting]:
    """Return the sizes of blocks and the dtype of the weight.

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
    if name not in _CLASSES:
        raise UnknownFormError(f"as {name}")
    fields = described.get("_data")
    fields = fields if isinstance(fields, dict) else {}
    block, dtype = fields.get("block_size"), fields.get("dtype")
    if not isinstance(block, list) or not all(type(size) is int and size > 0 for size in block):
        raise BrokenPartError("scales", f"cannot be placed: block_size is {str(block)[:80]}")
    found: dict[str, Setting] = {"block": tuple(block)}
    code = dtype_code(str(dtype.get("_data"))) if isinstance(dtype, dict) else None
    if code is not None:
        found["dtype"] = code
    return found
