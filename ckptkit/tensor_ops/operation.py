"""What every tensor operation is: resolved parameters, the shapes it makes, and tensors in, tensors out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from ckptkit.core.checkpoint import DTYPES
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.errors import RuleError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ARITHMETIC",
    "Arithmetic",
    "Moving",
    "Operation",
    "Shape",
    "code_of",
    "elements",
    "printable_code",
    "times",
    "torch_dtype",
    "unflatten",
    "working_dtype",
]

Shape = tuple[int, ...]
ARITHMETIC = frozenset({"F16", "BF16", "F32", "F64"})


def times(shape: Sequence[int]) -> str:
    """Return sizes as messages give them: ``14 x 14``."""
    return " x ".join(map(str, shape))


class Operation(ABC):
    """Some tensors made of others. A subclass is a frozen dataclass of plain values, as a rule file holds them.

    ``shapes`` and ``dtypes`` tell, without torch and before a byte is read, what ``apply`` will make, and raise
    ``RuleError`` where the inputs do not fit.
    """

    __slots__ = ()
    name: ClassVar[str]

    @property
    def lossy(self) -> bool:
        """Whether the inputs cannot be had back bit by bit."""
        return False

    @property
    def outputs(self) -> int:
        """Number of tensors that it makes."""
        return 1

    @abstractmethod
    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of the outputs; raises ``RuleError`` saying what does not fit, and why."""

    @abstractmethod
    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtypes of the outputs as safetensors codes; raises ``RuleError`` where the inputs' do not fit."""

    @abstractmethod
    def make(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the outputs for inputs that have been checked."""

    def inverse(self, inputs: Sequence[Shape]) -> Operation | None:
        """Return the operation that undoes this one on tensors that had these shapes, or None where it is lossy."""
        del inputs
        return None

    def moving(self) -> Operation | None:
        """Return what does the same to other numbers of the elements, such as moments; None where it computes."""
        return None

    def apply(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the outputs, contiguous, maybe in the inputs' memory; raises ``RuleError`` where they do not fit."""
        self.shapes([tuple(tensor.shape) for tensor in tensors])
        self.dtypes([code_of(tensor) for tensor in tensors])
        return self.make([tensor.detach().resolve_conj().resolve_neg() for tensor in tensors])

    def params(self) -> dict[str, Any]:
        """Return the parameters as JSON holds them; ``parse_operation({op.name: op.params()})`` equals ``op``."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values if value is not None}

    def __str__(self) -> str:
        """Show the operation as a plan prints it: ``split(dim=0, sizes=[4, 2, 2])``."""
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.params().items())})"

    def refusal(self, reason: str, hint: str | None = None) -> RuleError:
        """Return the error that this operation raises."""
        return RuleError(f"{self.name}: {reason}", hint=hint)

    def only(self, inputs: Sequence[Shape]) -> Shape:
        """Return the one shape that goes in."""
        if len(inputs) != 1:
            raise self.refusal(f"takes one tensor, and there are {len(inputs)}")
        return inputs[0]

    def axis(self, dim: int, shape: Shape) -> int:
        """Return a dim counted from the front; a negative one counts from the end, as in torch."""
        if not -len(shape) <= dim < len(shape):
            raise self.refusal(f"{list(shape)} has no dim {dim}")
        return dim % len(shape)


class Moving(Operation):
    """An operation that only moves elements: any dtype, every bit as it was."""

    __slots__ = ()

    def moving(self) -> Operation:
        """Return itself: it moves whatever belongs to an element."""
        return self

    @abstractmethod
    def move(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the outputs for inputs whose elements are integers of the dtype's width."""

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the inputs' dtype for every output; raises ``RuleError`` where they differ or come in packs."""
        different = sorted(set(inputs))
        if len(different) != 1:
            raise self.refusal(f"the tensors differ in dtype ({', '.join(different)})", "cast them first")
        if different[0] not in CASTABLE:
            raise self.refusal(f"elements of {printable_code(different[0])} cannot be moved one by one")
        return (different[0],) * self.outputs

    def make(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Move the elements as integers: no kernel is missing for those, and none changes the bits of a NaN."""
        import torch

        dtype = tensors[0].dtype
        # torch has no integers of 128 bits, and copies complex numbers as they are.
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(dtype.itemsize, dtype)
        made = self.move([tensor.view(width) for tensor in tensors])
        # Contiguous already here: a later copy of strided booleans would make every odd one a 1.
        return tuple(tensor.contiguous().view(dtype) for tensor in made)


class Arithmetic(Operation):
    """An operation that computes in F32 (in F64 where a tensor is), and rounds once to what ``dtypes`` says."""

    __slots__ = ()

    @property
    def lossy(self) -> bool:
        """Rounding cannot be undone."""
        return True

    @abstractmethod
    def compute(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the outputs for inputs of one wide dtype, which are left as they are."""

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the first dtype for every output; raises ``RuleError`` for what is no float of 16 bits or more."""
        for code in inputs:
            if code not in ARITHMETIC:
                raise self.refusal(
                    f"computes with {', '.join(sorted(ARITHMETIC))}, not with {printable_code(code)}", "cast it first"
                )
        return (inputs[0],) * self.outputs

    def make(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Widen, compute, round."""
        wide = working_dtype(tensors)
        made = self.compute([tensor.to(wide) for tensor in tensors])
        codes = self.dtypes([code_of(tensor) for tensor in tensors])
        return tuple(tensor.to(torch_dtype(code)).contiguous() for tensor, code in zip(made, codes, strict=True))


def printable_code(code: str) -> str:
    """Return a dtype code for a message; one that a file made up is quoted."""
    return code if code in DTYPES else quoted(code)


def working_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the dtype to compute in: float64 where one of the tensors is, else float32."""
    import torch

    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def code_of(tensor: torch.Tensor) -> str:
    """Return the safetensors code of a tensor's dtype; torch's name in capitals where there is none."""
    name = str(tensor.dtype).removeprefix("torch.")
    return next((dtype.code for dtype in DTYPES.values() if dtype.torch_name == name), name.upper())


def torch_dtype(code: str) -> torch.dtype:
    """Return torch's dtype for a code."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[code].torch_name)
    return dtype


def elements(shape: Shape) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)


def unflatten(tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    """Return the tensor with one dim, counted from the front, as several."""
    return tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])
