"""Find tensors that are only numbered: the lists in which trainers keep an average of the parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ckptkit.core.text import quoted

__all__ = ["POSITIONAL", "PositionalList", "find_positions"]

_ANY = "the parameters"  # of a name that a list of parameters of any module can have too
# The names of lists that hold one tensor for each parameter, in the order of ``model.parameters()``: the average, the
# weights that trainers put aside while they use it, and a plain list. The first that a file has is read.
POSITIONAL = (
    ("shadow_params", "the average of the parameters (torch_ema, diffusers, score_sde)"),
    ("ema_params", "an average of the parameters"),
    ("averaged_params", "an average of the parameters"),
    ("avg_params", "an average of the parameters"),
    ("ema_weights", "an average of the parameters"),
    ("shadow", "an average of the parameters"),
    ("ema", "an average of the parameters"),
    ("parameters", _ANY),
    ("params", _ANY),
    ("", _ANY),
    ("collected_params", "the parameters that torch_ema put aside"),
    ("temp_stored_params", "the parameters that diffusers put aside"),
)
_CONTENTS = dict(POSITIONAL)
_ORDER = {name: number for number, (name, _) in enumerate(POSITIONAL)}
_NUMBERED = re.compile(r"(?:(.*)\.)?(0|[1-9][0-9]{0,6})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PositionalList:
    """The tensors of a list in their order, and what the list holds; ``others`` are keys of other lists and counters.

    ``head`` is the name of the list, or empty for a file that is the list.
    """

    head: str
    keys: tuple[str, ...]
    content: str
    others: tuple[str, ...] = ()

    @property
    def is_certain(self) -> bool:
        """Whether the name says that this is such a list; a module can hold parameters in a list too."""
        return self.content != _ANY

    @property
    def name(self) -> str:
        """The list as a sentence names it."""
        return quoted(self.head) if self.head else "the list"


def find_positions(shapes: Mapping[str, tuple[int, ...]]) -> PositionalList | None:
    """Return the list that a file of numbered tensors holds, or None if its keys are names.

    All tensors must be in such lists, each numbered from 0 without a gap; single numbers beside them count something.

    Example:
        >>> found = find_positions({"shadow_params.0": (2, 2), "shadow_params.1": (2,), "decay": ()})
        >>> found.head, found.keys, found.others
        ('shadow_params', ('shadow_params.0', 'shadow_params.1'), ('decay',))
    """
    lists: dict[str, dict[int, str]] = {}
    others: list[str] = []
    for key, shape in shapes.items():
        match = _NUMBERED.fullmatch(key)
        if match is not None:
            lists.setdefault(match[1] or "", {})[int(match[2])] = key
        elif all(size == 1 for size in shape):
            others.append(key)
        else:
            return None
    known = {head: _last(head) for head in lists}
    if not lists or any(name not in _ORDER for name in known.values()):
        return None
    head = min(lists, key=lambda head: _ORDER[known[head]])
    numbers = lists.pop(head)
    if max(numbers) != len(numbers) - 1:
        return None
    keys = tuple(numbers[number] for number in range(len(numbers)))
    rest = (key for other in lists.values() for key in other.values())
    found = PositionalList(head, keys, _CONTENTS[known[head]], (*others, *rest))
    return found if len(keys) > 1 or found.is_certain else None  # the name of a single tensor can end with a number


def _last(head: str) -> str:
    return head.rpartition(".")[2]
