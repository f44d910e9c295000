"""How a tensor is made of others: a tree of operations, whose leaves are tensors that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckptkit.core.torch_types import Tensor
from ckptkit.tensor_ops.operation import Operation, Shape
from ckptkit.tensor_ops.registry import apply_chain, chain_dtypes, chain_shapes

__all__ = ["Recipe", "compose", "evaluate_recipe", "recipe_dtype", "recipe_shape"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One of the tensors that a chain of operations makes.

    An input is the number of a source, in whatever list goes with the recipe, or what another recipe makes;
    ``part`` counts the outputs of the last operation.
    """

    inputs: tuple[int | Recipe, ...]
    operations: tuple[Operation, ...]
    part: int = 0

    def outline(self) -> str:
        """Return the names of the operations in the order in which they run: ``stack, transpose``."""
        inner = dict.fromkeys(item.outline() for item in self.inputs if isinstance(item, Recipe))
        return ", ".join([*inner, *(operation.name for operation in self.operations)])


def compose(parts: Sequence[Recipe | None], counts: Sequence[int], operations: tuple[Operation, ...]) -> list[Recipe]:
    """Return the recipes, one for each output, of a chain over tensors that have recipes (None: a source as it is).

    ``counts`` says how many sources each of them has; the new recipes count through all of them in order.
    """
    inputs: list[int | Recipe] = []
    first = 0
    for recipe, count in zip(parts, counts, strict=True):
        inputs.append(first if recipe is None else _renumbered(recipe, range(first, first + count)))
        first += count
    only = inputs[0] if len(inputs) == 1 else None
    if isinstance(only, Recipe) and only.operations[-1].outputs == 1:
        inputs, operations = list(only.inputs), only.operations + operations  # one chain, which can be undone
    return [Recipe(tuple(inputs), operations, part) for part in range(operations[-1].outputs)]


def _renumbered(recipe: Recipe, numbers: Sequence[int]) -> Recipe:
    moved = tuple(numbers[item] if isinstance(item, int) else _renumbered(item, numbers) for item in recipe.inputs)
    return Recipe(moved, recipe.operations, recipe.part)


def recipe_shape(recipe: int | Recipe, sources: Sequence[Shape]) -> Shape:
    """Return the shape of what is made of sources with these shapes; raises ``RuleError`` where they do not fit."""
    if isinstance(recipe, int):
        return sources[recipe]
    return chain_shapes(recipe.operations, [recipe_shape(item, sources) for item in recipe.inputs])[recipe.part]


def recipe_dtype(recipe: int | Recipe, sources: Sequence[str]) -> str:
    """Return the dtype of what is made of sources with these dtypes; raises ``RuleError`` where they do not fit."""
    if isinstance(recipe, int):
        return sources[recipe]
    return chain_dtypes(recipe.operations, [recipe_dtype(item, sources) for item in recipe.inputs])[recipe.part]


def evaluate_recipe(recipe: Recipe, sources: Sequence[object], read: Callable[[int], Tensor]) -> tuple[Tensor, ...]:
    """Return every output of the recipe's last operation.

    ``read`` gives a source by its number; where two of ``sources`` are equal, what is made of them is made once.
    """
    first: dict[object, int] = {}
    numbers = [first.setdefault(source, number) for number, source in enumerate(sources)]
    return _Evaluation(read).evaluate(_renumbered(recipe, numbers))


@dataclass(frozen=True, slots=True)
class _Evaluation:
    read: Callable[[int], Tensor]
    made: dict[object, tuple[Tensor, ...]] = field(default_factory=dict)

    def evaluate(self, recipe: Recipe) -> tuple[Tensor, ...]:
        work = recipe.inputs, recipe.operations
        if work in self.made:
            return self.made[work]
        inputs = [
            self.read(item) if isinstance(item, int) else self.evaluate(item)[item.part] for item in recipe.inputs
        ]
        outputs = apply_chain(recipe.operations, inputs)
        if len(outputs) > 1:  # the parts of one tensor go their own ways, and each comes by here
            self.made[work] = outputs
        return outputs
