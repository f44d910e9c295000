"""What a step of a plan merges: its method, the inputs, and the parameters as they count for its tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

from ckptkit.core.text import printable
from ckptkit.plans.plan import Step

if TYPE_CHECKING:
    from ckptkit.plans.methods.operation import Merge
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["MergedStep", "merged_step", "origins"]


class MergedStep(NamedTuple):
    """The merge of one tensor; the value of a parameter for each input is a list in their order."""

    method: str
    base: str | None
    inputs: tuple[str, ...]
    values: Mapping[str, object]

    def document(self) -> dict[str, object]:
        """Return the merge as JSON values, with all parameters."""
        return {
            "method": self.method, "base": self.base, "inputs": list(self.inputs), "parameters": dict(self.values)
        }  # fmt: skip


def merged_step(step: Step) -> MergedStep | None:
    """Return the merge that makes the tensor of a step, or None for any other step."""
    operation = step.recipe.operations[0] if step.recipe is not None else None
    if step.recipe is None or operation is None or operation.name != "merge":
        return None
    merge = cast("Merge", operation)
    roles = [step.sources[_first(item)].role for item in step.recipe.inputs]
    base = roles.pop(0) if merge.has_base else None
    return MergedStep(merge.method.name, base, tuple(roles), merge.method.given())


def origins(steps: Iterable[Step]) -> list[str]:
    """Return how many tensors each method merges, and how many are taken from each input as they are.

    Empty for a plan that merges nothing.
    """
    merges = [(step, merged_step(step)) for step in steps]
    if not any(merge for _, merge in merges):
        return []
    counts = Counter(_origin(step, merge) for step, merge in merges)
    return [f"{count:,} {origin}" for origin, count in counts.items()]


def _origin(step: Step, merge: MergedStep | None) -> str:
    if step.tied_to is not None:
        return "tied"
    if merge is not None:
        return f"merged by {merge.method}"
    if len({source.role for source in step.sources}) > 1:
        return "the largest of all inputs"
    return "equal in all inputs" if step.equals else f"taken from {printable(step.sources[0].role)}"


def _first(item: int | Recipe) -> int:
    """Return the first source of an input of a recipe, which has the role of the input."""
    return item if isinstance(item, int) else _first(item.inputs[0])
