"""See what a checkpoint holds, see what will load, make it fit, and prove what the optimizer trains.

Importing this costs nothing: each name is fetched from its room when it is first used, and torch only by
the functions that need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptkit.adapters import plan_extract_lora, plan_lora
    from ckptkit.align import Alignment, suggest_rules
    from ckptkit.checks import run_checks
    from ckptkit.compare import StateDictDiff, diff
    from ckptkit.destination import Output, choose_output
    from ckptkit.errors import CkptkitError
    from ckptkit.execution import Written, execute
    from ckptkit.findings import Finding, Report
    from ckptkit.formats import open_checkpoint, open_optimizer
    from ckptkit.load import LoadReport, load_into
    from ckptkit.measuring import StateDictStats, stats
    from ckptkit.merging import plan_merge
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
    from ckptkit.plan import Plan
    from ckptkit.presets import preset_names, preset_rules
    from ckptkit.readiness import Preflight, preflight
    from ckptkit.remapping import plan_remap
    from ckptkit.rules import Rules, parse_rules
    from ckptkit.tensors import Checkpoint, TensorInfo

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
    "adapters": ("plan_extract_lora", "plan_lora"),
    "align": ("Alignment", "suggest_rules"),
    "checks": ("run_checks",),
    "compare": ("StateDictDiff", "diff"),
    "destination": ("Output", "choose_output"),
    "errors": ("CkptkitError",),
    "execution": ("Written", "execute"),
    "findings": ("Finding", "Report"),
    "formats": ("open_checkpoint", "open_optimizer"),
    "load": ("LoadReport", "load_into"),
    "measuring": ("StateDictStats", "stats"),
    "merging": ("plan_merge",),
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
    "plan": ("Plan",),
    "readiness": ("Preflight", "preflight"),
    "presets": ("preset_names", "preset_rules"),
    "remapping": ("plan_remap",),
    "rules": ("Rules", "parse_rules"),
    "tensors": ("Checkpoint", "TensorInfo"),
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
