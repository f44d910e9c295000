"""The operation that makes one tensor of the base and of a patch, and compares it with its digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.checkpoint.payload import read_into
from ckptkit.core.checkpoint.reading import torch_bytes
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import TensorPayload, torch_dtype
from ckptkit.core.torch_types import Tensor
from ckptkit.digests.checked import CheckedPayload
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.plans.deltas.base import ResultTensor, other_base
from ckptkit.plans.plan.step import PATCH_OPERATION, Step
from ckptkit.tensor_ops.operation import Ints, Operation, Rounded, Shape, Text, read_parameters
from ckptkit.values.delta.payload import PatchedPayload
from ckptkit.values.workers import Workers

__all__ = ["KINDS", "Patched", "PatchedTensor", "patched_tensor", "results_of"]

KINDS: Final = ("equal", "changed", "whole")
_BYTES: Final = "U8"
_AGAIN: Final = "copy or download the patch again"


@dataclass(frozen=True, slots=True)
class Patched(Operation):
    """Make one tensor of the result of a patch, and refuse it unless it has its digest.

    An ``equal`` tensor is that of the base, the only input. A ``changed`` one is made of the tensor of the base, which
    may have another number of rows, and of packed bytes. A ``whole`` one is made of packed bytes alone.

    Attributes:
        kind: ``equal``, ``changed`` or ``whole``.
        dtype: The dtype of the result.
        shape: Its shape.
        digits: The SHA-256 of the result in hexadecimal, as ``digest`` hashes a tensor.
        base_name: What messages call the base that the patch was made from; it may be empty.
    """

    kind: Text
    dtype: Text
    shape: Ints
    digits: Text
    base_name: Text = ""
    name: ClassVar[str] = PATCH_OPERATION

    def __post_init__(self) -> None:
        """Refuse a kind that is not known."""
        if self.kind not in KINDS:
            raise self.refusal(f"kind is {quoted(self.kind)}", f"known: {', '.join(KINDS)}")

    @classmethod
    def parse(cls, table: Mapping[str, object]) -> Patched:
        """Return the operation of a plan file, as ``params`` gives it. Raises ``RuleError`` for any other table."""
        return read_parameters(cls, table, {})

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of the result; raise ``RuleError`` for another number of inputs, or another base."""
        if len(inputs) != 1 + (self.kind == "changed"):
            raise self.refusal(f"{self.kind} takes {1 + (self.kind == 'changed')} tensors, not {len(inputs)}")
        if self.kind == "equal" and inputs[0] != self.shape:
            raise self.refusal(f"the tensor of the base is {list(inputs[0])}, not {list(self.shape)}")
        return (self.shape,)

    def dtypes(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Return the dtype of the result; raise ``RuleError`` for another dtype of the base or of packed bytes."""
        wanted = {"equal": [self.dtype], "changed": [self.dtype, _BYTES], "whole": [_BYTES]}[self.kind]
        if list(inputs) != wanted:
            raise self.refusal(f"{self.kind} takes {' and '.join(wanted)}, not {' and '.join(map(quoted, inputs))}")
        return (self.dtype,)

    def source(
        self, inputs: Sequence[Payload], out: TensorInfo, workers: Workers, patched: PatchedTensor | None = None
    ) -> Payload:
        """Return the bytes of the result, which nothing has compared with the digest."""
        if self.kind == "equal":
            return inputs[0]
        base = inputs[0] if self.kind == "changed" else None
        return PatchedPayload(base, inputs[-1], out, workers, None if patched is None else patched.refusal)

    def make(self, tensors: Sequence[Tensor], rounded: Rounded | None = None) -> tuple[Tensor, ...]:
        """Make the result of tensors in memory, without a comparison with the digest."""
        del rounded
        info = TensorInfo("the tensor", self.dtype, self.shape)
        inputs = [TensorPayload(one, one.numel() * one.element_size()) for one in tensors]
        source = self.source(inputs, info, Workers())
        made = torch_bytes(info.nbytes, lambda memory: read_into(source, memory))
        return (made.view(torch_dtype(self.dtype)).reshape(self.shape),)


class PatchedTensor(NamedTuple):
    """A step that makes a tensor of a patch, and the inputs of the plan by role."""

    step: Step
    operation: Patched
    roles: Mapping[str, Checkpoint]

    def payload(self, workers: Workers) -> CheckedPayload:
        """Return the bytes of the tensor, which raise an error unless they have the digest."""
        inputs = [self.roles[source.role].payload(source.key) for source in self.step.sources]
        source = self.operation.source(inputs, self.step.out, workers, self)
        return CheckedPayload(self.step.out, source, self.operation.digits, self.refusal, tuple(inputs), workers)

    def refusal(self) -> CkptkitError:
        """Return the error for a result without its digest: another base if it is copied, else a damaged patch.

        What a changed tensor is made of in the base had its digest before the first tensor was made.
        """
        for checkpoint in self.roles.values():
            checkpoint.check_unchanged(by_path=True)
        first = self.step.sources[0]
        if self.operation.kind == "equal":
            reason = f"{quoted(first.key)} has other values"
            return other_base(self.roles[first.role], reason, self.operation.base_name)
        patch = self.roles[self.step.sources[-1].role]
        reason = f"{quoted(self.step.out.key)} does not have its digest: the patch is damaged"
        return FormatError(reason, hint=_AGAIN, path=patch.path)


def results_of(steps: Iterable[Step]) -> dict[str, ResultTensor]:
    """Return the tensors that patches make in these steps, by key."""
    operations = ((step.out, step.recipe.operations[-1]) for step in steps if step.recipe is not None)
    return {
        out.key: ResultTensor(out.dtype, out.shape, one.digits) for out, one in operations if isinstance(one, Patched)
    }


def patched_tensor(step: Step, roles: Mapping[str, Checkpoint]) -> PatchedTensor:
    """Return what makes the tensor of a step that ``is_patched``."""
    assert step.recipe is not None  # noqa: S101 - it has the operation
    (operation,) = step.recipe.operations
    assert isinstance(operation, Patched)  # noqa: S101 - no other operation has its name
    return PatchedTensor(step, operation, roles)
