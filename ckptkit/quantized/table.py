"""List the schemes that store a quantised weight as several tensors: the codes, their scales and other companions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ckptkit.core.dtypes import PLAIN_FLOATS as _FLOATS

__all__ = ["SCHEMES", "Coding", "Part", "Scheme"]

Shape = tuple[int, ...]
Fits = Callable[[Shape, Shape], bool]  # of the shape of the codes and the shape of a companion


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a quantised weight: the endings of its key after the common stem, its dtypes and its shapes.

    An ending that begins with a letter follows a dot or is the whole key. ``fits`` compares the shape of the codes with
    the shape of this part. ``is_telling`` is true if only this scheme uses the name: without codes, codes are missing.
    """

    endings: tuple[str, ...]
    dtypes: frozenset[str]
    fits: Fits | None = None
    is_telling: bool = False


@dataclass(frozen=True, slots=True)
class Coding:
    """The decoder of a scheme: its family in ``values.dequantize``, and the endings of the part that has each role."""

    family: str
    roles: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store a quantised weight, found by the key and dtype of ``anchor``.

    All parts of ``needed`` must be present, and parts of ``optional`` can be present. ``coded`` is the ending of the
    part that holds the codes. ``weight`` is the ending of the weight that the parts store; with ``is_private``, the
    stem has an underscore that the weight does not have. ``methods`` are the values of ``quant_method`` that name the
    scheme in a configuration. ``way_out`` says which library makes plain weights. ``is_ordinary`` is true if codes
    without scales can be ordinary numbers, as fp8 can. ``is_certain`` is true if the anchor alone shows the scheme.
    ``absent`` are the last segments of keys that no tensor of the checkpoint has if it has this scheme. ``coding`` is
    None if ckptkit cannot decode the scheme.
    """

    name: str
    anchor: Part
    needed: tuple[Part, ...]
    way_out: str
    methods: frozenset[str] = frozenset()
    optional: tuple[Part, ...] = ()
    coded: str = "weight"
    weight: str = "weight"
    is_private: bool = False
    is_ordinary: bool = False
    is_certain: bool = False
    absent: frozenset[str] = frozenset()
    coding: Coding | None = None


def _is_scale(codes: Shape, companion: Shape) -> bool:
    """Return whether a companion can hold scales: for the whole tensor, or for rows, columns, groups or blocks."""
    if all(size == 1 for size in companion):
        return True
    return len(companion) <= len(codes) and all(size <= most for size, most in zip(companion, codes, strict=False))


def _has_same_columns(codes: Shape, companion: Shape) -> bool:
    return len(codes) == len(companion) and len(codes) in {2, 3} and codes[-1] == companion[-1]


def _is_matrix(codes: Shape, companion: Shape) -> bool:
    return len(codes) == len(companion) and len(codes) in {2, 3}


def _has_same_rows(codes: Shape, companion: Shape) -> bool:
    return len(codes) >= 2 and len(companion) >= 2 and codes[:-1] == companion[:-1]


def _are_scales_of_blocks(codes: Shape, companion: Shape) -> bool:
    return codes[:-1] == companion and len(companion) >= 2 and codes[-1] == 16  # bytes with 32 codes


def _is_of_matrices(codes: Shape, companion: Shape) -> bool:
    return len(codes) >= 2 and len(companion) <= len(codes)


def _is_of_groups(codes: Shape, companion: Shape) -> bool:
    return len(codes) == 3 and bool(companion)


def _dtypes(names: str) -> frozenset[str]:
    return frozenset(names.split())


_F8 = _dtypes("F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ")
_E4M3 = _dtypes("F8_E4M3")
_E8M0 = _dtypes("F8_E8M0 U8")  # older versions of safetensors have no dtype for exponents
_INTEGERS = _dtypes("I8 U8 I16 I32 I64")
_CODES = _dtypes("I8 U8 I16 I32 F4") | _F8
_ANY = _FLOATS | _INTEGERS | _F8 | _E8M0 | {"U32", "BOOL"}

_OF_INPUT = Part(
    (
        "input_scale", "activation_scale", "input_global_scale", "input_zero_point", "output_scale", "scale_input",
        "qscale_act", "pre_quant_scale", "comfy_quant", "input_scale_ub", "activation_scaling_factor",
        "prequant_scaling_factor",
    ),
    _ANY,
)  # fmt: skip
_OF_WEIGHT = Part(("weight_zero_point", "weight_g_idx", "weight_shape"), _ANY)
_SCALE = Part(("weight_scale",), _FLOATS, is_telling=True)

_WRITER = "dequantise it with the library that wrote it"
_COMPRESSED = "load it with transformers and compressed-tensors, which decompress it, and save it with save_pretrained"
_MODELOPT = "quantise from the original weights instead: modelopt does not write plain weights of such a checkpoint"
_COMFY = "multiply the codes of each weight by its scale, as ComfyUI does, and save the products"
_FP8 = "load it with transformers and FineGrainedFP8Config(dequantize=True), and save it with save_pretrained"
_MXFP4 = "load it with transformers and Mxfp4Config(dequantize=True), and save it with save_pretrained"
_GPTQ = "load it with GPTQModel, and dequantise the weight of each layer with dequantize_weight()"
_TORCHAO = "load it with torchao, call dequantize() on each tensor, and save the state_dict"
_DEQUANTIZE = "load it with transformers, call model.dequantize(), and save it with save_pretrained"


def _scaled(*scales: str, codes: str = "weight", zeros: tuple[str, ...] = (), index: tuple[str, ...] = ()) -> Coding:
    others = [(role, endings) for role, endings in (("zeros", zeros), ("g_idx", index)) if endings]
    return Coding("scaled", (("codes", (codes,)), ("scales", scales), *others))


def _by_columns(family: str) -> Coding:
    roles = (("codes", "qweight"), ("scales", "scales"), ("zeros", "qzeros"), ("g_idx", "g_idx"))
    return Coding(family, tuple((role, (ending,)) for role, ending in roles))


def _float4(family: str, codes: str, *scales: str, common: str = "") -> Coding:
    roles = (("codes", (codes,)), ("scales", scales))
    return Coding(family, (*roles, ("global", (common,))) if common else roles)


_OF_FP8 = Scheme(
    "fp8",
    Part(("weight",), _F8),
    (Part(("weight_scale_inv", "weight_scale"), _FLOATS | _E8M0, is_telling=True),),
    _FP8,
    _dtypes("fp8 finegrained_fp8 fbgemm_fp8 quark"),
    (_OF_WEIGHT, _OF_INPUT),
    is_ordinary=True,
    coding=_scaled("weight_scale_inv", "weight_scale", zeros=("weight_zero_point",), index=("weight_g_idx",)),
)
_BY_SCALE = replace(_OF_FP8, needed=(Part(("weight_scale", "weight_scale_inv"), _FLOATS | _E8M0, is_telling=True),))


def _bitsandbytes_4bit(kind: str) -> Scheme:
    return Scheme(
        f"bitsandbytes {kind}",
        Part((f".quant_state.bitsandbytes__{kind}",), _dtypes("U8")),
        (
            Part(("",), _FLOATS | {"U8"}),
            Part((".absmax",), _dtypes("U8 F32"), is_telling=True),
            Part((".quant_map",), _dtypes("F32"), is_telling=True),
        ),
        f"{_DEQUANTIZE}; or use bitsandbytes.functional.dequantize_4bit",
        _dtypes("bitsandbytes bitsandbytes_4bit"),
        (Part((".nested_absmax", ".nested_quant_map"), _dtypes("F32")),),
        coded="",
        weight="",
        is_certain=True,
        coding=Coding(
            "bitsandbytes 4bit",
            (
                ("codes", ("",)),
                ("quant_state", (f".quant_state.bitsandbytes__{kind}",)),
                *((name, (f".{name}",)) for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
            ),
        ),
    )


def _sparse(prefix: str) -> Scheme:
    return Scheme(
        "sparse (compressed-tensors)",
        Part((f"{prefix}bitmask",), _dtypes("U8")),
        (Part((f"{prefix}compressed",), _ANY, is_telling=True), Part((f"{prefix}shape",), _INTEGERS)),
        _COMPRESSED,
        _dtypes("compressed-tensors"),
        (Part((f"{prefix}row_offsets", "weight_scale"), _ANY), _OF_WEIGHT, _OF_INPUT),
        coded=f"{prefix}compressed",
    )


def _hqq(anchor: Part, needed: tuple[Part, ...]) -> Scheme:
    names = (
        "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
        "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
        "optimize", "round_zero", "scale_q", "zero_q",
    )  # fmt: skip
    return Scheme(
        "HQQ",
        anchor,
        (*needed, Part(("scale", "meta.scale"), _ANY), Part(("zero", "meta.zero"), _ANY)),
        "load it with hqq, and call dequantize() on each layer",
        _dtypes("hqq"),
        (Part(tuple(prefix + name for prefix in ("", "meta.") for name in names), _ANY),),
        coded="W_q",
        coding=Coding(
            "hqq",
            (
                ("codes", ("W_q",)),
                ("scales", ("scale", "meta.scale")),
                ("zeros", ("zero", "meta.zero")),
                *(
                    (name, (name, f"meta.{name}"))
                    for name in ("shape", "packing", "axis", "quant_scale", "quant_zero", "compute_dtype")
                ),
            ),
        ),
    )


def _torchao(anchor: str, joint: str, *, is_private: bool = False) -> Scheme:
    scales = ("scale", "scale_and_zero", "group_scale")
    others = (
        "zero_point", "group_zero", "row_scale", "per_tensor_scale", "act_per_tensor_scale", "act_pre_scale",
        "act_quant_scale", "act_quant_zero_point", "output_act_quant_scale", "sparse_metadata", "qzeros",
        "compensation",
    )  # fmt: skip
    return Scheme(
        "torchao",
        Part((f"{joint}{anchor}",), _CODES),
        (Part(tuple(joint + name for name in scales), _ANY),),
        _TORCHAO,
        _dtypes("torchao"),
        (Part(tuple(joint + name for name in others), _ANY),),
        coded=f"{joint}{anchor}",
        weight="",
        is_private=is_private,
        coding=Coding(
            "torchao",
            (
                ("codes", (f"{joint}{anchor}",)),
                ("scales", (f"{joint}scale",)),
                ("zeros", (f"{joint}zero_point",)),
                ("global", (f"{joint}per_tensor_scale",)),
            ),
        ),
    )


# The first row that fits wins, unless the configuration names the method of another row that fits.
SCHEMES = (
    _bitsandbytes_4bit("nf4"),
    _bitsandbytes_4bit("fp4"),
    Scheme(
        "bitsandbytes int8", Part(("weight",), _dtypes("I8")),
        (Part(("SCB", "weight.SCB"), _FLOATS, is_telling=True),),
        f"{_DEQUANTIZE}; or use bitsandbytes.functional.int8_vectorwise_dequant",
        _dtypes("bitsandbytes bitsandbytes_8bit"), (Part(("weight_format",), _dtypes("U8")),),
        coding=Coding(
            "bitsandbytes int8",
            (("codes", ("weight",)), ("scales", ("SCB", "weight.SCB")), ("weight_format", ("weight_format",))),
        ),
    ),
    _OF_FP8,
    replace(_BY_SCALE, name="fp8 (compressed-tensors)", way_out=_COMPRESSED, methods=_dtypes("compressed-tensors")),
    replace(_BY_SCALE, name="fp8 (modelopt)", way_out=_MODELOPT, methods=_dtypes("modelopt")),
    replace(  # the names of DeepSeek's own code
        _OF_FP8, needed=(Part(("scale",), _FLOATS | _E8M0, _is_matrix),), coding=_scaled("scale"),
    ),
    Scheme(
        "fp8 (ComfyUI)", Part(("weight",), _F8), (Part(("scale_weight",), _FLOATS, is_telling=True),), _COMFY,
        optional=(_OF_INPUT,), is_ordinary=True, coding=_scaled("scale_weight"),
    ),
    Scheme(
        "fp8 (Mistral)", Part(("weight",), _F8), (Part(("qscale_weight",), _FLOATS, is_telling=True),), _FP8,
        optional=(_OF_INPUT,), is_ordinary=True, coding=_scaled("qscale_weight"),
    ),
    # The experts of a layer are one tensor, such as experts.gate_up_proj.
    replace(
        _OF_FP8, anchor=Part(("",), _F8), coded="", weight="",
        needed=(Part(("_scale_inv", "_weight_scale", "_scale"), _FLOATS | _E8M0, _is_of_matrices),),
        optional=(Part(("_input_scale", "_activation_scale"), _FLOATS),),
        coding=_scaled("_scale_inv", "_weight_scale", "_scale", codes=""),
    ),
    Scheme(
        "fp8 (TensorRT-LLM)", Part(("weight",), _F8), (Part(("weights_scaling_factor",), _FLOATS, is_telling=True),),
        "convert the original weights instead: TensorRT-LLM does not write plain weights",
        optional=(_OF_INPUT,), is_ordinary=True, coding=_scaled("weights_scaling_factor"),
    ),
    _sparse("weight."),
    _sparse(""),
    Scheme(
        "nvfp4", Part(("",), _dtypes("U8 F4")),
        (Part(("_weight_scale",), _E4M3, _is_of_matrices), Part(("_weight_scale_2",), _FLOATS)),
        _MODELOPT, _dtypes("modelopt modelopt_fp4"), (Part(("_input_scale",), _FLOATS),), coded="", weight="",
        coding=_float4("nvfp4", "", "_weight_scale", common="_weight_scale_2"),
    ),
    Scheme(
        "nvfp4", Part(("weight",), _dtypes("U8 F4")),
        (Part(("weight_scale",), _E4M3, _has_same_rows, is_telling=True), Part(("weight_scale_2",), _FLOATS)),
        _MODELOPT, _dtypes("modelopt modelopt_fp4"), (_OF_INPUT,),
        coding=_float4("nvfp4", "weight", "weight_scale", common="weight_scale_2"),
    ),
    Scheme(
        "nvfp4 (compressed-tensors)", Part(("weight_packed",), _dtypes("U8 F4")),
        (Part(("weight_scale",), _E4M3, _has_same_rows, is_telling=True), Part(("weight_global_scale",), _FLOATS)),
        _COMPRESSED, _dtypes("compressed-tensors"), (_OF_WEIGHT, _OF_INPUT), coded="weight_packed",
        coding=_float4("nvfp4 divided", "weight_packed", "weight_scale", common="weight_global_scale"),
    ),
    Scheme(
        "mxfp4 (compressed-tensors)", Part(("weight_packed",), _dtypes("U8 F4")),
        (Part(("weight_scale",), _E8M0, _has_same_rows, is_telling=True),),
        _COMPRESSED, _dtypes("compressed-tensors"), (_OF_WEIGHT, _OF_INPUT), coded="weight_packed",
        coding=_float4("mxfp4", "weight_packed", "weight_scale"),
    ),
    Scheme(
        "mxfp4", Part(("weight",), _dtypes("U8 I8 F4")),
        (Part(("weight_scale", "weight_scale_inv", "scale"), _E8M0, _has_same_rows),),
        _WRITER, _dtypes("mxfp4 quark fp8"), (_OF_INPUT,),
        coding=_float4("mxfp4", "weight", "weight_scale", "weight_scale_inv", "scale"),
    ),
    Scheme(
        "mxfp4", Part(("_blocks",), _dtypes("U8")),
        (Part(("_scales",), _dtypes("U8"), _are_scales_of_blocks, is_telling=True),),
        _MXFP4, _dtypes("mxfp4"), coded="_blocks", weight="",
        coding=_float4("mxfp4 blocks transposed", "_blocks", "_scales"),
    ),
    Scheme(  # the names of OpenAI's own code
        "mxfp4", Part((".blocks",), _dtypes("U8")), (Part((".scales",), _dtypes("U8"), _are_scales_of_blocks),),
        _MXFP4, _dtypes("mxfp4"), coded=".blocks", weight="", coding=_float4("mxfp4 blocks", ".blocks", ".scales"),
    ),
    Scheme(
        "int (compressed-tensors)", Part(("weight_packed",), _dtypes("I32")),
        (_SCALE, Part(("weight_shape",), _dtypes("I64 I32"), is_telling=True)),
        _COMPRESSED, _dtypes("compressed-tensors"), (_OF_WEIGHT, _OF_INPUT), coded="weight_packed",
        coding=Coding(
            "packed rows",
            (
                ("codes", ("weight_packed",)), ("scales", ("weight_scale",)), ("zeros", ("weight_zero_point",)),
                ("g_idx", ("weight_g_idx",)), ("shape", ("weight_shape",)),
            ),
        ),
    ),
    Scheme(
        "marlin-24 (compressed-tensors)", Part(("weight_packed",), _dtypes("I32")),
        (Part(("scale_packed",), _FLOATS), Part(("meta",), _INTEGERS)),
        _COMPRESSED, _dtypes("compressed-tensors"), (_OF_WEIGHT, _OF_INPUT), coded="weight_packed",
    ),
    Scheme(
        "EETQ", Part(("weight",), _dtypes("I8")), (Part(("weight_scales",), _FLOATS, is_telling=True),),
        "load the original weights instead: EETQ does not write plain weights", _dtypes("eetq"),
    ),
    Scheme(
        "int8", Part(("weight",), _dtypes("I8")), (_SCALE,), _COMPRESSED,
        _dtypes("compressed-tensors modelopt quark"), (_OF_WEIGHT, _OF_INPUT),
        coding=_scaled("weight_scale", zeros=("weight_zero_point",), index=("weight_g_idx",)),
    ),
    Scheme(  # gpt-fast, TensorRT-LLM and others
        "int8", Part(("weight",), _dtypes("I8")),
        (Part(("scales", "scale", "per_channel_scale", "weights_scaling_factor"), _FLOATS, _is_scale),),
        _WRITER, optional=(Part(("zeros", "zero_point", "zero_points"), _ANY), _OF_INPUT),
    ),
    Scheme(
        "int4 (tinygemm)", Part(("weight",), _dtypes("I32 U8")),
        (Part(("scales_and_zeros",), _FLOATS, is_telling=True),), _WRITER,
    ),
    Scheme(
        "BitNet", Part(("weight",), _dtypes("U8")), (_SCALE,),
        "load it with transformers, which unpacks the weights, and save the unpacked weights", _dtypes("bitnet"),
    ),
    Scheme(
        "packed integers", Part(("weight",), _dtypes("U8 I32")), (_SCALE,),
        _WRITER, _dtypes("modelopt quark"), (_OF_WEIGHT, _OF_INPUT),
    ),
    Scheme(
        "MLX", Part(("weight",), _dtypes("U32")),
        (Part(("scales",), _FLOATS | {"U8"}, _has_same_rows),),
        "dequantise it with mlx_lm.convert", _dtypes("mlx metal"),
        (Part(("biases", "qbiases"), _FLOATS),),
        coding=Coding("mlx", (("codes", ("weight",)), ("scales", ("scales",)), ("biases", ("biases", "qbiases")))),
    ),
    Scheme(
        "GPTQ", Part(("qweight",), _dtypes("I32")),
        (Part(("qzeros",), _dtypes("I32"), is_telling=True), Part(("scales",), _FLOATS, _has_same_columns)),
        _GPTQ, _dtypes("gptq auto-round intel/auto-round"), (Part(("g_idx",), _dtypes("I32")),), coded="qweight",
        coding=_by_columns("gptq"),
    ),
    Scheme(
        "AWQ", Part(("qweight",), _dtypes("I32 I16")),
        (Part(("qzeros", "scaled_zeros"), _FLOATS | {"I32"}, is_telling=True), Part(("scales",), _FLOATS, _is_matrix)),
        "load it with AutoAWQ, and dequantise the weight of each layer with dequantize_gemm",
        _dtypes("awq auto-round intel/auto-round"), (Part(("g_idx",), _dtypes("I32")),), coded="qweight",
        coding=_by_columns("awq"),
    ),
    Scheme(
        "GPTQ", Part(("qweight",), _dtypes("I32")), (Part(("scales",), _FLOATS, _is_matrix),),
        _GPTQ, _dtypes("gptq auto-round intel/auto-round"), (Part(("g_idx",), _dtypes("I32")),), coded="qweight",
        absent=frozenset({"qzeros"}),  # symmetric: each zero point is known
        coding=_by_columns("gptq"),
    ),
    Scheme(
        "GPTQ (Marlin)", Part(("B",), _dtypes("I32")), (Part(("s",), _FLOATS, _is_matrix, is_telling=True),),
        _GPTQ, _dtypes("marlin gptq"), (Part(("workspace", "meta"), _INTEGERS),), coded="B",
    ),
    Scheme(
        "FP-Quant", Part(("qweight",), _dtypes("U8")), (Part(("scales",), _E8M0 | _E4M3, _has_same_rows),),
        _DEQUANTIZE, _dtypes("fp_quant"),
        (Part(("weight_global_scale", "act_global_scale", "forward_hadamard_matrix", "backward_hadamard_matrix"),
              _FLOATS),),
        coded="qweight",
    ),
    Scheme(
        "SVDQuant", Part(("qweight",), _dtypes("I8 I32")), (Part(("wscales",), _FLOATS | _E4M3, is_telling=True),),
        "load the original weights instead: nunchaku does not write plain weights", _dtypes("svdquant"),
        (
            Part(
                ("smooth_factor", "smooth_factor_orig", "proj_down", "proj_up", "wtscale", "wcscales", "wzeros",
                 "lora_down", "lora_up", "smooth", "smooth_orig"),
                _FLOATS,
            ),
        ),
        coded="qweight",
    ),
    _hqq(Part(("W_q",), _dtypes("U8 I32")), ()),
    # With view_as_float, the codes have a dtype of floating-point numbers.
    _hqq(Part(("nbits", "meta.nbits"), _dtypes("I32")), (Part(("W_q",), _FLOATS),)),
    Scheme(
        "quanto", Part(("weight._data",), _F8 | {"I8"}), (Part(("weight._scale",), _FLOATS, is_telling=True),),
        "load it with optimum-quanto, and call dequantize() on each weight", _dtypes("quanto"), (_OF_INPUT,),
        coded="weight._data", coding=_scaled("weight._scale", codes="weight._data"),
    ),
    Scheme(
        "quanto", Part(("weight._data._data",), _dtypes("U8")),
        (Part(("weight._scale",), _FLOATS, is_telling=True), Part(("weight._shift",), _FLOATS | {"I8", "U8"})),
        "load it with optimum-quanto, and call dequantize() on each weight", _dtypes("quanto"), (_OF_INPUT,),
        coded="weight._data._data",
    ),
    _torchao("qdata", "_", is_private=True),
    _torchao("qdata", ":"),
    _torchao("_data", ":"),
    Scheme(
        "AQLM", Part(("codes",), _dtypes("I8 I16 U8 I32")),
        (Part(("codebooks",), _FLOATS, is_telling=True), Part(("scales",), _FLOATS)),
        "load it with aqlm, and dequantise the weight of each layer", _dtypes("aqlm"), coded="codes",
    ),
    Scheme(
        "VPTQ", Part(("indices",), _dtypes("I16 U16 I32")),
        (Part(("centroids.weight",), _FLOATS, _is_of_groups, is_telling=True),),
        "load it with vptq, and dequantise the weight of each layer", _dtypes("vptq"),
        (Part(("res_centroids.weight", "weight_scale", "weight_bias", "perm", "invert_perm", "outlier_indices",
               "outlier_centroids.weight", "res_indices"), _ANY),),
        coded="indices",
    ),
    Scheme(
        "HIGGS", Part(("weight",), _dtypes("I16")),
        (Part(("scales",), _FLOATS), Part(("tables",), _FLOATS), Part(("tables2",), _FLOATS)),
        _DEQUANTIZE, _dtypes("higgs"),
    ),
    Scheme(
        "SpQR", Part(("row_offsets",), _dtypes("I32")),
        (Part(("dense_weights",), _dtypes("I64"), is_telling=True),),
        "load it with spqr_quant, and dequantise the weight of each layer", _dtypes("spqr"),
        (Part(("col_vals", "in_perm"), _ANY),), coded="dense_weights",
    ),
    Scheme(
        "EXL2", Part(("q_weight",), _dtypes("I32")),
        (Part(("q_scale",), _dtypes("I32"), is_telling=True), Part(("q_scale_max",), _FLOATS)),
        "load the original weights instead: ExLlamaV2 does not write plain weights", _dtypes("exl2"),
        (Part(("q_groups", "q_perm", "q_invperm", "q_group_map"), _INTEGERS),), coded="q_weight",
    ),
    Scheme(
        "EXL3", Part(("trellis",), _dtypes("I16")), (Part(("suh", "su"), _ANY), Part(("svh", "sv"), _ANY)),
        "load the original weights instead: ExLlamaV3 does not write plain weights", _dtypes("exl3"),
        (Part(("mcg", "mul1"), _INTEGERS),), coded="trellis",
    ),
)  # fmt: skip
