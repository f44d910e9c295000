"""See what a checkpoint holds, see what will load, make it fit, and prove what the optimizer trains.

Public are the names in ``__all__`` and the modules ``testing`` (assertions), ``optimizer_state`` (optimizer state by
parameter name), ``integrations`` (callbacks for trainers) and ``errors``. Everything else may change without notice.

Importing this costs nothing: each name is fetched from its module when it is first used, and torch only by
the functions that need it.
"""

from __future__ import annotations

from importlib import import_module

# The public names and the modules that define them. The stub beside this file is generated from this table.
_HOMES = {
    "Alignment": "align",
    "ArgumentError": "errors",
    "AsLayer": "plans.adapters.layers",
    "ChangedError": "errors",
    "Checkpoint": "core.checkpoint",
    "CkptkitError": "errors",
    "Delta": "deltas.delta",
    "DigestCheck": "digests.check",
    "Digests": "digests.model",
    "Explanation": "param_groups.explain",
    "Finding": "core.findings",
    "FormatError": "errors",
    "GroupsError": "errors",
    "LoadError": "errors",
    "LoadReport": "loading.report",
    "ModelError": "errors",
    "OnMismatch": "plans.policies",
    "OnMissing": "plans.policies",
    "OnUnexpected": "plans.policies",
    "OptimizerLoadReport": "optimizer_state.loading.report",
    "OptimizerState": "optimizer_state.model",
    "Output": "plans.output",
    "OutputError": "errors",
    "ParamGroupSpec": "param_groups.spec",
    "ParamGroupsLock": "param_groups.lock",
    "PathError": "errors",
    "Plan": "plans.plan",
    "PlanError": "errors",
    "Preflight": "readiness",
    "RecipeError": "errors",
    "RayExecutor": "tasks.ray",
    "Report": "core.findings",
    "RuleError": "errors",
    "Rules": "rules.model",
    "StateDictDiff": "comparison",
    "StateDictStats": "statistics.state_dict_stats",
    "TensorInfo": "core.checkpoint",
    "ValueDiff": "comparison.values",
    "ValueDifference": "comparison.values",
    "WorkerError": "errors",
    "Written": "plans.writing.written",
    "apply_delta": "deltas.applying",
    "assert_param_groups": "param_groups.validate",
    "build_param_groups": "param_groups.build",
    "check_digests": "digests.check",
    "choose_output": "plans.output",
    "compare_values": "comparison.by_value",
    "convert": "plans.one_call",
    "convert_adapter": "plans.one_call",
    "diff": "comparison",
    "diff_locks": "param_groups.compare.locks",
    "digest": "digests",
    "execute": "plans.execute",
    "explain_param_group": "param_groups.explain",
    "extract_lora": "plans.one_call",
    "load_into": "loading",
    "load_optimizer_state": "optimizer_state.load",
    "load_plan": "plans.saved",
    "load_rules": "rules.load",
    "lock_document": "param_groups.lock",
    "lock_optimizer": "param_groups.lock",
    "lock_param_groups": "param_groups.lock",
    "make_delta": "deltas.making",
    "merge": "plans.one_call",
    "merge_lora": "plans.one_call",
    "open_checkpoint": "formats",
    "open_optimizer": "formats",
    "optimizer_state_diff": "optimizer_state.compare",
    "param_group_phases": "param_groups.presets",
    "param_group_preset": "param_groups.presets",
    "param_group_preset_names": "param_groups.presets",
    "parse_lock": "param_groups.lock",
    "parse_rules": "rules.parse",
    "plan_apply_delta": "deltas.planning",
    "plan_convert_adapter": "plans.adapters.convert",
    "plan_extract_lora": "plans.adapters.extract",
    "plan_lora": "plans.adapters.fold",
    "plan_merge": "plans.merge",
    "plan_param_groups": "param_groups.plan",
    "plan_recipe": "plans.recipes.planning",
    "plan_remap": "plans.remap",
    "preflight": "readiness",
    "preset_names": "rules.presets",
    "preset_rules": "rules.load",
    "rebind": "param_groups.rebind",
    "run_checks": "checks",
    "save_plan": "plans.saved",
    "stats": "statistics.state_dict_stats",
    "suggest_rules": "align",
    "validate_param_groups": "param_groups.validate",
    "write_optimizer_state": "optimizer_state.write",
}

_OF_COMMANDS = {
    "apply": "apply_delta",
    "check": "run_checks",
    "delta": "make_delta",
    "remap": "plan_remap",
    "show": "open_checkpoint",
}

_MODULES = ("errors", "integrations", "optimizer_state", "testing")

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    value: object
    if name in _HOMES:
        from ckptkit.core.gc_pause import pause_gc

        with pause_gc():  # modules are not garbage, and a collection would look at all objects of torch
            value = getattr(import_module(f"ckptkit.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"ckptkit.{name}")
    elif name == "__version__":
        try:
            value = import_module("importlib.metadata").version("ckptkit")
        except ImportError:  # a checkout on the path that is not installed
            raise AttributeError("ckptkit is not installed, so it has no __version__") from None
    else:
        same = f"; {_OF_COMMANDS[name]} does what ckpt {name} does" if name in _OF_COMMANDS else ""
        raise AttributeError(f"module 'ckptkit' has no attribute {name!r}{same}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(("__version__", *__all__, *_MODULES))
