"""Steps: which named tensors an operation takes, and what its outputs are called, before they become rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Operation, Shape
from ckptkit.tensor_ops.registry import chain_shapes

__all__ = ["Step", "Trace", "in_levels"]


@dataclass(frozen=True, slots=True)
class Step:
    """Named tensors go through a chain of operations, and the outputs get names.

    Without operations, one tensor is renamed, or dropped if there is no output. ``must_equal`` allows that another
    tensor of the same bytes gets the same name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    must_equal: bool = False


@dataclass(slots=True)
class Trace:
    """The steps of one conversion, while it is followed with names in place of tensors.

    ``label`` begins the names of tensors between two steps. ``shapes`` holds the known shapes by name.
    """

    label: str
    shapes: dict[str, Shape]
    steps: list[Step] = field(default_factory=list)
    made: int = 0

    def apply(self, operations: Sequence[Operation], names: Sequence[str]) -> tuple[str, ...]:
        """Record a step, and return the names of its outputs.

        Raises ``RuleError`` where an operation refuses the shapes.
        """
        outputs = tuple(self._new_name() for _ in range(operations[-1].outputs))
        self.steps.append(Step(self._all_made(names), outputs, tuple(operations)))
        if all(name in self.shapes for name in names):
            try:
                made = chain_shapes(operations, [self.shapes[name] for name in names])
            except RuleError as error:
                raise RuleError(f"{quoted(self.label)}: {error.reason}", hint=error.hint) from None
            self.shapes.update(zip(outputs, made, strict=True))
        return outputs

    def finish(self, names: Mapping[str, str]) -> list[Step]:
        """Return the steps with final names: ``names`` maps the name of a tensor in the trace to its final name."""
        made = {name for step in self.steps for name in step.outputs}
        named = [
            replace(
                step,
                inputs=tuple(names.get(name, name) if name in made else name for name in step.inputs),
                outputs=tuple(names.get(name, name) for name in step.outputs),
            )
            for step in self.steps
        ]
        return [*_joined(named), *(Step((name,), (final,)) for name, final in names.items() if name not in made)]

    def _new_name(self) -> str:
        self.made += 1
        return f"{self.label}.#{self.made}"

    def _all_made(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names, with new names for keys of the checkpoint that are beside outputs of an earlier step."""
        made = {name for step in self.steps for name in step.outputs}
        if made.isdisjoint(names):
            return tuple(names)
        inputs = []
        for name in names:
            if name not in made:
                renamed = self._new_name()
                self.steps.append(Step((name,), (renamed,)))
                if name in self.shapes:
                    self.shapes[renamed] = self.shapes[name]
                name = renamed  # noqa: PLW2901 - the input of the step
            inputs.append(name)
        return tuple(inputs)


def _joined(steps: Sequence[Step]) -> list[Step]:
    """Return the steps, each joined with the step that takes exactly its outputs."""
    joined: list[Step] = []
    for step in steps:
        before = next((number for number, other in enumerate(joined) if other.outputs == step.inputs), None)
        if before is None or not joined[before].operations or not step.operations:
            joined.append(step)
        else:
            earlier = joined.pop(before)
            joined.append(replace(step, inputs=earlier.inputs, operations=earlier.operations + step.operations))
    return joined


def in_levels(steps: Iterable[Step]) -> list[list[Step]]:
    """Return the steps in levels: a step takes keys of the checkpoint, or only outputs of the level before it.

    A step comes after the steps that make its inputs.
    """
    steps = list(steps)
    makers: dict[str, int] = {}
    levels: list[list[Step]] = []
    taken = {name for step in steps for name in step.inputs}
    for step in steps:
        level = max((makers.get(name, 0) for name in step.inputs), default=0)
        while len(levels) <= level:
            levels.append([])
        levels[level].append(step)
        makers.update({name: level + 1 for name in step.outputs if "#" in name and name in taken})
    return levels
