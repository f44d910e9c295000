"""The base classes of tensor operations, and their parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, TypeVar, get_args, get_type_hints

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.text import printable, quoted
from ckptkit.core.torch_bridge import CASTABLE, code_of, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.expressions import evaluate_expression

if TYPE_CHECKING:
    import torch

__all__ = [
    "ARITHMETIC",
    "Arithmetic",
    "Flag",
    "Int",
    "Ints",
    "Moving",
    "Number",
    "NumberOrText",
    "Operation",
    "Pairs",
    "Rounded",
    "Shape",
    "Table",
    "Text",
    "Texts",
    "grid_text",
    "printable_code",
    "read_parameters",
    "unflatten",
    "working_dtype",
]


Shape: TypeAlias = tuple[int, ...]
PairValue: TypeAlias = int | float | str | bool | tuple[int, ...]
Pairs: TypeAlias = tuple[tuple[str, PairValue], ...]  # a table that can be compared and hashed
# Called with the inputs of an operation, and with an output before and after it is rounded to its dtype.
Rounded: TypeAlias = Callable[[Sequence[Tensor], Tensor, Tensor], None]
ARITHMETIC = frozenset({"F16", "BF16", "F32", "F64"})


def grid_text(shape: Sequence[int]) -> str:
    """Return sizes in the form of messages: ``14 x 14``."""
    return " x ".join(map(str, shape))


class Operation(ABC):
    """An operation that makes output tensors from input tensors.

    A subclass is a frozen dataclass; its fields are parameters with values that a rule file can hold. ``shapes`` and
    ``dtypes`` describe the outputs before any tensor is read, without torch. They raise ``RuleError`` for inputs that
    the operation does not accept.
    """

    __slots__ = ()
    name: ClassVar[str]

    @property
    def lossy(self) -> bool:
        """Whether the inputs cannot be restored from the outputs bit by bit."""
        return False

    @property
    def outputs(self) -> int:
        """Number of output tensors."""
        return 1

    @abstractmethod
    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of the outputs; raise ``RuleError`` for shapes that the operation does not accept."""

    @abstractmethod
    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtype codes of the outputs; raise ``RuleError`` for dtypes that the operation does not accept."""

    @abstractmethod
    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Return the outputs for inputs that ``shapes`` and ``dtypes`` accepted."""

    def inverse(self, inputs: Sequence[Shape]) -> Operation | None:
        """Return the inverse operation for inputs of these shapes, or None where there is none."""
        del inputs
        return None

    def for_optimizer_state(self) -> Operation | None:
        """Return the operation for optimizer state with one value per element, or None where there is none."""
        return None

    def apply(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Return contiguous outputs, which may share the memory of the inputs.

        ``rounded`` is called for each output that is rounded to its dtype, or cast. Raises ``RuleError`` for inputs
        that the operation does not accept.
        """
        self.shapes([tuple(tensor.shape) for tensor in tensors])
        self.dtypes([code_of(tensor.dtype) for tensor in tensors])
        return self.make([tensor.detach().resolve_conj().resolve_neg() for tensor in tensors], rounded)

    def params(self) -> dict[str, object]:
        """Return the parameters as JSON values; ``parse_operation({op.name: op.params()})`` equals ``op``."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values if value is not None}

    def __str__(self) -> str:
        """Return the operation as plans print it: ``split(dim=0, sizes=[4, 2, 2])``."""
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.params().items())})"

    def refusal(self, reason: str, hint: str | None = None) -> RuleError:
        """Return a ``RuleError`` that names the operation."""
        return RuleError(f"{self.name}: {reason}", hint=hint)

    def only_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the only input; raise ``RuleError`` for another number of inputs."""
        if len(inputs) != 1:
            raise self.refusal(f"takes one tensor, not {len(inputs)}")
        return inputs[0]

    def axis(self, dim: int, shape: Shape) -> int:
        """Return a dim counted from the front; a negative dim counts from the end, as in torch."""
        if not -len(shape) <= dim < len(shape):
            raise self.refusal(f"{list(shape)} has no dim {dim}")
        return dim % len(shape)


class Moving(Operation):
    """An operation that only moves elements, of any dtype, and keeps every bit."""

    __slots__ = ()

    def for_optimizer_state(self) -> Operation:
        """Return the operation itself, which moves any value that belongs to an element."""
        return self

    @abstractmethod
    def move(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the outputs for inputs that are viewed as integers of the same width."""

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtype of the inputs for every output; raise ``RuleError`` where dtypes differ or pack elements."""
        codes = sorted(set(inputs))
        if len(codes) != 1:
            raise self.refusal(f"the tensors differ in dtype ({', '.join(codes)})", "cast them first")
        if codes[0] not in CASTABLE:
            raise self.refusal(f"elements of {printable_code(codes[0])} cannot be moved one by one")
        return (codes[0],) * self.outputs

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Move the elements as integers: torch has every kernel for integers, and none changes the bits of a NaN."""
        import torch

        del rounded
        dtype = tensors[0].dtype
        # torch has no integers of 128 bits, but its copies of complex numbers keep every bit.
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(dtype.itemsize, dtype)
        outputs = self.move([tensor.view(width) for tensor in tensors])
        # A copy of strided booleans would change values above 1, so the copy is made before the view.
        return tuple(tensor.contiguous().view(dtype) for tensor in outputs)


class Arithmetic(Operation):
    """An operation that computes in F32, or in F64 where an input is F64, and rounds once to the output dtypes."""

    __slots__ = ()

    @property
    def lossy(self) -> bool:
        """Whether bits are lost; rounding loses some."""
        return True

    @abstractmethod
    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the outputs for inputs that were cast to one dtype; the inputs must not be changed."""

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the first dtype for every output; raise ``RuleError`` for any but floats of 16 bits or more."""
        for code in inputs:
            if code not in ARITHMETIC:
                raise self.refusal(
                    f"computes with {', '.join(sorted(ARITHMETIC))}, not with {printable_code(code)}", "cast it first"
                )
        return (inputs[0],) * self.outputs

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Cast the inputs, compute, and round."""
        wide = working_dtype(tensors)
        outputs = self.compute([tensor.to(wide) for tensor in tensors])
        codes = self.dtypes([code_of(tensor.dtype) for tensor in tensors])
        made = tuple(tensor.to(torch_dtype(code)).contiguous() for tensor, code in zip(outputs, codes, strict=True))
        if rounded is not None:
            for before, after in zip(outputs, made, strict=True):
                rounded(tensors, before, after)
        return made


def printable_code(code: str) -> str:
    """Return a dtype code for a message; an unknown code, which is from a file, is quoted."""
    return code if code in DTYPES else quoted(code)


def working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return float64 where one of the tensors has that dtype, else float32."""
    import torch

    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def unflatten(tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Return the tensor with one dim, counted from the front, divided into dims of these sizes."""
    return tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


Variables: TypeAlias = Mapping[str, int]
_Op = TypeVar("_Op", bound=Operation)


def _int(value: object, variables: Variables) -> int:
    if isinstance(value, str):
        return evaluate_expression(value, variables)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RuleError(f"{_shown(value)} is not an integer")
    if not -(2**63) <= value < 2**63:
        raise RuleError("an integer must not have more than 64 bits")
    return value


def _ints(value: object, variables: Variables) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise RuleError(f"{_shown(value)} is not a list of integers")
    return tuple(_int(item, variables) for item in value)


def _number(value: object, _: Variables) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(f"{_shown(value)} is not a number")
    if isinstance(value, int) and value.bit_length() > 1000:
        raise RuleError("the integer is too large for a computation")
    if not math.isfinite(value):
        raise RuleError(f"{value} is not a finite number")
    return value


def _text(value: object, _: Variables) -> str:
    if not isinstance(value, str):
        raise RuleError(f"{_shown(value)} is not a string")
    return value


def _number_or_text(value: object, variables: Variables) -> float | str:
    return value if isinstance(value, str) else _number(value, variables)


def _flag(value: object, _: Variables) -> bool:
    if not isinstance(value, bool):
        raise RuleError(f"{_shown(value)} is not true or false")
    return value


def _texts(value: object, _: Variables) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise RuleError(f"{_shown(value)} is not a list of strings")
    return tuple(value)


def _table(value: object, _: Variables) -> Pairs:
    if not isinstance(value, Mapping):
        raise RuleError(f"{_shown(value)} is not a table")
    pairs: list[tuple[str, PairValue]] = []
    for name, item in value.items():
        if isinstance(item, list | tuple) and all(type(part) in (int, float) for part in item):
            pairs.append((str(name), tuple(item)))
        elif isinstance(item, bool | int | float | str):
            pairs.append((str(name), item))
        else:
            raise RuleError(f"{quoted(str(name))} is {_shown(item)}, and not a number, a string or a list of numbers")
    return tuple(pairs)


Int = Annotated[int, _int]
Ints = Annotated[tuple[int, ...], _ints]
Number = Annotated[float, _number]
Text = Annotated[str, _text]
NumberOrText = Annotated[float | str, _number_or_text]
Flag = Annotated[bool, _flag]
Texts = Annotated[tuple[str, ...], _texts]
Table = Annotated[Pairs, _table]


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else printable(repr(value))


def read_parameters(kind: type[_Op], table: Mapping[str, object], variables: Variables) -> _Op:
    """Return the operation with these parameters; raise ``RuleError`` for a wrong, missing or unknown parameter."""
    readers = _readers(kind)
    names = ", ".join(readers) if readers else "none"
    for name in table:
        if name not in readers:
            raise RuleError(f"{kind.name} has no parameter {quoted(str(name))}", hint=f"its parameters: {names}")
    values = {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in table:
            try:
                values[item.name] = readers[item.name](table[item.name], variables)
            except RuleError as error:
                raise RuleError(f"{kind.name}: {item.name}: {error.reason}", hint=error.hint) from None
        elif item.default is MISSING:
            raise RuleError(f"{kind.name} needs {item.name}", hint=f"its parameters: {names}")
    return kind(**values)


def _readers(kind: type[Operation]) -> dict[str, Callable[[object, Variables], object]]:
    """Return the function that reads each parameter, which is the metadata of its annotation."""
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: _reader(hints[item.name]) for item in fields(kind)}  # type: ignore[arg-type]


def _reader(hint: Any) -> Callable[[object, Variables], object]:
    if hasattr(hint, "__metadata__"):
        reader: Callable[[object, Variables], object] = hint.__metadata__[0]
        return reader
    return next(_reader(arm) for arm in get_args(hint) if arm is not type(None))
