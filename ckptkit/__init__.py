"""See what a checkpoint holds, see what will load, make it fit, and prove what the optimizer trains.

Importing this imports neither torch nor numpy; functions that need them do so when called.
"""

from __future__ import annotations

from ckptkit.diff import StateDictDiff, diff
from ckptkit.errors import CkptkitError
from ckptkit.execute import Output, Written, choose_output, execute
from ckptkit.findings import Finding, Report
from ckptkit.formats import open_checkpoint
from ckptkit.load import LoadReport, load_into
from ckptkit.param_groups import ParamGroupSpec, build_param_groups, plan_param_groups, validate_param_groups
from ckptkit.plan import Plan, plan_merge, plan_remap
from ckptkit.rules import Rules, parse_rules
from ckptkit.tensors import Checkpoint, TensorInfo

__all__ = [
    "Checkpoint",
    "CkptkitError",
    "Finding",
    "LoadReport",
    "Output",
    "ParamGroupSpec",
    "Plan",
    "Report",
    "Rules",
    "StateDictDiff",
    "TensorInfo",
    "Written",
    "build_param_groups",
    "choose_output",
    "diff",
    "execute",
    "load_into",
    "open_checkpoint",
    "parse_rules",
    "plan_merge",
    "plan_param_groups",
    "plan_remap",
    "validate_param_groups",
]
