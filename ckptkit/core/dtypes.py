"""The dtypes of tensors: safetensors code, size and name in torch; float4 tensors in torch; the block types of GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = [
    "BLOCK_TYPES", "DTYPES", "PLAIN_FLOATS", "BlockType", "DType", "dtype_code", "is_float", "torch_shape",
    "torch_view", "unpack_float4",
]  # fmt: skip


class DType(NamedTuple):
    """An element type: its safetensors code, its width in bits and its name in torch."""

    code: str
    bits: int
    torch_name: str
    storable: bool = True  # whether the safetensors format has a code for it
    parts: int = 1  # numbers in an element: each has a byte order of its own

    @property
    def part_bytes(self) -> int:
        """Return the bytes of one number; 1 if several numbers share a byte."""
        return max(self.bits // 8 // self.parts, 1)


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        dtype.code: dtype
        for dtype in (
            DType("BOOL", 8, "bool"),
            DType("U8", 8, "uint8"),
            DType("I8", 8, "int8"),
            DType("U16", 16, "uint16"),
            DType("I16", 16, "int16"),
            DType("U32", 32, "uint32"),
            DType("I32", 32, "int32"),
            DType("U64", 64, "uint64"),
            DType("I64", 64, "int64"),
            DType("F4", 4, "float4_e2m1fn_x2"),
            DType("F6_E2M3", 6, ""),
            DType("F6_E3M2", 6, ""),
            DType("F8_E4M3", 8, "float8_e4m3fn"),
            DType("F8_E5M2", 8, "float8_e5m2"),
            DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
            DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
            DType("F8_E8M0", 8, "float8_e8m0fnu"),
            DType("F16", 16, "float16"),
            DType("BF16", 16, "bfloat16"),
            DType("F32", 32, "float32"),
            DType("F64", 64, "float64"),
            DType("C64", 64, "complex64", parts=2),
            DType("C32", 32, "complex32", storable=False, parts=2),
            DType("C128", 128, "complex128", storable=False, parts=2),
            DType("QI8", 8, "qint8", storable=False),
            DType("QU8", 8, "quint8", storable=False),
            DType("QI32", 32, "qint32", storable=False),
            DType("QU4X2", 8, "quint4x2", storable=False),
            DType("QU2X4", 8, "quint2x4", storable=False),
            DType("BITS8", 8, "bits8", storable=False),
            DType("BITS16", 16, "bits16", storable=False),
            DType("BITS1X8", 8, "bits1x8", storable=False),
            DType("BITS2X4", 8, "bits2x4", storable=False),
            DType("BITS4X2", 8, "bits4x2", storable=False),
        )
    }
)


class BlockType(NamedTuple):
    """A type of GGUF that stores a row of numbers in blocks: the numbers and the bytes of a block."""

    elements: int
    nbytes: int


BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        name: BlockType(elements, nbytes)
        for elements, sizes in (
            (32, {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q8_1": 40, "IQ4_NL": 18, "MXFP4": 17}),
            (64, {"NVFP4": 36}),
            (128, {"Q1_0": 18}),
            (256, {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q8_K": 292}),
            (256, {"IQ1_S": 50, "IQ1_M": 56, "IQ2_XXS": 66, "IQ2_XS": 74, "IQ2_S": 82, "IQ3_XXS": 98, "IQ3_S": 110}),
            (256, {"IQ4_XS": 136, "TQ1_0": 54, "TQ2_0": 66}),
        )
        for name, nbytes in sizes.items()
    }
)


# What layers compute with. Narrower floats are codes of quantised weights.
PLAIN_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def is_float(code: str) -> bool:
    """Return whether the dtype of this code is a floating-point dtype."""
    return code.startswith(("F", "BF"))


def dtype_code(name: str) -> str | None:
    """Return the safetensors code of a dtype, given its code or torch's name; None for an unknown name."""
    short = name.removeprefix("torch.")
    found = (known.code for known in DTYPES.values() if short.upper() == known.code or short == known.torch_name)
    return next(found, None)


def torch_shape(code: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that torch gives to elements of this dtype; of float4, torch counts bytes of two elements."""
    return (*shape[:-1], shape[-1] // 2) if code == "F4" else shape


def torch_view(
    code: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return shape, stride and offset as torch counts them, the inverse of ``unpack_float4``."""
    if code != "F4":
        return shape, stride, offset
    return torch_shape(code, shape), (*(step // 2 for step in stride[:-1]), 1), offset // 2


def unpack_float4(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """Return shape, stride and offset of a float4 tensor of torch, counted in elements instead of bytes.

    Return None if the bytes along the last dimension are not adjacent: no stride in elements describes that tensor.
    """
    if not shape or stride[-1] != 1:
        return None
    return (*shape[:-1], 2 * shape[-1]), (*(2 * step for step in stride[:-1]), 1), 2 * offset
