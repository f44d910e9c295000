"""The operation that merges tensors of several inputs into one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, cast, get_args

from ckptkit.core.checkpoint import Payload, TensorInfo
from ckptkit.core.checkpoint.reading import torch_bytes
from ckptkit.core.dtypes import DTYPES, is_float
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import CASTABLE, TensorPayload, code_of, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import ArgumentError, RuleError
from ckptkit.plans.methods.model import MergedTensor, Method
from ckptkit.plans.methods.table import method_named
from ckptkit.tensor_ops.operation import Operation, Rounded, Shape, printable_code
from ckptkit.values.arrays import real_code
from ckptkit.values.merging.limits import narrow_limits
from ckptkit.values.merging.payload import MergedPayload, MergeInput, OnNonfinite
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    from ckptkit.core.cast_losses import CastLoss
    from ckptkit.values.merging.model import Facts, Merging

__all__ = ["Merge"]


@dataclass(frozen=True, slots=True)
class Merge(Operation):
    """Merge tensors of equal shapes with a method that has its numbers; one input of the operation is one source.

    Attributes:
        method: The method, with the numbers of this tensor.
        key: The key of the tensor in the output, which random masks depend on; tied keys have one merge.
        numbers: The number in its recipe, from 1, of each input but the base, which random masks depend on.
        has_base: Whether the first input is the base of the method.
        is_wide: Whether the arithmetic is in float64 for any dtypes.
        on_nonfinite: What happens where an input has a NaN or an infinity: ``error``, ``allow`` or ``base``.
    """

    method: Method
    key: str
    numbers: tuple[int, ...]
    has_base: bool = False
    is_wide: bool = False
    on_nonfinite: OnNonfinite = "error"
    _resolved: dict[object, Merging] = field(default_factory=dict, init=False, repr=False, compare=False)
    name: ClassVar[str] = "merge"

    def __post_init__(self) -> None:
        """Refuse a word for ``on_nonfinite`` that is not known."""
        if self.on_nonfinite not in get_args(OnNonfinite):
            raise self.refusal(f"on_nonfinite is {quoted(str(self.on_nonfinite))}", "error, allow or base")

    @property
    def lossy(self) -> bool:
        """Whether the inputs cannot be restored: they cannot."""
        return True

    @classmethod
    def parse(cls, table: Mapping[str, object]) -> Merge:
        """Return the operation of a plan file, as ``params`` gives it. Raises ``RuleError`` for any other table."""
        numbers, key, given = (table[name] for name in ("numbers", "key", "parameters"))
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise RuleError(f"{cls.name}: numbers is not a list of whole numbers")
        if not isinstance(key, str) or not isinstance(given, Mapping):
            raise RuleError(f"{cls.name}: needs a key and a table of parameters")
        has_base, on_nonfinite = table["has_base"] is True, cast("OnNonfinite", table["on_nonfinite"])
        try:
            method = method_named(str(table["method"])).of(len(numbers), given, has_base=has_base)
        except ArgumentError as error:
            raise RuleError(f"{cls.name}: {error.reason}", hint=error.hint) from None
        return cls(method, key, tuple(numbers), has_base, table["is_wide"] is True, on_nonfinite)

    def params(self) -> dict[str, object]:
        """Return the parameters as JSON values."""
        return {
            "method": self.method.name, "key": self.key, "numbers": list(self.numbers), "has_base": self.has_base,
            "is_wide": self.is_wide, "on_nonfinite": self.on_nonfinite, "parameters": self.method.given(),
        }  # fmt: skip

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the inputs; raise ``RuleError`` where shapes differ, or for a wrong number of inputs."""
        shapes = sorted(set(inputs))
        if len(shapes) != 1:
            raise self.refusal(f"the shapes differ: {', '.join(str(list(shape)) for shape in shapes)}")
        self.resolve(shapes[0], len(inputs))
        return (shapes[0],)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtype of the first input; raise ``RuleError`` for any but floating-point dtypes."""
        for code in inputs:
            if code not in CASTABLE or not (is_float(code) or DTYPES[code].parts == 2):
                raise self.refusal(f"computes with floating-point numbers, not with {printable_code(code)}")
        if len({DTYPES[code].parts for code in inputs}) != 1:
            raise self.refusal(f"real and complex tensors cannot be merged: {', '.join(map(printable_code, inputs))}")
        if DTYPES[inputs[0]].parts == 2 and not self.method.takes_complex:
            raise self.refusal(f"{self.method.name} takes no complex numbers", "linear takes them")
        return (inputs[0],)

    def resolve(self, shape: Shape, count: int, limits: tuple[float, ...] = ()) -> Merging:
        """Return the arithmetic for a tensor of this shape with so many sources; raise ``RuleError`` without one.

        ``limits`` are those of ``MergedTensor``. A step asks several times, and all but the first are quick.
        """
        found = self._resolved.get((shape, count, limits))
        if found is None:
            found = self._resolved[shape, count, limits] = self._resolve(shape, count, limits)
        return found

    def _resolve(self, shape: Shape, count: int, limits: tuple[float, ...]) -> Merging:
        inputs = count - self.has_base
        if len(self.numbers) != inputs:
            raise self.refusal(f"is made for {plural(len(self.numbers), 'input')}, not for {inputs}")
        try:
            self.method.check_inputs(inputs, has_base=self.has_base)
            return self.method.resolve(MergedTensor(self.key, shape, inputs, self.has_base, self.numbers, limits))
        except ArgumentError as error:
            raise self.refusal(error.reason, error.hint) from None

    def payload(
        self,
        inputs: Sequence[MergeInput],
        out: TensorInfo,
        losses: MutableMapping[str, CastLoss] | None = None,
        facts: MutableMapping[str, Facts] | None = None,
        workers: Workers | None = None,
        *,
        limits: tuple[float, ...] = (),
    ) -> MergedPayload:
        """Return the merged tensor, rounded once to the dtype of ``out``. ``limits`` are those of ``MergedTensor``."""
        is_wide = self.is_wide or any(real_code(one.info.dtype) == "F64" for one in inputs)
        working = "F64" if is_wide else "F32"
        merging = self.resolve(out.shape, len(inputs), limits if is_wide else narrow_limits(limits))
        return MergedPayload(merging, inputs, out, losses, facts, workers or Workers(), self.on_nonfinite, working)

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Merge tensors in memory."""
        infos = [TensorInfo(self.key, code_of(tensor.dtype), tuple(tensor.shape)) for tensor in tensors]
        payloads: list[Payload] = [TensorPayload(one, info.nbytes) for one, info in zip(tensors, infos, strict=True)]
        inputs = [
            MergeInput(f"input {number}", info, payload)
            for number, (info, payload) in enumerate(zip(infos, payloads, strict=True), 1)
        ]
        payload = self.payload(inputs, infos[0])
        made = torch_bytes(infos[0].nbytes, payload.readinto).view(torch_dtype(infos[0].dtype))
        made = made.reshape(infos[0].shape)
        if rounded is not None:
            rounded(tensors, made, made)
        return (made,)
