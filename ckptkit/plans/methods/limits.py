"""The limits of magnitudes that hold for all tensors of an input together, found once for the steps of a plan."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ckptkit.core.text import plural, quoted, short_number
from ckptkit.errors import PlanError
from ckptkit.plans.methods.model import Share
from ckptkit.plans.methods.operation import Merge
from ckptkit.plans.plan.step import Step

if TYPE_CHECKING:
    from ckptkit.values.merging.limits import Counted
    from ckptkit.values.merging.payload import MergedPayload
    from ckptkit.values.workers import Workers

__all__ = ["Group", "Limits", "MakePayload", "merges_of"]

MakePayload: TypeAlias = "Callable[[Step, Merge], MergedPayload]"
Group: TypeAlias = tuple[int, Share]  # the number of an input in its recipe, and what is kept of it


@dataclass(slots=True)
class Limits:
    """The limits of the steps of a plan, which are found in the values of the inputs when the first one is needed."""

    steps: Sequence[Step] = ()
    found: Mapping[Group, float] | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def of(self, merge: Merge, make: MakePayload, workers: Workers) -> tuple[float, ...]:
        """Return the limit of each input of a merge, or nothing for a merge that needs none.

        ``make`` returns the payload of a merge, of which only the inputs are read. Raises ``PlanError`` where the steps
        lack tensors that the limits are of, and what reading the inputs raises.
        """
        groups = _groups(merge)
        if not any(groups):
            return ()
        self.find(make, workers)
        return tuple(0.0 if group is None else self._limit(group, merge) for group in groups)

    def find(self, make: MakePayload, workers: Workers) -> None:
        """Set ``found``, which another process can be given. Takes and raises what ``of`` does."""
        with self._lock:
            if self.found is None:
                self.found = self._find(make, workers)

    def _limit(self, group: Group, merge: Merge) -> float:
        limit = (self.found or {}).get(group)
        if limit is None and group[1].elements:
            raise PlanError(
                f'{quoted(merge.key)}: trim = "model" needs all tensors of its plan', hint="make a plan of a recipe"
            )
        return limit or 0.0

    def _find(self, make: MakePayload, workers: Workers) -> dict[Group, float]:
        from ckptkit.values.merging.limits import Counted, find_limits

        merges = [(step, merge, groups) for step, merge in merges_of(self.steps) if any(groups := _groups(merge))]
        counted: dict[Group, int] = defaultdict(int)
        for step, _, groups in merges:
            for group in filter(None, groups):
                counted[group] += step.out.elements
        for (number, share), elements in counted.items():
            if elements != share.elements:
                raise PlanError(
                    f"the plan merges {plural(elements, 'element')} of its input {number} "
                    f"with density {short_number(share.density)}, and was made for {share.elements:,}: "
                    'trim = "model" needs them all',
                    hint="make a new plan of the recipe",
                )

        def tensors() -> Iterator[Counted]:
            for step, merge, groups in merges:
                yield Counted(make(step, merge), (None, *groups))

        return find_limits(tensors, {group: group[1].kept for group in counted}, workers)


def merges_of(steps: Iterable[Step]) -> Iterator[tuple[Step, Merge]]:
    """Yield each step that ends with a merge, and the merge; of tied tensors, which have one merge, only one."""
    seen: set[str] = set()
    for step in steps:
        last = step.recipe.operations[-1] if step.recipe is not None else None
        if isinstance(last, Merge) and last.key not in seen:
            seen.add(last.key)
            yield step, last


def _groups(merge: Merge) -> list[Group | None]:
    shares = merge.method.shares()
    return [share and (number, share) for number, share in zip(merge.numbers, shares, strict=bool(shares))]
