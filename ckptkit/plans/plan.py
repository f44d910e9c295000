"""The classes of a plan: the sources of each tensor of an output, and the entries that the output leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import html_table, printable
from ckptkit.core.ties import overlapping_tensors

if TYPE_CHECKING:
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["Dropped", "Plan", "Source", "Step", "find_broken_ties"]


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of an input: the role of the input (``base``, ``donor``, ``source``) and the tensor's key in it."""

    role: str
    key: str


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the output, with its sources, the operations on them and the rule that asked for it.

    Without a ``recipe`` the tensor is a copy or a cast of its only source. A ``recipe`` computes the tensor from its
    sources, and a cast follows where the dtypes differ. ``equals`` names tensors that must have the same bytes as the
    first source; ``execute`` compares them. ``tied_to`` is the key of the output that the base ties this key to.
    """

    out: TensorInfo
    sources: tuple[Source, ...]
    operation: str = "copy"
    rule: str = ""
    recipe: Recipe | None = None
    equals: tuple[Source, ...] = ()
    is_cast: bool = False  # whether the last operation is a cast
    tied_to: str | None = None  # a plan file does not record it

    @property
    def is_copy(self) -> bool:
        """Whether the tensor has the bytes of its source."""
        return self.recipe is None and not self.is_cast


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tensor or another entry of an input that the output leaves out, and the reason.

    If the shape is the reason, ``wanted`` is the key of the base that the tensor would have filled. ``is_entry`` is
    true for an entry that is not a tensor.
    """

    role: str
    key: str
    reason: str
    wanted: str = ""
    is_entry: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The tensors of an output in order (one ``Step`` each), the entries that the output leaves out, and its metadata.

    A torch output can be a copy of the file of one input, with new tensors. ``edited_role`` is the role of that input.
    ``kept`` names the entries that the copy has too, such as the optimizer; ``check_output`` sets ``kept``.
    ``versions`` holds the version of each module by its prefix, as in the ``_metadata`` of a state_dict.
    """

    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, int] = field(default_factory=dict)
    edited_role: str = ""
    kept: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements of all tensors in the output."""
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
        left_out = [(printable(drop.key), drop.role, drop.reason) for drop in self.dropped]
        tensors = html_table(("key", "tensor", "from", "operation", "rule"), rows)
        return tensors + (html_table(("left out", "of", "because"), left_out) if left_out else "")


def find_broken_ties(plan: Plan) -> list[tuple[str, ...]]:
    """Return each group of output keys that share memory in the input, but would not in a safetensors file."""
    by_role: dict[str, list[TensorInfo]] = {}
    by_source: dict[Source, list[str]] = {}
    for step in plan.steps:
        by_role.setdefault(step.sources[0].role, []).append(step.out)
        if step.recipe is None:
            by_source.setdefault(step.sources[0], []).append(step.out.key)
    groups = [tuple(info.key for info in group) for infos in by_role.values() for group in overlapping_tensors(infos)]
    known = {key for group in groups for key in group}
    return groups + [tuple(keys) for keys in by_source.values() if len(keys) > 1 and keys[0] not in known]
