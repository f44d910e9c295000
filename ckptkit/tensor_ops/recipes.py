"""Recipes: trees of operations that compute a tensor from source tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckptkit.core.arguments import require_number, require_type
from ckptkit.core.text import plural
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import ArgumentError
from ckptkit.tensor_ops.arithmetic import Cast
from ckptkit.tensor_ops.dequantize import Dequantize
from ckptkit.tensor_ops.operation import Operation, Rounded, Shape
from ckptkit.tensor_ops.registry import apply_chain, chain_dtypes, chain_shapes

__all__ = [
    "Recipe",
    "compose",
    "dequantized_sources",
    "evaluate_recipe",
    "lift_dequantize",
    "recipe_dtype",
    "recipe_shape",
    "renumbered",
    "substituted",
    "with_float32_inputs",
]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One output of a chain of operations.

    An input is another recipe, or the position of a tensor in the list of sources that is used with the recipe.
    ``part`` is the number of the output of the last operation.
    """

    inputs: tuple[int | Recipe, ...]
    operations: tuple[Operation, ...]
    part: int = 0

    def __post_init__(self) -> None:
        """Refuse a recipe that could not be evaluated, as an edit or a plan file could make it."""
        for item in self.inputs:
            if not isinstance(item, Recipe):
                require_number(
                    item, "an input of a recipe", "a Recipe, or the position of a source", at_least=0, whole=True
                )
        for operation in self.operations:
            require_type(operation, Operation, "an operation of a recipe", "an Operation")
        if not self.operations:
            raise ArgumentError("a recipe has no operation")
        outputs = self.operations[-1].outputs
        require_number(self.part, "part", "the number of an output, from 0", at_least=0, whole=True)
        if self.part >= outputs:
            raise ArgumentError(f"part is {self.part}, and the last operation makes {plural(outputs, 'tensor')}")

    @property
    def end(self) -> int:
        """The number of sources that the recipe counts from."""
        return max((item + 1 if isinstance(item, int) else item.end for item in self.inputs), default=0)

    @property
    def is_lossy(self) -> bool:
        """Whether an operation computes new values, so that the sources cannot be restored."""
        inner = any(item.is_lossy for item in self.inputs if isinstance(item, Recipe))
        return inner or any(operation.lossy for operation in self.operations)

    def outline(self) -> str:
        """Return the names of the operations in the order of their execution: ``stack, transpose``."""
        inner = dict.fromkeys(item.outline() for item in self.inputs if isinstance(item, Recipe))
        return ", ".join([*inner, *(operation.name for operation in self.operations)])


def compose(parts: Sequence[Recipe | None], counts: Sequence[int], operations: tuple[Operation, ...]) -> list[Recipe]:
    """Return a recipe for each output of the chain ``operations``.

    ``parts`` holds the recipe of each input of the chain, or None for an input that is a source. ``counts`` holds the
    number of sources of each input. The new recipes number the sources of all inputs in order.
    """
    inputs: list[int | Recipe] = []
    first = 0
    for recipe, count in zip(parts, counts, strict=True):
        inputs.append(first if recipe is None else renumbered(recipe, range(first, first + count)))
        first += count
    only = inputs[0] if len(inputs) == 1 else None
    if isinstance(only, Recipe) and only.operations[-1].outputs == 1:
        inputs, operations = list(only.inputs), only.operations + operations  # one chain, which can be inverted
    return [Recipe(tuple(inputs), operations, part) for part in range(operations[-1].outputs)]


def renumbered(recipe: Recipe, numbers: Sequence[int]) -> Recipe:
    """Return the recipe with other numbers of its sources."""
    moved = tuple(numbers[item] if isinstance(item, int) else renumbered(item, numbers) for item in recipe.inputs)
    return Recipe(moved, recipe.operations, recipe.part)


def substituted(recipe: Recipe, inner: Sequence[int | Recipe]) -> Recipe:
    """Return the recipe with other sources, or with recipes in place of sources."""
    inputs = tuple(inner[item] if isinstance(item, int) else substituted(item, inner) for item in recipe.inputs)
    return Recipe(inputs, recipe.operations, recipe.part)


def with_float32_inputs(recipe: Recipe, sources: Sequence[str]) -> Recipe:
    """Return the recipe with its 16-bit sources as F32, if it computes with them: the result is not rounded then.

    ``sources`` are their dtypes.
    """
    if not recipe.is_lossy:
        return recipe
    inner = [Recipe((n,), (Cast("F32"),)) if code in ("F16", "BF16") else n for n, code in enumerate(sources)]
    return substituted(recipe, inner)


def dequantized_sources(recipe: Recipe) -> frozenset[int]:
    """Return the numbers of the sources that are parts of quantised weights, which the recipe dequantises first."""
    if isinstance(recipe.operations[0], Dequantize) and recipe.operations[0].scheme:
        return frozenset(item for item in recipe.inputs if isinstance(item, int))
    inner = (dequantized_sources(item) for item in recipe.inputs if isinstance(item, Recipe))
    return frozenset().union(*inner)


def lift_dequantize(recipe: Recipe, sources: int) -> tuple[int | Recipe, list[tuple[Dequantize, tuple[int, ...]]]]:
    """Return the recipe with a further source in place of each quantised weight, and how each of these is made.

    ``sources`` is the number of sources; the further ones have the numbers from there on. Each is made by an operation
    of the sources with these numbers. What remains is only a number if the recipe only dequantises.
    """
    made: list[tuple[Dequantize, tuple[int, ...]]] = []

    def lifted(item: int | Recipe) -> int | Recipe:
        if isinstance(item, int):
            return item
        first = item.operations[0]
        if not isinstance(first, Dequantize) or not first.scheme:
            return Recipe(tuple(map(lifted, item.inputs)), item.operations, item.part)
        row = (first, tuple(number for number in item.inputs if isinstance(number, int)))
        if row not in made:
            made.append(row)
        number = sources + made.index(row)
        return Recipe((number,), item.operations[1:], item.part) if item.operations[1:] else number

    return lifted(recipe), made


def recipe_shape(recipe: int | Recipe, sources: Sequence[Shape]) -> Shape:
    """Return the shape of the output for sources of these shapes; raise ``RuleError`` where an operation refuses."""
    if isinstance(recipe, int):
        return sources[recipe]
    return chain_shapes(recipe.operations, [recipe_shape(item, sources) for item in recipe.inputs])[recipe.part]


def recipe_dtype(recipe: int | Recipe, sources: Sequence[str]) -> str:
    """Return the dtype of the output for sources of these dtypes; raise ``RuleError`` where an operation refuses."""
    if isinstance(recipe, int):
        return sources[recipe]
    return chain_dtypes(recipe.operations, [recipe_dtype(item, sources) for item in recipe.inputs])[recipe.part]


def evaluate_recipe(
    recipe: Recipe, sources: Sequence[object], read: Callable[[int], Tensor], rounded: Rounded | None = None
) -> tuple[Tensor, ...]:
    """Return every output of the last operation of the recipe.

    ``read`` returns a source by its number. Equal elements of ``sources`` are the same tensor, and equal parts of the
    recipe are evaluated once. ``rounded`` is called as ``Operation.apply`` says.
    """
    first: dict[object, int] = {}
    numbers = [first.setdefault(source, number) for number, source in enumerate(sources)]
    return _Evaluation(read, rounded).evaluate(renumbered(recipe, numbers))


@dataclass(frozen=True, slots=True)
class _Evaluation:
    read: Callable[[int], Tensor]
    rounded: Rounded | None
    outputs: dict[object, tuple[Tensor, ...]] = field(default_factory=dict)

    def evaluate(self, recipe: Recipe) -> tuple[Tensor, ...]:
        chain = recipe.inputs, recipe.operations
        if chain in self.outputs:
            return self.outputs[chain]
        inputs = [
            self.read(item) if isinstance(item, int) else self.evaluate(item)[item.part] for item in recipe.inputs
        ]
        outputs = apply_chain(recipe.operations, inputs, self.rounded)
        if len(outputs) > 1:  # other inputs can be other outputs of this chain
            self.outputs[chain] = outputs
        return outputs
