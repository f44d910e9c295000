"""Find the tensors of the initial checkpoint that have the values of a new model, as a merge leaves a new head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from ckptkit.checks.expected import find_at_init
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

__all__ = ["check_untrained", "find_untrained"]


def find_untrained(
    inspected: InspectedModel,
    init: Init,
    result: StateDictDiff,
    opened: Checkpoint,
    initial: StateDictStats | None,
) -> frozenset[str]:
    """Return the keys for which the initial checkpoint ``opened`` has values as those of a new model.

    A tensor is compared with ``initial``, the statistics of the model before anything was loaded, and with what torch
    fills its module with. A bias, or another tensor that alone proves nothing, follows the rest of its module. Where
    no tensor has other values, nothing is returned: then init is the state of a new model as a whole.
    """
    if inspected.stats is None:
        return frozenset()
    pairs = [pair for pair in result.matched if pair.expected.shape == pair.found.shape and pair.found.kind == "dense"]
    numbers = _numbers(inspected, init, pairs, opened)
    pairs = [pair for pair in pairs if pair.key in numbers]
    found = {pair.found.key: numbers[pair.key] for pair in pairs}
    new = _numbers_of(initial) if initial is not None else {}
    sampled, constant = find_at_init(pairs, found, new)
    fresh, trained, unclear = set(sampled), set[str](), set(constant)
    for pair in pairs:
        judgement = inspected.judge(pair.key, numbers[pair.key])
        if pair.key in fresh or judgement is None:
            continue
        is_constant = numbers[pair.key].constant is not None
        if is_constant or judgement.kind == "few":
            unclear.add(pair.key)
        elif judgement.kind == "fresh":
            fresh.add(pair.key)
        else:
            trained.add(pair.key)
    trained_modules = {key.rpartition(".")[0] for key in trained}
    # A vector has few numbers: it can be as in a new model by chance where the matrix beside it is trained.
    vectors = {pair.key for pair in pairs if sum(size > 1 for size in pair.expected.shape) < 2}
    fresh -= {key for key in fresh & vectors if key.rpartition(".")[0] in trained_modules}
    modules = {key.rpartition(".")[0] for key in fresh} - trained_modules
    followers = {key for key in unclear if key.rpartition(".")[0] in modules}
    return frozenset(fresh | followers) if trained else frozenset()


def _numbers(
    inspected: InspectedModel, init: Init, pairs: Sequence[KeyPair], opened: Checkpoint
) -> Mapping[str, ValueStats]:
    """Return the statistics of the values in init by the keys of the model: of the model itself, if it has them."""
    if init.in_model == "all":
        return _numbers_of(inspected.stats)
    direct = {pair.found.key: pair.key for pair in pairs if pair.found.key in opened}
    chosen = opened.without(opened.keys() - direct.keys())
    return {direct[key]: found for key, found in _numbers_of(stats(chosen)).items()}


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
