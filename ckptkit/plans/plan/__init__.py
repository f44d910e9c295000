"""A plan: the sources of each tensor of an output, and the entries that the output leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptkit.core.arguments import refuse, require_flags, require_type
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.coverage import Coverage
from ckptkit.core.result import Result
from ckptkit.core.result.summary import totals
from ckptkit.core.text import human_bytes, plural
from ckptkit.core.ties import overlapping_tensors
from ckptkit.core.torch_types import Tensor
from ckptkit.plans.deltas.base import BaseOfPatch
from ckptkit.plans.plan.layers import LayerCount
from ckptkit.plans.plan.step import Dropped, Source, Step

if TYPE_CHECKING:
    import torch

    from ckptkit.plans.inputs import Sources

__all__ = [
    "Dropped",
    "LayerCount",
    "Plan",
    "Source",
    "Step",
    "find_broken_ties",
]


@dataclass(frozen=True, slots=True, repr=False)
class Plan(Result):
    """The tensors of an output in order (one ``Step`` each), the entries that the output leaves out, and its metadata.

    A torch output can be a copy of the file of one input, with new tensors. ``edited_role`` is the role of that input.
    ``kept`` names the entries that the copy has too, such as the optimizer; ``check_output`` sets ``kept``.
    ``versions`` holds the version of each module by its prefix, as in the ``_metadata`` of a state_dict.
    ``command`` is the command that makes such a plan (``remap``, ``merge`` or ``convert``); its document names it.
    ``covered`` says which tensors of the base get values from a donor; it is None where a plan has no base.
    ``paths`` has the path of each role, where the plan was made of a recipe, for ``execute``. ``layers`` says which
    layers the output has, where it has others than its input. ``patched_base`` has digests of the base of a patch,
    which are compared before the first tensor is made.

    Example:
        >>> plan = ckptkit.plan_remap("fixtures/lenet_10class.pth", ["fc3.*=head.*"])
        >>> plan, plan.steps[-1].out.key
        (<Plan: 10 tensors, 248.0 kB>, 'head.bias')
    """

    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, int] = field(default_factory=dict)
    edited_role: str = ""
    kept: tuple[str, ...] = ()
    command: str = field(default="remap", compare=False)
    covered: Coverage | None = field(default=None, compare=False)
    paths: Mapping[str, str] = field(default_factory=dict, compare=False)
    layers: LayerCount | None = field(default=None, compare=False)
    patched_base: BaseOfPatch | None = None

    def __post_init__(self) -> None:
        """Refuse a field of a wrong type, which ``dataclasses.replace`` could have set."""
        for name, kind in (("steps", Step), ("dropped", Dropped), ("notes", str), ("kept", str)):
            items = getattr(self, name)
            if not isinstance(items, Sequence) or isinstance(items, str):
                refuse(items, name, f"a tuple of {kind.__name__}")
            object.__setattr__(self, name, tuple(items))
            wrong = next((item for item in items if not isinstance(item, kind)), self)
            if wrong is not self:
                refuse(wrong, f"an item of {name}", f"a {kind.__name__}")
        for name, of in (("metadata", str), ("versions", int), ("paths", str)):
            table = getattr(self, name)
            if not isinstance(table, Mapping) or not all(isinstance(value, of) for value in table.values()):
                refuse(table, name, f"a mapping of str to {of.__name__}")
        for name in ("edited_role", "command"):
            require_type(getattr(self, name), str, name, "a str")
        require_type(self.patched_base, BaseOfPatch | None, "patched_base", "a BaseOfPatch, or None")
        require_type(self.layers, LayerCount | None, "layers", "a LayerCount, or None")
        require_type(self.covered, Coverage | None, "covered", "a Coverage, or None")

    @property
    def coverage(self) -> float | None:
        """The share of the base's elements that get values from a donor, between 0 and 1; None without a base."""
        return None if self.covered is None else self.covered.share

    @property
    def from_base(self) -> tuple[str, ...]:
        """The keys of the base that get no value from a donor; in the output, they have the values of the base."""
        return () if self.covered is None else self.covered.kept

    @property
    def elements(self) -> int:
        """Number of elements of all tensors in the output."""
        return totals(step.out for step in self.steps)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the output."""
        return totals(step.out for step in self.steps)[2]

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return f"{plural(len(self.steps), 'tensor')}, {human_bytes(self.nbytes)}{self.left_out}"

    @property
    def left_out(self) -> str:
        """The end of a sentence about the output: how many tensors and other entries are left out, if any."""
        entries = len({drop.key for drop in self.dropped if drop.is_entry})
        tensors = sum(not drop.is_entry for drop in self.dropped)
        counts = [
            *([plural(tensors, "tensor")] if tensors else []),
            *([plural(entries, "entry", "entries")] if entries else []),
        ]
        return f", {' and '.join(counts)} left out" if counts else ""

    def tensors(self, sources: Sources, *, allow_overflow: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield the key and the tensor of each step, as ``execute`` would write it, one at a time and on the CPU.

        ``sources`` and ``allow_overflow`` are as in ``execute``. The plan is checked against the sources at once; a
        tensor is read and computed when it is asked for. Each has contiguous memory of its own.

        Raises:
            PlanError: The plan does not fit the sources, or contradicts itself. While the tensors are computed: a cast
                would make inf of finite values, without ``allow_overflow``.
            ChangedError: An input changed since it was opened.

        Example:
            >>> import ckptkit, torch
            >>> model = torch.nn.Linear(2, 2)
            >>> plan = ckptkit.plan_remap(model, ["*=fc.*"], dtype="bfloat16")
            >>> for key, tensor in plan.tensors(model):
            ...     print(key, tensor.dtype)
            fc.weight torch.bfloat16
            fc.bias torch.bfloat16
        """
        from ckptkit.plans.inputs import stream_tensors

        return stream_tensors(self.steps, sources, self.patched_base, allow_overflow=allow_overflow)

    def materialize(
        self,
        sources: Sources,
        *,
        device: torch.device | str | int | None = None,
        allow_overflow: bool = False,
    ) -> dict[str, Tensor]:
        """Return the state_dict of the output, with the tensors that ``execute`` would write, on ``device``.

        ``sources`` and ``allow_overflow`` are as in ``execute``; the device is the CPU unless given. Keys that
        ``execute`` would tie in a torch file share memory. The result has ``versions`` as its ``_metadata``. It has no
        entry that is not a tensor.

        Raises:
            PlanError: The plan does not fit the sources, or contradicts itself, or a cast would make inf of finite
                values, without ``allow_overflow``.
            ChangedError: An input changed since it was opened.

        Example:
            >>> import ckptkit, torch
            >>> model = torch.nn.Linear(2, 2)
            >>> state = ckptkit.plan_remap(model, ["*=fc.*"]).materialize(model)
            >>> torch.equal(state["fc.weight"], model.weight)
            True
        """
        from ckptkit.core.checkpoint.state_dict import to_device, with_versions
        from ckptkit.plans.inputs import materialize_steps, opened_inputs

        require_flags(allow_overflow=allow_overflow)
        place = to_device(device)
        with opened_inputs(
            self.steps, sources, patched_base=self.patched_base, allow_overflow=allow_overflow
        ) as inputs:
            return with_versions(materialize_steps(inputs, place), self.versions)


def find_broken_ties(plan: Plan) -> list[tuple[str, ...]]:
    """Return each group of output keys that share memory in the input, but would not in a safetensors file.

    Where a plan puts layers one after the other, several keys of one source are copies that the plan asks for: the
    first stands for all.
    """
    by_role: dict[str, list[TensorInfo]] = {}
    by_source: dict[object, list[str]] = {}
    read: set[tuple[str, str]] = set()
    for step in plan.steps:
        source = step.sources[0]
        place = (source.role, source.key)
        if plan.layers is not None and place in read:
            continue
        read.add(place)
        if step.out.view is not None:
            by_role.setdefault(source.role, []).append(step.out)
        if step.recipe is None or step.is_patched:
            by_source.setdefault((place, step.recipe), []).append(step.out.key)
    groups = [tuple(info.key for info in group) for infos in by_role.values() for group in overlapping_tensors(infos)]
    known = {key for group in groups for key in group}
    return groups + [tuple(keys) for keys in by_source.values() if len(keys) > 1 and keys[0] not in known]
