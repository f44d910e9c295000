"""Tell the step counts that differ by a training from the step counts of a state that was loaded in part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

__all__ = ["have_one_count_in_each_part"]


def have_one_count_in_each_part(
    counts: Mapping[str, float], groups: Iterable[Collection[str]] = (), frozen: Collection[str] = ()
) -> bool:
    """Return whether the step counts differ as they do if parts of the model joined later, or had no gradient.

    ``counts`` has the step count of each parameter. A part is a module, a group, all parameters of one last name, such
    as every ``bias``, or the ``frozen`` parameters. A training freezes, adds or skips whole parts. A single parameter
    with a lower count than its module is the sign of a state that was changed or lost.

    >>> have_one_count_in_each_part({"a.weight": 9, "a.bias": 9, "b.weight": 2, "b.bias": 2})
    True
    >>> have_one_count_in_each_part({"a.weight": 9, "a.bias": 9, "b.weight": 2, "b.bias": 9})
    False
    """
    of_module: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        if name not in frozen:
            of_module[name.rpartition(".")[0]].append(name)
    lower: set[str] = set()  # than another parameter of the same module
    siblings: set[str] = set()
    for names in of_module.values():
        most = max(counts[name] for name in names)
        lower |= {name for name in names if counts[name] < most}
        siblings |= set(names) if len(names) > 1 else set()
    for group in groups:
        members = {name for name in group if name in counts}
        if len({counts[name] for name in members}) == 1 and members != counts.keys():
            lower -= members
            siblings -= members
    last_names = {name.rpartition(".")[2] for name in lower}
    return all(name in lower for name in siblings if name.rpartition(".")[2] in last_names)
