"""The operation that makes codes and scales of a weight: 8-bit floats, or integers of 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckptkit.core.torch_bridge import code_of, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.operation import ARITHMETIC, Int, Operation, Rounded, Shape, Text, printable_code

__all__ = ["Quantize"]

_DTYPES = {"fp8": "F8_E4M3", "int8": "I8"}
_LARGEST = {"fp8": 448.0, "int8": 127.0}
_SCALES = ("tensor", "row", "block")


@dataclass(frozen=True, slots=True)
class Quantize(Operation):
    """Make codes and scales of a weight; the outputs are the codes, and scales that multiply them.

    ``form`` is ``"fp8"`` (E4M3) or ``"int8"``. ``scales`` says how many there are: one for the ``tensor``, one for each
    ``row``, or one for each ``block`` of ``block`` rows and columns, of which the last can be smaller. Int8 has one for
    each row. A scale maps the largest magnitude to the largest code. So a number comes back within half the distance of
    two neighbouring codes. Scales are F32; those of tensors and rows are BF16 where the weight is, as
    compressed-tensors keeps them.
    """

    form: Text
    scales: Text = "row"
    block: Int = 128
    name: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        """Raise ``RuleError`` for a form that is not known."""
        if self.form not in _DTYPES:
            raise self.refusal(f"form is {self.form!r}", f"the forms are {', '.join(_DTYPES)}")
        if self.scales not in _SCALES or (self.form == "int8" and self.scales != "row"):
            known = "row" if self.form == "int8" else ", ".join(_SCALES)
            raise self.refusal(f"scales is {self.scales!r}", f"{self.form} has scales for: {known}")
        if self.block < 1:
            raise self.refusal(f"block is {self.block}")

    @property
    def lossy(self) -> bool:
        """Whether bits are lost; rounding loses some."""
        return True

    @property
    def outputs(self) -> int:
        """Two: codes and scales."""
        return 2

    def divides(self, shape: Shape) -> bool:
        """Return whether all blocks of a weight have one size, as transformers wants them; other groups always have."""
        return self.scales != "block" or all(size <= self.block or size % self.block == 0 for size in shape[-2:])

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of codes and scales; raise ``RuleError`` for a tensor without rows."""
        shape = self.only_shape(inputs)
        if len(shape) < 2:
            raise self.refusal(f"takes a matrix, or several in one tensor, not {list(shape)}")
        if self.scales == "tensor":
            return shape, (1,)
        if self.scales == "row":
            return shape, (*shape[:-1], 1)
        return shape, (*shape[:-2], *(-(-size // self.block) for size in shape[-2:]))

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtypes of codes and scales; raise ``RuleError`` for any input but floats of 16 bits or more."""
        if inputs[0] not in ARITHMETIC:
            raise self.refusal(f"takes {', '.join(sorted(ARITHMETIC))}, not {printable_code(inputs[0])}")
        return _DTYPES[self.form], self._scales_dtype(inputs[0])

    def _scales_dtype(self, found: str) -> str:
        """Return BF16 for weights of BF16 where compressed-tensors reads the codes: it gives scales that dtype."""
        return "BF16" if found == "BF16" and self.scales != "block" else "F32"

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Divide by the scales in F32, and round to the nearest code; no code is out of range."""
        import torch

        del rounded  # no finite number becomes inf
        numbers = tensors[0].to(torch.float32)
        largest = self._largest(numbers)
        if not bool(torch.isfinite(largest).all()):
            raise self.refusal("the weight has values that are NaN or infinite")
        scales = torch.where(largest == 0, 1.0, largest / _LARGEST[self.form])
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
        scales = scales.to(torch_dtype(self._scales_dtype(code_of(tensors[0].dtype))))
        spread = self._spread(scales.to(torch.float32), numbers.shape)
        parts = (numbers / spread).clamp(-_LARGEST[self.form], _LARGEST[self.form])
        codes = parts.round().to(torch.int8) if self.form == "int8" else parts.to(torch.float8_e4m3fn)
        return codes.contiguous(), scales.contiguous()

    def _largest(self, numbers: Tensor) -> Tensor:
        """Return the largest magnitude of each group, in the shape of the scales."""
        from torch.nn import functional

        if not numbers.numel():
            return numbers.new_zeros(self.shapes([tuple(numbers.shape)])[1])
        sizes = numbers.abs()
        if self.scales == "tensor":
            return sizes.amax().reshape(1)
        if self.scales == "row":
            return sizes.amax(-1, keepdim=True)
        rows, columns = (-size % self.block for size in sizes.shape[-2:])
        padded = functional.pad(sizes, (0, columns, 0, rows))
        high, wide = (size // self.block for size in padded.shape[-2:])
        return padded.reshape(*sizes.shape[:-2], high, self.block, wide, self.block).amax((-3, -1))

    def _spread(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the scale of each number, or what broadcasts to it."""
        if self.scales != "block":
            return scales
        spread = scales.repeat_interleave(self.block, -2)[..., : shape[-2], :]
        return spread.repeat_interleave(self.block, -1)[..., : shape[-1]]
