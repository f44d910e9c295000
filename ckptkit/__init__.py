"""See what a checkpoint holds, see what will load, make it fit, and prove what the optimizer trains.

Importing this costs nothing: each name is fetched from its room when it is first used, and torch only by
the functions that need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptkit.align import Alignment, suggest_rules
    from ckptkit.checks import run_checks
    from ckptkit.comparison import StateDictDiff, diff
    from ckptkit.core.checkpoint import Checkpoint, TensorInfo
    from ckptkit.core.findings import Finding, Report
    from ckptkit.errors import CkptkitError
    from ckptkit.formats import open_checkpoint, open_optimizer
    from ckptkit.loading import LoadReport, load_into
    from ckptkit.optimizer_state import (
        OptimizerLoadReport,
        OptimizerState,
        load_optimizer_state,
        optimizer_state_diff,
        write_optimizer_state,
    )
    from ckptkit.param_groups import (
        Explanation,
        ParamGroupsLock,
        ParamGroupSpec,
        assert_param_groups,
        build_param_groups,
        diff_locks,
        explain_param_group,
        lock_document,
        lock_optimizer,
        lock_param_groups,
        param_group_phases,
        param_group_preset,
        param_group_preset_names,
        parse_lock,
        plan_param_groups,
        rebind,
        validate_param_groups,
    )
    from ckptkit.plans.execute import Written, execute
    from ckptkit.plans.lora import plan_extract_lora, plan_lora
    from ckptkit.plans.merge import plan_merge
    from ckptkit.plans.output import Output, choose_output
    from ckptkit.plans.plan import Plan
    from ckptkit.plans.remap import plan_remap
    from ckptkit.readiness import Preflight, preflight
    from ckptkit.rules import Rules, parse_rules
    from ckptkit.rules.presets import preset_names, preset_rules
    from ckptkit.statistics import StateDictStats, stats

__all__ = [
    "Alignment",
    "Checkpoint",
    "CkptkitError",
    "Explanation",
    "Finding",
    "LoadReport",
    "OptimizerLoadReport",
    "OptimizerState",
    "Output",
    "ParamGroupSpec",
    "ParamGroupsLock",
    "Plan",
    "Preflight",
    "Report",
    "Rules",
    "StateDictDiff",
    "StateDictStats",
    "TensorInfo",
    "Written",
    "assert_param_groups",
    "build_param_groups",
    "choose_output",
    "diff",
    "diff_locks",
    "execute",
    "explain_param_group",
    "load_into",
    "load_optimizer_state",
    "lock_document",
    "lock_optimizer",
    "lock_param_groups",
    "open_checkpoint",
    "open_optimizer",
    "optimizer_state_diff",
    "param_group_phases",
    "param_group_preset",
    "param_group_preset_names",
    "parse_lock",
    "parse_rules",
    "plan_extract_lora",
    "plan_lora",
    "plan_merge",
    "plan_param_groups",
    "plan_remap",
    "preflight",
    "preset_names",
    "preset_rules",
    "rebind",
    "run_checks",
    "stats",
    "suggest_rules",
    "validate_param_groups",
    "write_optimizer_state",
]

_ROOMS = {
    "plans.lora": ("plan_extract_lora", "plan_lora"),
    "align": ("Alignment", "suggest_rules"),
    "checks": ("run_checks",),
    "comparison": ("StateDictDiff", "diff"),
    "plans.output": ("Output", "choose_output"),
    "errors": ("CkptkitError",),
    "plans.execute": ("Written", "execute"),
    "core.findings": ("Finding", "Report"),
    "formats": ("open_checkpoint", "open_optimizer"),
    "loading": ("LoadReport", "load_into"),
    "statistics": ("StateDictStats", "stats"),
    "plans.merge": ("plan_merge",),
    "optimizer_state": (
        "OptimizerLoadReport",
        "OptimizerState",
        "load_optimizer_state",
        "optimizer_state_diff",
        "write_optimizer_state",
    ),
    "param_groups": (
        "Explanation",
        "ParamGroupsLock",
        "diff_locks",
        "explain_param_group",
        "lock_document",
        "lock_optimizer",
        "lock_param_groups",
        "parse_lock",
        "ParamGroupSpec",
        "assert_param_groups",
        "build_param_groups",
        "param_group_phases",
        "param_group_preset",
        "param_group_preset_names",
        "plan_param_groups",
        "rebind",
        "validate_param_groups",
    ),
    "plans.plan": ("Plan",),
    "readiness": ("Preflight", "preflight"),
    "rules.presets": ("preset_names", "preset_rules"),
    "plans.remap": ("plan_remap",),
    "rules": ("Rules", "parse_rules"),
    "core.checkpoint": ("Checkpoint", "TensorInfo"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    """Fetch a public name from its room."""
    if name not in _HOME:
        raise AttributeError(f"module 'ckptkit' has no attribute {name!r}")
    value = getattr(import_module(f"ckptkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
