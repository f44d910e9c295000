"""Find the tensors of the initial checkpoint that have the values of a new model, as a merge leaves a new head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from ckptkit.checks.at_init import find_untrained
from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.coverage import group_by_module
from ckptkit.core.findings import Finding
from ckptkit.core.patterns import Pattern, matches_any
from ckptkit.core.text import shell_word
from ckptkit.readiness import codes
from ckptkit.readiness.init import InspectedModel, tensors_of
from ckptkit.readiness.model import Init
from ckptkit.statistics.state_dict_stats import StateDictStats, stats
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["check_untrained", "find_untrained_in_init"]


def find_untrained_in_init(
    inspected: InspectedModel,
    init: Init,
    result: StateDictDiff,
    opened: Checkpoint,
    initial: StateDictStats | None,
) -> frozenset[str]:
    """Return the keys for which the initial checkpoint ``opened`` has values as those of a new model.

    ``initial`` are the statistics of the model before anything was loaded. Where no tensor has other values, nothing is
    returned: then init is the state of a new model as a whole.
    """
    if inspected.stats is None:
        return frozenset()
    found = _numbers(inspected, init, result.matched, opened)
    untrained = find_untrained(result.matched, found, _numbers_of(initial), inspected.model)
    return frozenset(() if untrained.is_whole else untrained.keys)


def _numbers(
    inspected: InspectedModel, init: Init, pairs: Sequence[KeyPair], opened: Checkpoint
) -> Mapping[str, ValueStats]:
    """Return the statistics of the values in init by the keys of the model: of the model itself, if it has them."""
    if init.in_model == "all":
        return _numbers_of(inspected.stats)
    direct = [pair for pair in pairs if opened.get(pair.found.key) == pair.found]
    numbers = _numbers_of(stats(opened.without(opened.keys() - {pair.found.key for pair in direct})))
    return {pair.key: numbers[pair.found.key] for pair in direct if pair.found.key in numbers}


def _numbers_of(found: StateDictStats | None) -> dict[str, ValueStats]:
    tensors = {} if found is None else found.tensors
    return {key: tensor.numbers for key, tensor in tensors.items() if tensor.numbers is not None}


def check_untrained(
    inspected: InspectedModel, untrained: AbstractSet[str], patterns: Sequence[Pattern]
) -> Iterator[Finding]:
    """Yield a finding for each module that has the values of a new model in init; ``patterns`` match those meant."""

    def label(key: str) -> tuple[bool, bool]:
        return key in untrained, matches_any(patterns, key)

    for module, keys in group_by_module({key: label(key) for key in inspected.state}):
        new = [key for key in keys if key in untrained]
        if new:
            is_meant = all(matches_any(patterns, key) for key in new)
            verb = "has" if len(new) == 1 else "have"
            pattern = shell_word(new[0] if len(new) == 1 else f"{module}.*")
            yield codes.AT_INIT.finding(
                new[0],
                f"{tensors_of(module, new, keys)} {verb} values in init that are distributed as in a new model",
                ""
                if is_meant
                else f"never trained, or kept from the base of a merge: if this is intended, give --fresh {pattern}",
                severity="note" if is_meant else "warning",
                keys=new,
            )
