"""Plans of one input: renamed, filtered and cast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptkit.errors import PlanError
from ckptkit.plan import Dropped, Plan
from ckptkit.rules import Rules, apply_rules, as_rules
from ckptkit.steps import dropped_entries, float_dtype, is_float, make_step, refuse_suspicious
from ckptkit.text import plural
from ckptkit.torch_bridge import StateDictLike, as_checkpoint

__all__ = ["plan_remap"]


def plan_remap(source: StateDictLike, rules: Rules | list[str] | None = None, *, dtype: str | None = None) -> Plan:
    """Return the plan that renames and filters the tensors of ``source``, and casts floats to ``dtype`` if given.

    ``dtype`` is a safetensors code or torch's name (``BF16``, ``bfloat16``); integers and booleans keep
    theirs. Raises ``RuleError`` where rules collide or match nothing, ``PlanError`` where nothing would be
    left, a tensor cannot be copied, or the file refers to code that looks malicious.
    """
    checkpoint = as_checkpoint(source, "source")
    refuse_suspicious(checkpoint, "source")
    key_map = apply_rules(as_rules(rules), checkpoint)
    wanted = None if dtype is None else float_dtype(dtype)
    steps = []
    for new, how in key_map.outputs().items():
        info = how.describe(new, checkpoint)
        out = replace(info, key=new, dtype=wanted if wanted and is_float(info.dtype) else info.dtype)
        steps.append(make_step(out, how, "source", checkpoint))
    if not steps:
        raise PlanError(f"nothing would be left of {plural(len(checkpoint), 'tensor')}")
    dropped = [Dropped("source", key, reason) for key, reason in key_map.dropped.items()]
    dropped += dropped_entries(checkpoint, "source")
    versions = _carried(checkpoint.versions, key_map.renamed)
    return Plan(tuple(steps), tuple(dropped), checkpoint.metadata, key_map.notes, versions)


def _carried(versions: Mapping[str, int], renamed: Mapping[str, str]) -> dict[str, int]:
    """Return module versions under the modules' new names; a module whose tensors part ways has none."""
    if all(old == new for old, new in renamed.items()):
        return dict(versions)
    homes: dict[str, set[str]] = {}
    for old, new in renamed.items():
        (home, _, leaf), (new_home, _, new_leaf) = old.rpartition("."), new.rpartition(".")
        homes.setdefault(home, set()).add(new_home if leaf == new_leaf else "*")
    moved = {home: new for home, (new, *others) in homes.items() if not others and new != "*"}
    return {moved[home]: version for home, version in versions.items() if home in moved}
