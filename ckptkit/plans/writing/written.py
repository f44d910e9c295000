"""What was written: the description that the functions that write an output return."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.result import Result
from ckptkit.core.text import human_bytes, plural, printable
from ckptkit.plans.carried import Adapted
from ckptkit.plans.plan import Plan
from ckptkit.plans.plan.extracted import ExtractedChange
from ckptkit.plans.plan.merged import MergedFacts

__all__ = ["Written"]


@dataclass(frozen=True, slots=True, repr=False)
class Written(Result):
    """A description of the output that was written.

    ``beside`` names other weight files that were in the output directory before and are still there. ``envelope`` is
    the mapping inside the file that holds the tensors. ``losses`` has every cast that changed a value to inf, to 0 or
    to an integer, with exact counts. ``left`` is the old directory, under a temporary path, if it could not be removed.
    ``verified`` names the reader that found the planned bytes of every tensor, such as ``safetensors 0.8.0``; it is
    None where that was not asked for. ``read_back`` is the reason why only ckptkit could compare the bytes, or None.
    ``untied`` has groups of keys that shared memory in an input, and have storages of their own in the output.
    ``extracted`` says how much of each change the factors of an extracted adapter hold.
    ``merged`` has the warnings of merged tensors, and the numbers that their methods found.
    ``kept_shards`` is the number of shards that an earlier run had finished, and that were kept (``resume``).
    ``shared`` is the number of bytes in blocks of the disk that the output shares with an input, see ``Output``.
    ``carried`` names the files that were taken along from an input, and ``adapted`` what changed in them.
    ``plan`` is the plan that was executed, with the entries that this output keeps and leaves out.

    Example:
        >>> written = ckptkit.execute(ckptkit.plan_remap(state := {"w": torch.ones(2)}), state, "ones.safetensors")
        >>> written.path, written.format, written.tensors
        ('ones.safetensors', 'safetensors', 1)
    """

    path: str
    format: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    beside: tuple[str, ...] = ()
    envelope: str = ""
    losses: tuple[CastLoss, ...] = ()
    left: tuple[str, ...] = ()
    verified: str | None = None
    read_back: str | None = None
    untied: tuple[tuple[str, ...], ...] = ()
    extracted: tuple[ExtractedChange, ...] = ()
    merged: tuple[MergedFacts, ...] = ()
    carried: tuple[str, ...] = ()
    adapted: tuple[Adapted, ...] = ()
    plan: Plan | None = field(default=None, compare=False)
    shared: int = 0
    kept_shards: int = 0

    @property
    def coverage(self) -> float | None:
        """The share of the base's elements that got values from a donor, as in the plan; None without a base."""
        return None if self.plan is None else self.plan.coverage

    @property
    def from_base(self) -> tuple[str, ...]:
        """The keys that have the values of the base, as in the plan."""
        return () if self.plan is None else self.plan.from_base

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return f"{printable(self.path)}, {self.format}, {plural(self.tensors, 'tensor')}, {human_bytes(self.nbytes)}"
