"""List the schemes that store a quantised weight as several tensors: the codes, their scales and other companions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["SCHEMES", "Part", "Scheme"]

Shape = tuple[int, ...]
Fits = Callable[[Shape, Shape], bool]  # of the tensor of codes and of the companion


def _scale_shape(codes: Shape, companion: Shape) -> bool:
    """Return whether a companion can hold scales: for the whole tensor, or for rows, columns, groups or blocks."""
    if all(size == 1 for size in companion):
        return True
    return len(companion) <= len(codes) and all(size <= whole for size, whole in zip(companion, codes, strict=False))


def _same_columns(codes: Shape, companion: Shape) -> bool:
    return len(codes) == len(companion) == 2 and codes[-1] == companion[-1]


def _matrix(codes: Shape, companion: Shape) -> bool:
    return len(codes) == len(companion) == 2


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a quantised weight: the endings of its key after the common stem, and its dtypes and shapes.

    An ending that begins with a letter follows a dot or begins the key. ``fits`` compares the shape of the codes with
    the shape of this part.
    """

    endings: tuple[str, ...]
    dtypes: frozenset[str]
    fits: Fits | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store a quantised weight, found by the key and dtype of ``anchor``.

    All parts of ``needed`` must be present, and parts of ``optional`` can be present. ``coded`` is the ending of the
    part that holds the codes. ``weight`` is the ending of the weight that the parts store. ``methods`` are the
    values of ``quant_method`` or ``quant_algo`` in a configuration that name the scheme. ``way_out`` says which
    library makes plain weights.
    """

    name: str
    anchor: Part
    needed: tuple[Part, ...]
    optional: tuple[Part, ...]
    coded: str
    weight: str
    way_out: str
    methods: frozenset[str] = frozenset()


_F8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_FLOATS = frozenset({"F32", "BF16", "F16"})
_SCALES = _FLOATS | {"F8_E8M0", "U8"}  # U8 holds the exponents of E8M0
_INTEGERS = frozenset({"I8", "U8", "I16", "I32", "I64"})
_U8, _I8, _I32 = frozenset({"U8"}), frozenset({"I8"}), frozenset({"I32"})
_PACKED = frozenset({"U8", "I8", "I32"})

_OF_INPUT = Part(
    (
        "input_scale", "activation_scale", "input_global_scale", "input_zero_point", "output_scale", "scale_input",
        "qscale_act", "pre_quant_scale", "comfy_quant",
    ),
    _FLOATS | _INTEGERS | _F8,
)  # fmt: skip
_ZERO_POINT = Part(("weight_zero_point",), _INTEGERS | _F8)
_BNB = "bitsandbytes dequantises it: bitsandbytes.functional.dequantize_4bit, or model.dequantize() of transformers"
_COMPRESSED = "compressed-tensors decompresses it: ModelCompressor.decompress_model, or load it with transformers"
_FP8 = "transformers dequantises it: from_pretrained with FineGrainedFP8Config(dequantize=True), then save_pretrained"
_GPTQ = "GPTQModel or transformers loads it, and dequantises each layer with layer.dequantize_weight()"

_FP8_METHODS = frozenset({"fp8", "fbgemm_fp8", "finegrained_fp8", "compressed-tensors", "modelopt", "quark"})


def _bitsandbytes_4bit(kind: str) -> Scheme:
    return Scheme(
        f"bitsandbytes {kind}",
        anchor=Part((f".quant_state.bitsandbytes__{kind}",), _U8),
        needed=(
            Part(("",), _U8 | _FLOATS),
            Part((".absmax",), _U8 | {"F32"}),
            Part((".quant_map",), frozenset({"F32"})),
        ),
        optional=(Part((".nested_absmax", ".nested_quant_map"), frozenset({"F32"})),),
        coded="", weight="", way_out=_BNB, methods=frozenset({"bitsandbytes", "bitsandbytes_4bit"}),
    )  # fmt: skip


# The first row that fits wins, unless the configuration names the method of another row that fits.
SCHEMES = (
    _bitsandbytes_4bit("nf4"),
    _bitsandbytes_4bit("fp4"),
    Scheme(
        "bitsandbytes int8",
        anchor=Part(("weight",), _I8),
        needed=(Part(("SCB", "weight.SCB"), _FLOATS, _scale_shape),),
        optional=(Part(("weight_format",), _U8),),
        coded="weight", weight="weight",
        way_out="bitsandbytes dequantises it: bitsandbytes.functional.int8_vectorwise_dequant",
        methods=frozenset({"bitsandbytes", "bitsandbytes_8bit"}),
    ),
    Scheme(
        "fp8",
        anchor=Part(("weight",), _F8),
        needed=(
            Part(("weight_scale_inv", "weight_scale", "scale_weight", "qscale_weight", "scale"), _SCALES),
        ),
        optional=(_ZERO_POINT, _OF_INPUT),
        coded="weight", weight="weight", way_out=_FP8, methods=_FP8_METHODS,
    ),
    Scheme(
        "fp8",
        anchor=Part(("",), _F8),  # the experts of a layer in one tensor, such as experts.gate_up_proj
        needed=(Part(("_scale_inv", "_scale"), _SCALES),),
        optional=(Part(("_input_scale", "_activation_scale", "_bias_scale"), _FLOATS),),
        coded="", weight="", way_out=_FP8, methods=_FP8_METHODS,
    ),
    Scheme(
        "GPTQ",
        anchor=Part(("qweight",), _I32),
        needed=(Part(("qzeros",), _I32), Part(("scales",), _FLOATS, _same_columns)),
        optional=(Part(("g_idx",), _I32),),
        coded="qweight", weight="weight", way_out=_GPTQ, methods=frozenset({"gptq", "auto-round", "intel/auto-round"}),
    ),
    Scheme(
        "AWQ",
        anchor=Part(("qweight",), _I32 | {"I16"}),
        needed=(Part(("qzeros",), _I32 | _FLOATS), Part(("scales",), _FLOATS, _matrix)),
        optional=(),
        coded="qweight", weight="weight",
        way_out="AutoAWQ or transformers loads it, and dequantises each layer with dequantize_gemm",
        methods=frozenset({"awq", "auto-round", "intel/auto-round"}),
    ),
)  # fmt: skip
