"""Casts of numbers to another dtype, with the rounding of torch; the bits of a NaN after a cast are not promised.

Where torch rounds twice, through F32, the casts here do too. A number of F8_E4M3 that is too large becomes 448, as in
newer versions of torch. A number that an integer dtype cannot hold becomes another one, which C leaves undefined.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptkit.core.dtypes import DTYPES, dtype_code, is_float
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.core.torch_types import DType
from ckptkit.errors import PlanError
from ckptkit.values.arrays import array_of, bits_dtype, numpy_dtype, real_code
from ckptkit.values.float_formats import FLOAT_FORMATS
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["are_finite", "cast_bytes", "dtype_of", "float_dtype"]

Array: TypeAlias = "npt.NDArray[Any]"
# Casts the bits of the first array into the second; the workers have scratch buffers for as many numbers.
_Kernel: TypeAlias = Callable[[Array, Array, Workers], None]

_OF_NUMPY = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F32", "F64"})
# The float32 numbers that F16 holds as normal numbers without an overflow, by their bits without the sign.
_F16_LOWEST, _F16_END = 0x38800000, 0x477FF000
_SMALLEST = 5e-324  # 0 where a processor takes subnormal numbers for 0, as ``torch.set_flush_denormal`` has it do
_OTHER_NAMES = {"half": "F16", "float": "F32", "double": "F64"}  # torch's other names


def float_dtype(dtype: str | DType) -> str:
    """Return the code of a floating-point dtype, given its code, torch's name, or the torch dtype.

    Raises ``PlanError`` for any other dtype and for one that torch cannot cast to.
    """
    name = str(dtype)  # of a torch dtype: torch.bfloat16
    short = name.removeprefix("torch.").lower()
    code = dtype_code(name)
    floats = [known for known in DTYPES if is_float(known) and known in CASTABLE]
    if code is None:
        near = _OTHER_NAMES.get(short) or re.sub(r"^(fp|float_?)(?=\d)", "f", short).upper()
        hint = f"did you mean {near}?" if near in floats else f"the dtypes are {', '.join(floats)}"
        raise PlanError(f"unknown dtype {quoted(name)}", hint=hint)
    if code not in floats:
        raise PlanError(
            f"{code} is not a dtype that floating-point tensors can be cast to",
            hint=f"the dtypes are {', '.join(floats)}",
        )
    return code


def dtype_of(code: str) -> np.dtype[Any]:
    """Return the numpy dtype of a castable code that is not complex."""
    dtype = numpy_dtype(code)
    assert dtype is not None  # noqa: S101 - every castable dtype has one, or is complex
    return dtype


def cast_bytes(data: memoryview, found: str, out: str, workers: Workers, buffer: str = "cast") -> memoryview:
    """Return the elements in ``data`` after a cast from the dtype ``found`` to ``out``, as ``Tensor.to`` casts them.

    The result is in the buffer of this thread with the name ``buffer``. Both dtypes must be castable. A complex number
    loses its imaginary part where ``out`` is not complex; of BOOL, it is True if one of its parts is not zero.
    """
    import numpy as np

    old, new = real_code(found), real_code(out)
    numbers: Array = np.frombuffer(data, bits_dtype(old))
    if out == "BOOL" and DTYPES[found].parts == 2:
        marks = workers.buffer("parts", bits_dtype(out), len(numbers))
        with np.errstate(all="ignore"):
            _kernel(old, out)(numbers, marks, workers)
        either: Array = workers.buffer(buffer, bits_dtype(out), len(numbers) // 2)
        np.bitwise_or(marks[::2], marks[1::2], out=either)
        return either.view(np.uint8).data
    if DTYPES[found].parts > DTYPES[out].parts:
        numbers = np.ascontiguousarray(numbers[::2])
    result = workers.buffer(buffer, bits_dtype(new), len(data) * 8 // DTYPES[found].bits * DTYPES[out].parts)
    target = result
    if DTYPES[out].parts > DTYPES[found].parts:
        result[1::2] = 0
        target = workers.buffer("real", bits_dtype(new), len(numbers))
    with np.errstate(all="ignore"):
        _kernel(old, new)(numbers, target, workers)
    if target is not result:
        result[::2] = target
    return result.view(np.uint8).data


@functools.cache
def _kernel(found: str, out: str) -> _Kernel:
    """Return the function that casts bits of one real dtype to bits of another."""
    if found == out:
        return _copy
    if (found, out) == ("BF16", "F32"):
        return _widen_bfloat16
    if found in FLOAT_FORMATS and DTYPES[found].bits <= 16 and out == "F32":
        return _widen(found)
    if found in _OF_NUMPY and out in _OF_NUMPY and found != "BOOL":
        # Else numbers out of range would become others where numpy uses vectors than where it does not.
        through = ("I64",) if found in ("F32", "F64") and out in ("U8", "U32") else ()
        return functools.partial(_cast_in_numpy, tuple(dtype_of(code) for code in (found, *through, out)))
    if DTYPES[found].bits <= 16:
        return functools.partial(_look_up, _table(found, out))
    narrow = {"F16": _round_to_float16, "BF16": _round_to_bfloat16}.get(out)
    if narrow is None:
        narrow = functools.partial(_round_to_odd_and_look_up, _table("BF16", out))
    return narrow if found == "F32" else functools.partial(_through_float32, dtype_of(found), narrow)


def _copy(bits: Array, out: Array, _: Workers) -> None:
    out[:] = bits


def _widen_bfloat16(bits: Array, out: Array, _: Workers) -> None:
    import numpy as np

    np.copyto(out, bits)
    np.left_shift(out, 16, out=out)


def are_finite(bits: Array, code: str) -> bool:
    """Return whether none of these bits of floats of 8 or 16 bits, which have a sign, are NaN or infinite."""
    import numpy as np

    layout = FLOAT_FORMATS[code]
    signed = bits.view(np.int8 if DTYPES[code].bits == 8 else np.int16)
    if not layout.has_negative_zero:
        return bool(signed.min(initial=0) > -layout.sign)
    return bool(signed.max(initial=0) <= layout.largest and bits.max(initial=0) <= layout.largest | layout.sign)


@functools.cache
def _widen(found: str) -> _Kernel:
    """Return the function that casts a float of 8 or 16 bits, which has a sign, to F32."""
    import numpy as np

    layout = FLOAT_FORMATS[found]
    up = FLOAT_FORMATS["F32"].mantissa - layout.mantissa
    mask = np.uint32(0x80000000 | layout.sign - 1 << up)
    factor = np.float32(2.0 ** (127 - layout.bias))
    signed = np.dtype(f"i{DTYPES[found].bits // 8}")

    def widen(bits: Array, out: Array, workers: Workers) -> None:
        """Move the bits to their places in F32, and multiply by the power of two between the biases: that is exact.

        Subnormal numbers are subnormal before the product. Threads that take those for 0 look them up.
        """
        if not _SMALLEST + _SMALLEST or not are_finite(bits, found):
            _widen_others(found, bits, out, workers)
            return
        wide = out.view(np.int32)
        np.copyto(wide, bits.view(signed))  # repeats the sign in the upper bits
        np.left_shift(wide, up, out=wide)
        np.bitwise_and(out, mask, out=out)
        np.multiply(out.view(np.float32), factor, out=out.view(np.float32))

    return widen


def _widen_others(found: str, bits: Array, out: Array, workers: Workers) -> None:
    """Cast any numbers to F32, also NaN and inf."""
    import numpy as np

    if found == "F16":
        np.copyto(out.view(np.float32), bits.view(np.float16))
    else:
        _look_up(_table(found, "F32"), bits, out, workers)


def _cast_in_numpy(dtypes: Sequence[np.dtype[Any]], bits: Array, out: Array, workers: Workers) -> None:
    import numpy as np

    found, *through, last = dtypes
    numbers = bits.view(found)
    for dtype in through:
        between = workers.buffer("between", dtype, len(bits))
        np.copyto(between, numbers, casting="unsafe")
        numbers = between
    np.copyto(out.view(last), numbers, casting="unsafe")


def _look_up(table: Array, bits: Array, out: Array, workers: Workers) -> None:
    import numpy as np

    indexes = workers.buffer("indexes", np.intp, len(bits))
    np.copyto(indexes, bits)
    table.take(indexes, out=out, mode="clip")  # any other mode copies the output


def _through_float32(found: np.dtype[Any], narrow: _Kernel, bits: Array, out: Array, workers: Workers) -> None:
    import numpy as np

    wide = workers.buffer("float32", np.float32, len(bits))
    np.copyto(wide, bits.view(found), casting="unsafe")
    narrow(wide.view(np.uint32), out, workers)


def _round_to_bfloat16(bits: Array, out: Array, workers: Workers) -> None:
    """Round to the nearest by adding almost half of the last place, and all of the half where the last bit is odd."""
    import numpy as np

    rounded = workers.buffer("rounded", np.uint32, len(bits))
    np.right_shift(bits, 16, out=rounded)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(out, rounded, casting="unsafe")
    numbers = bits.view(np.float32)
    if np.isnan(numbers.max(initial=-np.inf)):  # the sum makes inf or 0 of some NaNs
        is_nan = workers.buffer("marks", np.bool_, len(bits))
        np.not_equal(numbers, numbers, out=is_nan)
        out[is_nan] = 0x7FC0


def _round_to_float16(bits: Array, out: Array, workers: Workers) -> None:
    """Round as for BF16 where the result is a normal number, which has another bias; numpy casts the other numbers."""
    import numpy as np

    size, sign = workers.buffer("rounded", np.uint32, len(bits)), workers.buffer("sign", np.uint32, len(bits))
    sums = workers.buffer("sums", np.uint32, len(bits))
    np.bitwise_and(bits, 0x7FFFFFFF, out=size)
    np.right_shift(size, 13, out=sums)
    np.bitwise_and(sums, 1, out=sums)
    np.add(sums, size, out=sums)
    np.add(sums, (0xFFF - (112 << 23)) & 0xFFFFFFFF, out=sums)
    np.right_shift(sums, 13, out=sums)
    np.right_shift(bits, 16, out=sign)
    np.bitwise_and(sign, 0x8000, out=sign)
    np.bitwise_or(sums, sign, out=sums)
    np.copyto(out, sums, casting="unsafe")
    others = workers.buffer("marks", np.bool_, len(bits))
    np.subtract(size, _F16_LOWEST, out=size)  # smaller numbers wrap around, and are then larger than all others
    np.greater_equal(size, _F16_END - _F16_LOWEST, out=others)
    at = np.flatnonzero(others)
    if len(at):
        out[at] = bits[at].view(np.float32).astype(np.float16).view(np.uint16)


def _round_to_odd_and_look_up(table: Array, bits: Array, out: Array, workers: Workers) -> None:
    """Look up the upper half of the bits of float32; its last bit is set if a bit of the lower half is.

    Such a number is on the same side of each limit between two numbers of 8 bits as the whole number.
    """
    import numpy as np

    low, odd = workers.buffer("rounded", np.uint32, len(bits)), workers.buffer("marks", np.bool_, len(bits))
    np.bitwise_and(bits, 0xFFFF, out=low)
    np.not_equal(low, 0, out=odd)
    np.right_shift(bits, 16, out=low)
    indexes = workers.buffer("indexes", np.intp, len(bits))
    np.bitwise_or(low, odd, out=indexes, casting="unsafe")
    table.take(indexes, out=out, mode="clip")


@functools.cache
def _table(found: str, out: str) -> Array:
    """Return the bits after the cast of every number of a dtype of 8 or 16 bits, by the bits before it."""
    import numpy as np

    patterns = np.arange(1 << DTYPES[found].bits, dtype=bits_dtype(found))
    with np.errstate(all="ignore"):
        if found == "BOOL":
            numbers: Array = (patterns != 0).astype(np.float32)
        elif found == "F8_E8M0":
            numbers = np.ldexp(np.float32(1), patterns.astype(np.int32) - 127)
            numbers[0xFF] = np.nan
        else:
            numbers = array_of(patterns.view(np.uint8).data, found).astype(np.float32)
        made = _rounded_by_definition(numbers, out)
    made.flags.writeable = False
    return made


def _rounded_by_definition(numbers: Array, out: str) -> Array:
    """Return the bits of float32 numbers after a cast, slowly."""
    import numpy as np

    if out == "F8_E8M0":  # torch ignores the sign, and makes the smallest number of 0
        bits = numbers.view(np.uint32) & np.uint32(0x7FFFFFFF)
        exponents = bits >> np.uint32(23)
        half, rest = bits >> np.uint32(22) & np.uint32(1), bits & np.uint32(0x3FFFFF)
        up = half & ((rest != 0) | (exponents != 0))
        return np.where(exponents == 0xFF, np.uint32(0xFF), exponents + up).astype(np.uint8)
    if out == "F8_E4M3":
        numbers = np.clip(numbers, -448, 448)
    return numbers.astype(dtype_of(out)).view(bits_dtype(out))
