"""The names of schemes for messages, with the number of bits where names, shapes and the configuration tell it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.lazy_patterns import lazy_pattern
from ckptkit.quantized.configuration import Configuration
from ckptkit.quantized.known import weights_of_groups

__all__ = ["scheme_name"]

_WORD: Final = 32
_CLASS = lazy_pattern(r"(Int\d|Float8|NVFP4)\w*Tensor")
_MX_BITS: Final = {"float4": "mxfp4", "fp6_": "mxfp6", "float8": "mxfp8"}


def scheme_name(name: str, roles: Mapping[str, TensorInfo], described: str | None, configuration: Configuration) -> str:
    """Return the name of a scheme, with its bits if they are known.

    ``roles`` has the parts by role, and ``described`` is what the metadata of the file says of the weight.
    """
    if name == "torchao":
        form = _torchao_form(described, roles.get("codes"))
        return f"{name} {form}" if form else name
    bits: int | None = None
    if name == "int (compressed-tensors)":
        named = {
            weights.get("num_bits") for section in configuration.sections for weights in weights_of_groups(section)
        }
        bits = _integer(named.pop()) if len(named) == 1 else None
        return name if bits is None else f"int{bits} (compressed-tensors)"
    if name == "GPTQ":
        bits = _gptq_bits(roles) or _configured_bits(configuration)
    elif name == "MLX":
        bits = _configured_bits(configuration)
    return name if bits is None else f"{name} int{bits}"


def _integer(value: object) -> int | None:
    return value if type(value) is int else None


def _configured_bits(configuration: Configuration) -> int | None:
    """Return the number of bits that all sections agree on."""
    named = {section["bits"] for section in configuration.sections if "bits" in section}
    return _integer(named.pop()) if len(named) == 1 else None


def _gptq_bits(roles: Mapping[str, TensorInfo]) -> int | None:
    """Return the number of bits by the packed zero points, of which each output feature has one."""
    codes, zeros = roles.get("codes"), roles.get("zeros")
    if codes is None or zeros is None or len(codes.shape) != 2 or not codes.shape[1] or not zeros.shape:
        return None
    bits, rest = divmod(zeros.shape[-1] * _WORD, codes.shape[1])
    return bits if not rest and 1 <= bits <= 8 else None


def _torchao_form(described: str | None, codes: TensorInfo | None) -> str:
    """Return the form of numbers that a class of torchao has, or an empty text."""
    try:
        found = json.loads(described or "")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return "float8" if codes is not None and codes.dtype.startswith("F8") else ""
    fields = found.get("_data")
    fields = fields if isinstance(fields, dict) else {}
    kind = str(found.get("_type"))
    if kind == "MXTensor":
        code = fields.get("elem_dtype")
        text = str(code.get("_data") if isinstance(code, Mapping) else code)
        return next((form for start, form in _MX_BITS.items() if text.startswith(start)), "")
    if kind == "IntxUnpackedToInt8Tensor":
        target = fields.get("target_dtype")
        text = str(target.get("_data") if isinstance(target, Mapping) else target)
        return text if text.startswith(("int", "uint")) and len(text) <= len("uint8") else ""
    match = _CLASS.fullmatch(kind)
    return match[1].lower() if match else ""
