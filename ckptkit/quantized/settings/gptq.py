"""Find what decoders of GPTQ and AWQ need: the number of bits, and what the zero points mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from ckptkit.quantized.known import Known

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_awq", "of_gptq"]

_WRITE_CONFIGURATION: Final = (
    "where you know how it was made, write beside it a quantize_config.json with bits, and with a checkpoint_format, "
    "which is gptq or gptq_v2"
)
_BITS: Final = (2, 3, 4, 8)
_ZEROS: Final = {"gptq": "v1", "gptq_v2": "v2"}
_AWQ_LAYOUTS: Final = {"", "gemm"}
# What AutoRound's packing_format says about zero points: auto_gptq has each less 1, as v1 of GPTQ.
# Source: https://github.com/intel/auto-round, ``auto_round/inference/backend.py``.
_PACKING_FORMATS: Final = {"auto_round:auto_gptq": "v1", "auto_round": "v2", "auto_round:gptqmodel": "v2"}


def _format(known: Known, *names: str) -> str:
    found = known.configured(*names)
    return found.lower() if isinstance(found, str) else ""


def of_gptq(known: Known) -> Mapping[str, Setting]:
    """Return the number of bits and the form of the zero points.

    Raises ``UnknownFormError`` for layouts of kernels, and where nothing says what the zero points mean.
    """
    from ckptkit.values.dequantize.model import BrokenPartError, UnknownFormError

    bits = known.configured("bits", "w_bit", "num_bits")
    form = _format(known, "checkpoint_format", "format")
    if form == "gptq_p" or (form in _ZEROS and bits in (5, 6, 7)):
        raise UnknownFormError("in planes of bits")
    if form and form not in _ZEROS and not _is_auto_round(known):
        raise UnknownFormError(f"in the layout {form}")
    usual = bits if isinstance(bits, int) else None
    possible = _possible_bits(known)
    if usual not in possible:
        if len(possible) != 1:
            raise BrokenPartError("codes", f"cannot be decoded: {_reason(usual)}")
        usual = possible[0]
    found: dict[str, Setting] = {"bits": usual, "zeros": _zeros(known, usual, form)}
    size = known.configured("group_size")
    inputs = known.parts["codes"].shape[0] * 32 // usual if known.parts["codes"].shape else 0
    if isinstance(size, int) and 0 < size < inputs and -(-inputs // size) == known.parts["scales"].shape[0]:
        found["group_size"] = size
    return found


def _reason(bits: int | None) -> str:
    if bits is None:
        return "no configuration says how many bits a code has"
    return f"{bits} bits, as the configuration says, do not fit its parts"


def _possible_bits(known: Known) -> list[int]:
    """Return the numbers of bits that fit the shapes of all parts."""
    codes, scales = known.parts["codes"].shape, known.parts["scales"].shape
    if len(codes) != 2 or len(scales) != 2:
        return list(_BITS)  # the decoder refuses the shapes
    zeros, index = known.parts.get("zeros"), known.parts.get("g_idx")
    return [
        bits
        for bits in _BITS
        if zeros is None or zeros.shape[-1:] == (-(-codes[1] * bits // 32),)
        if index is None or codes[0] == -(-index.elements * bits // 32)
        if index is not None or zeros is not None or codes[0] * 32 % bits == 0
    ]


def _zeros(known: Known, bits: int, form: str) -> str:
    from ckptkit.values.dequantize.model import UnknownFormError

    if "zeros" not in known.parts:
        return "symmetric"
    if known.sections and _format(known, "quant_method") in ("", "gptq", "marlin"):
        return _ZEROS.get(form, "v1")  # as GPTQModel reads a configuration without a format
    packing = _format(known, "packing_format") if _is_auto_round(known) else ""
    if packing in _PACKING_FORMATS:
        return _PACKING_FORMATS[packing]
    # Nothing says whether 1 was subtracted. The middle of the range is the zero point of all symmetric codes.
    middle = 1 << bits - 1
    data = known.read("zeros")
    if len(data) * 8 // bits and any(data == _filled(code, bits, len(data)) for code in (middle, middle - 1)):
        return "symmetric"
    if known.sections:
        method = (
            f"AutoRound (packing_format {packing or 'missing'})"
            if _is_auto_round(known)
            else f"the method {_format(known, 'quant_method')}"
        )
        raise UnknownFormError(f"with zero points of {method} that are not symmetric")
    raise UnknownFormError("without a configuration that says what its zero points mean", _WRITE_CONFIGURATION)


def _filled(code: int, bits: int, nbytes: int) -> bytes:
    """Return bytes that are full of one code."""
    run = sum(code << bits * place for place in range(8)).to_bytes(bits, "little")
    return (run * (nbytes // bits + 1))[:nbytes]


def _is_auto_round(known: Known) -> bool:
    return "auto-round" in _format(known, "quant_method")


def of_awq(known: Known) -> Mapping[str, Setting]:
    """Return nothing. Raises ``UnknownFormError`` for the layouts of other kernels than GEMM."""
    from ckptkit.values.dequantize.model import UnknownFormError

    form = _format(known, "version", "checkpoint_format", "format")
    if form not in _AWQ_LAYOUTS and not _is_auto_round(known):
        raise UnknownFormError(f"in the layout {form}")
    codes, scales = known.parts["codes"], known.parts["scales"]
    if codes.dtype == "I16" or "zeros" not in known.parts:
        raise UnknownFormError("in the layout gemv_fast")
    if codes.shape[0] == scales.shape[0] and codes.shape[1] * 8 != scales.shape[1]:
        raise UnknownFormError("in the layout gemv")
    return {}
