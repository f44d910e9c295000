"""One tensor, its values changed: cast, scale, add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.core.checkpoint import DTYPES
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.tensor_ops.operation import Arithmetic, Operation, Shape, printable_code, torch_dtype
from ckptkit.tensor_ops.parameters import Number, Text

if TYPE_CHECKING:
    import torch

__all__ = ["Add", "Cast", "Scale"]


@dataclass(frozen=True, slots=True)
class Cast(Operation):
    """Another dtype, by its safetensors code or torch's name, as ``Tensor.to`` makes it."""

    dtype: Text
    name: ClassVar[str] = "cast"

    def __post_init__(self) -> None:
        """Take torch's name for its code; refuse what is no dtype to cast to."""
        wanted = self.dtype.removeprefix("torch.")
        found = [code for code in CASTABLE if code == wanted.upper() or DTYPES[code].torch_name == wanted]
        if not found:
            raise self.refusal(f"{quoted(self.dtype)} is no dtype to cast to", "for example F32, F16, BF16")
        object.__setattr__(self, "dtype", found[0])

    @property
    def lossy(self) -> bool:
        """A cast cannot be undone where the new dtype holds less, which shapes do not tell."""
        return True

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape as it is."""
        return (self.only(inputs),)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the new dtype; raises ``RuleError`` for what torch cannot cast, and for a lost imaginary part."""
        for code in inputs:
            if code not in CASTABLE:
                raise self.refusal(f"{printable_code(code)} cannot be cast to {self.dtype}")
            if DTYPES[code].parts > DTYPES[self.dtype].parts:
                raise self.refusal(f"{code} to {self.dtype} would lose the imaginary part")
        return (self.dtype,)

    def make(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Cast."""
        return (tensors[0].to(torch_dtype(self.dtype)).contiguous(),)


@dataclass(frozen=True, slots=True)
class Scale(Arithmetic):
    """Every element multiplied by a number."""

    factor: Number
    name: ClassVar[str] = "scale"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape as it is."""
        return (self.only(inputs),)

    def compute(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Multiply."""
        return [tensors[0] * self.factor]


@dataclass(frozen=True, slots=True)
class Add(Arithmetic):
    """A number added to every element: 1 for a norm that is stored around zero, -1 for the way back."""

    value: Number
    name: ClassVar[str] = "add"

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape as it is."""
        return (self.only(inputs),)

    def compute(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Add."""
        return [tensors[0] + self.value]
