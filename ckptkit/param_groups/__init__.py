"""Which parameter trains with which options: specs, groups for torch optimizers, and proof that they fit the model."""

from __future__ import annotations

from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.compare import diff_locks
from ckptkit.param_groups.explain import Explanation, explain_param_group
from ckptkit.param_groups.lock import ParamGroupsLock, lock_document, lock_optimizer, lock_param_groups, parse_lock
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedGroup, PlannedParameter, check_spec, plan_param_groups
from ckptkit.param_groups.presets import param_group_phases, param_group_preset, param_group_preset_names
from ckptkit.param_groups.rebind import rebind
from ckptkit.param_groups.spec import GroupRule, Modifier, ParamGroupSpec
from ckptkit.param_groups.validate import assert_param_groups, validate_param_groups

__all__ = [
    "Explanation",
    "GroupRule",
    "Modifier",
    "ParamGroupSpec",
    "ParamGroupsLock",
    "ParamGroupsPlan",
    "PlannedGroup",
    "PlannedParameter",
    "SpecLike",
    "assert_param_groups",
    "build_param_groups",
    "check_spec",
    "diff_locks",
    "explain_param_group",
    "lock_document",
    "lock_optimizer",
    "lock_param_groups",
    "param_group_phases",
    "param_group_preset",
    "param_group_preset_names",
    "parse_lock",
    "parse_spec",
    "plan_param_groups",
    "rebind",
    "validate_param_groups",
]
