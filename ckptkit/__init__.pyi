from ckptkit import errors as errors
from ckptkit import integrations as integrations
from ckptkit import optimizer_state as optimizer_state
from ckptkit import testing as testing
from ckptkit.align import Alignment as Alignment
from ckptkit.align import suggest_rules as suggest_rules
from ckptkit.checks import run_checks as run_checks
from ckptkit.comparison import StateDictDiff as StateDictDiff
from ckptkit.comparison import diff as diff
from ckptkit.comparison.by_value import compare_values as compare_values
from ckptkit.comparison.values import ValueDiff as ValueDiff
from ckptkit.comparison.values import ValueDifference as ValueDifference
from ckptkit.core.checkpoint import Checkpoint as Checkpoint
from ckptkit.core.checkpoint import TensorInfo as TensorInfo
from ckptkit.core.findings import Finding as Finding
from ckptkit.core.findings import Report as Report
from ckptkit.deltas.applying import apply_delta as apply_delta
from ckptkit.deltas.delta import Delta as Delta
from ckptkit.deltas.making import make_delta as make_delta
from ckptkit.deltas.planning import plan_apply_delta as plan_apply_delta
from ckptkit.digests import digest as digest
from ckptkit.digests.check import DigestCheck as DigestCheck
from ckptkit.digests.check import check_digests as check_digests
from ckptkit.digests.model import Digests as Digests
from ckptkit.errors import ArgumentError as ArgumentError
from ckptkit.errors import ChangedError as ChangedError
from ckptkit.errors import CkptkitError as CkptkitError
from ckptkit.errors import FormatError as FormatError
from ckptkit.errors import GroupsError as GroupsError
from ckptkit.errors import LoadError as LoadError
from ckptkit.errors import ModelError as ModelError
from ckptkit.errors import OutputError as OutputError
from ckptkit.errors import PathError as PathError
from ckptkit.errors import PlanError as PlanError
from ckptkit.errors import RecipeError as RecipeError
from ckptkit.errors import RuleError as RuleError
from ckptkit.errors import WorkerError as WorkerError
from ckptkit.formats import open_checkpoint as open_checkpoint
from ckptkit.formats import open_optimizer as open_optimizer
from ckptkit.loading import load_into as load_into
from ckptkit.loading.report import LoadReport as LoadReport
from ckptkit.optimizer_state.compare import optimizer_state_diff as optimizer_state_diff
from ckptkit.optimizer_state.load import load_optimizer_state as load_optimizer_state
from ckptkit.optimizer_state.loading.report import OptimizerLoadReport as OptimizerLoadReport
from ckptkit.optimizer_state.model import OptimizerState as OptimizerState
from ckptkit.optimizer_state.write import write_optimizer_state as write_optimizer_state
from ckptkit.param_groups.build import build_param_groups as build_param_groups
from ckptkit.param_groups.compare.locks import diff_locks as diff_locks
from ckptkit.param_groups.explain import Explanation as Explanation
from ckptkit.param_groups.explain import explain_param_group as explain_param_group
from ckptkit.param_groups.lock import ParamGroupsLock as ParamGroupsLock
from ckptkit.param_groups.lock import lock_document as lock_document
from ckptkit.param_groups.lock import lock_optimizer as lock_optimizer
from ckptkit.param_groups.lock import lock_param_groups as lock_param_groups
from ckptkit.param_groups.lock import parse_lock as parse_lock
from ckptkit.param_groups.plan import plan_param_groups as plan_param_groups
from ckptkit.param_groups.presets import param_group_phases as param_group_phases
from ckptkit.param_groups.presets import param_group_preset as param_group_preset
from ckptkit.param_groups.presets import param_group_preset_names as param_group_preset_names
from ckptkit.param_groups.rebind import rebind as rebind
from ckptkit.param_groups.spec import ParamGroupSpec as ParamGroupSpec
from ckptkit.param_groups.validate import assert_param_groups as assert_param_groups
from ckptkit.param_groups.validate import validate_param_groups as validate_param_groups
from ckptkit.plans.adapters.convert import plan_convert_adapter as plan_convert_adapter
from ckptkit.plans.adapters.extract import plan_extract_lora as plan_extract_lora
from ckptkit.plans.adapters.fold import plan_lora as plan_lora
from ckptkit.plans.adapters.layers import AsLayer as AsLayer
from ckptkit.plans.execute import execute as execute
from ckptkit.plans.merge import plan_merge as plan_merge
from ckptkit.plans.one_call import convert as convert
from ckptkit.plans.one_call import convert_adapter as convert_adapter
from ckptkit.plans.one_call import extract_lora as extract_lora
from ckptkit.plans.one_call import merge as merge
from ckptkit.plans.one_call import merge_lora as merge_lora
from ckptkit.plans.output import Output as Output
from ckptkit.plans.output import choose_output as choose_output
from ckptkit.plans.plan import Plan as Plan
from ckptkit.plans.policies import OnMismatch as OnMismatch
from ckptkit.plans.policies import OnMissing as OnMissing
from ckptkit.plans.policies import OnUnexpected as OnUnexpected
from ckptkit.plans.recipes.planning import plan_recipe as plan_recipe
from ckptkit.plans.remap import plan_remap as plan_remap
from ckptkit.plans.saved import load_plan as load_plan
from ckptkit.plans.saved import save_plan as save_plan
from ckptkit.plans.writing.written import Written as Written
from ckptkit.readiness import Preflight as Preflight
from ckptkit.readiness import preflight as preflight
from ckptkit.rules.load import load_rules as load_rules
from ckptkit.rules.load import preset_rules as preset_rules
from ckptkit.rules.model import Rules as Rules
from ckptkit.rules.parse import parse_rules as parse_rules
from ckptkit.rules.presets import preset_names as preset_names
from ckptkit.statistics.state_dict_stats import StateDictStats as StateDictStats
from ckptkit.statistics.state_dict_stats import stats as stats
from ckptkit.tasks.ray import RayExecutor as RayExecutor

__version__: str

__all__ = [
    "Alignment",
    "ArgumentError",
    "AsLayer",
    "ChangedError",
    "Checkpoint",
    "CkptkitError",
    "Delta",
    "DigestCheck",
    "Digests",
    "Explanation",
    "Finding",
    "FormatError",
    "GroupsError",
    "LoadError",
    "LoadReport",
    "ModelError",
    "OnMismatch",
    "OnMissing",
    "OnUnexpected",
    "OptimizerLoadReport",
    "OptimizerState",
    "Output",
    "OutputError",
    "ParamGroupSpec",
    "ParamGroupsLock",
    "PathError",
    "Plan",
    "PlanError",
    "Preflight",
    "RayExecutor",
    "RecipeError",
    "Report",
    "RuleError",
    "Rules",
    "StateDictDiff",
    "StateDictStats",
    "TensorInfo",
    "ValueDiff",
    "ValueDifference",
    "WorkerError",
    "Written",
    "apply_delta",
    "assert_param_groups",
    "build_param_groups",
    "check_digests",
    "choose_output",
    "compare_values",
    "convert",
    "convert_adapter",
    "diff",
    "diff_locks",
    "digest",
    "execute",
    "explain_param_group",
    "extract_lora",
    "load_into",
    "load_optimizer_state",
    "load_plan",
    "load_rules",
    "lock_document",
    "lock_optimizer",
    "lock_param_groups",
    "make_delta",
    "merge",
    "merge_lora",
    "open_checkpoint",
    "open_optimizer",
    "optimizer_state_diff",
    "param_group_phases",
    "param_group_preset",
    "param_group_preset_names",
    "parse_lock",
    "parse_rules",
    "plan_apply_delta",
    "plan_convert_adapter",
    "plan_extract_lora",
    "plan_lora",
    "plan_merge",
    "plan_param_groups",
    "plan_recipe",
    "plan_remap",
    "preflight",
    "preset_names",
    "preset_rules",
    "rebind",
    "run_checks",
    "save_plan",
    "stats",
    "suggest_rules",
    "validate_param_groups",
    "write_optimizer_state",
]
