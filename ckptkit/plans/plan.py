"""Plans as values: every tensor of an output, what it is made of, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import html_table, printable
from ckptkit.core.ties import overlapping_tensors

if TYPE_CHECKING:
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["Dropped", "Plan", "Source", "Step", "ties_broken"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a step takes its tensor: which input, by role, and the key it has there."""

    role: str
    key: str


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the output: what it will be, from what, by which operation and rule.

    Without a ``recipe`` it is its one source, copied or cast; with one, what the recipe makes of its sources, cast
    where the dtypes differ. ``equals`` are tensors that a rule says have the same bytes as it; ``execute`` proves it.
    """

    out: TensorInfo
    sources: tuple[Source, ...]
    operation: str = "copy"
    rule: str = ""
    recipe: Recipe | None = None
    equals: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something of an input that the output will not have, and why.

    ``wanted`` is the key of the base that it would have filled, where its shape is the reason. ``is_entry`` says
    that it is no tensor of the mapping taken, but something else that the input holds.
    """

    role: str
    key: str
    reason: str
    wanted: str = ""
    is_entry: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of an output in order, what is left out, and the metadata it will carry.

    ``edited_role`` is the role of the input whose file an output of torch is an edited copy of, where there is one;
    ``kept`` is what of it stays as it is beside the tensors, by ``fit``.
    """

    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, int] = field(default_factory=dict)  # of modules, by prefix; torch files carry them
    edited_role: str = ""
    kept: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements in the output."""
        return sum(step.out.elements for step in self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the output."""
        return sum(step.out.nbytes for step in self.steps)

    def _repr_html_(self) -> str:
        rows = [
            (
                printable(step.out.key),
                str(step.out),
                ", ".join(f"{source.role}: {printable(source.key)}" for source in step.sources),
                step.operation,
                step.rule,
            )
            for step in self.steps
        ]
        dropped_sources = [(printable(drop.key), drop.role, drop.reason) for drop in self.dropped]
        made = html_table(("key", "tensor", "from", "operation", "rule"), rows)
        return made + (html_table(("left out", "of", "because"), dropped_sources) if dropped_sources else "")


def ties_broken(plan: Plan) -> list[tuple[str, ...]]:
    """Return the keys of each group of outputs that share memory in their source, and would not in a flat file."""
    by_role: dict[str, list[TensorInfo]] = {}
    by_source: dict[Source, list[str]] = {}
    for step in plan.steps:
        by_role.setdefault(step.sources[0].role, []).append(step.out)
        if step.recipe is None:
            by_source.setdefault(step.sources[0], []).append(step.out.key)
    groups = [tuple(info.key for info in group) for infos in by_role.values() for group in overlapping_tensors(infos)]
    known = {key for group in groups for key in group}
    return groups + [tuple(keys) for keys in by_source.values() if len(keys) > 1 and keys[0] not in known]
