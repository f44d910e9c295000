"""Files that are made from the code: ``python -m tests.generated`` writes them, and a test holds them against it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import ckptkit
from ckptkit.core.findings import Code
from ckptkit.plans.methods.model import Method
from ckptkit.plans.methods.table import METHODS
from ckptkit.render.merging.methods import inputs_text, parameter_rows
from tests.json_schemas import SCHEMAS

ROOT = Path(__file__).parent.parent

# The modules that list codes, and what the section of each is called.
_CODES: dict[str, str] = {
    "ckptkit.core.findings.codes": "Every check",
    "ckptkit.formats.codes": "Readers: warnings of ckpt show and findings of ckpt check",
    "ckptkit.loading.codes": "load_into",
    "ckptkit.param_groups.codes": "ckpt groups, validate_param_groups and rebind",
    "ckptkit.optimizer_state.codes": "ckpt optim",
    "ckptkit.readiness.codes": "ckpt preflight",
    "ckptkit.checks.codes": "ckpt check",
    "ckptkit.cli.git.codes": "ckpt git frozen",
}

# The public names by the questions that a user has; the page of the Python API lists them in this order.
_API: dict[str, str] = {
    "Open and inspect": "open_checkpoint open_optimizer Checkpoint TensorInfo stats StateDictStats run_checks "
    "digest Digests check_digests DigestCheck",
    "Compare": "diff StateDictDiff compare_values ValueDiff ValueDifference suggest_rules Alignment",
    "Load into a model": "load_into LoadReport OnMissing OnUnexpected OnMismatch",
    "Convert and merge with one call": "convert merge merge_lora extract_lora convert_adapter Written",
    "Patches": "make_delta apply_delta plan_apply_delta Delta",
    "Plan, then write": "plan_remap plan_merge plan_recipe plan_lora plan_extract_lora plan_convert_adapter "
    "AsLayer Plan choose_output Output execute save_plan load_plan RayExecutor",
    "Rules": "load_rules parse_rules preset_rules preset_names Rules",
    "Param groups": "build_param_groups plan_param_groups validate_param_groups assert_param_groups "
    "explain_param_group Explanation param_group_preset param_group_preset_names param_group_phases ParamGroupSpec "
    "lock_param_groups lock_optimizer lock_document parse_lock diff_locks ParamGroupsLock rebind",
    "Optimizer state": "load_optimizer_state OptimizerLoadReport OptimizerState optimizer_state_diff "
    "write_optimizer_state",
    "Before training": "preflight Preflight Report Finding",
    "Errors": "CkptkitError ArgumentError PathError FormatError ChangedError ModelError LoadError RuleError PlanError "
    "RecipeError OutputError GroupsError WorkerError",
}
# The public modules, with the names that the page shows of each.
_API_MODULES = ("ckptkit.testing", "ckptkit.optimizer_state")


def files() -> dict[Path, str]:
    """Return the text of each generated file."""
    package = ROOT / "ckptkit"
    return {
        package / "__init__.pyi": _stub(),
        package / "core" / "findings" / "code_names.py": _code_names(),
        ROOT / "docs" / "codes.md": "\n".join(_codes_page()),
        ROOT / "docs" / "api.md": "\n".join(_api_page()),
        ROOT / "docs" / "methods.md": "\n".join(_methods_page()),
        **{
            ROOT / "docs" / "schemas" / f"{name}.schema.json": f"{json.dumps(schema, indent=2)}\n"
            for name, schema in SCHEMAS.items()
        },
    }


def code_tables() -> dict[str, tuple[Code, ...]]:
    """Return the codes of each module that lists them."""
    return {module: import_module(module).CODES for module in _CODES}


def _stub() -> str:
    homes: dict[str, str] = vars(ckptkit)["_HOMES"]
    imports = [f"from ckptkit.{home} import {name} as {name}" for name, home in homes.items()]
    imports += [f"from ckptkit import {module} as {module}" for module in vars(ckptkit)["_MODULES"]]
    names = [f'    "{name}",' for name in ckptkit.__all__]
    return "\n".join([*sorted(imports), "", "__version__: str", "", "__all__ = [", *names, "]", ""])


def _code_names() -> str:
    """Return the module that lists all codes, so that an ignore list can be checked without importing every check."""
    names = sorted(code.name for codes in code_tables().values() for code in codes)
    return "\n".join(
        [
            '"""The codes of all findings, which ``python -m tests.generated`` writes from the declarations."""',
            "",
            "from __future__ import annotations",
            "",
            '__all__ = ["CODE_NAMES"]',
            "",
            "CODE_NAMES = frozenset(",
            "    {",
            *(f'        "{name}",' for name in names),
            "    }",
            ")",
            "",
        ]
    )


def _codes_page() -> Iterator[str]:
    yield "# Codes of findings"
    yield ""
    yield "Each finding has a code. Codes are stable: a script can select by them. If a code has several severities,"
    yield "the usual one comes first."
    yield ""
    yield "`ignore=`, `--ignore` and `ignore = [...]` at the top of a spec of param groups leave expected"
    yield "findings out. Each entry is `CODE` or a pattern such as `groups.*`, alone or with `:KEY-PATTERN`, such as"
    yield "`groups.decay:*.norm.*`."
    for module, title in _CODES.items():
        yield from ("", f"## {title}", "", "| code | severity | meaning |", "|---|---|---|")
        yield from (
            f"| `{code.name}` | {' or '.join(code.severities)} | {code.meaning} |"
            for code in import_module(module).CODES
        )
    yield ""


_METHODS_PAGE = """\
# Methods of merging

These methods compute with the values of all inputs: `ckpt merge A B C -o OUT --method NAME`. `ckpt merge
--help-methods` prints the same list, and with a name one method.
[Merge models](howto/merge.md) says which method is for what. A
[recipe](recipes.md) can set other parameters for some keys.

The inputs are `x_1`, `x_2` and so on, with the weights `w_i`. The base is `b`, and `d_i = x_i - b` is a task vector.
Give a parameter for all inputs as `--param NAME=VALUE`, and one "for each input" as `--param INPUT.NAME=VALUE`."""


def _methods_page() -> Iterator[str]:
    yield _METHODS_PAGE
    for name, method in METHODS.items():
        yield from ("", f"## {name}", "", _formula(method), "")
        paper = method.paper
        title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper and paper.arxiv else paper
        yield f"Merges {inputs_text(method)}.{f' Source: {title}.' if title else ''}"
        if rows := parameter_rows(method):
            yield from ("", "| parameter | values | default | what it is |", "|---|---|---|---|")
            yield from (
                f"| `{parameter}` | {values} | {default.removeprefix('default ')} | {meaning} |"
                for parameter, values, default, meaning in rows
            )
    yield ""


def _formula(method: type[Method]) -> str:
    """Return the first sentence of the description of a method, with formulas as code."""
    return " ".join(inspect.cleandoc(method.__doc__ or "").partition("\n\n")[0].split()).replace("``", "`")


_API_PAGE = """\
# Python API

Import these names from `ckptkit` itself, and those of the last two sections from the module in the title. For a
checkpoint, you can give a path, a `dict` of tensors, a `Module` or an open `Checkpoint`. For rules, a spec or a plan,
you can give a path or a `dict`. What a call opens, it closes.

Every result prints as in the terminal: `print(result)` is the page, a notebook shows the same page, `repr(result)` is
one line, and `result.to_dict()` is [the document](schemas.md) of `--json`. A result has no truth value: ask `.ok` or
`.different`."""

_ALIAS = "The type of the policy: one action for all keys, or a mapping of patterns to actions."


def _api_page() -> Iterator[str]:
    listed = [name for names in _API.values() for name in names.split()]
    if sorted(listed) != list(ckptkit.__all__):
        raise ValueError(f"list each public name once in _API: {sorted({*listed} ^ {*ckptkit.__all__})}")
    yield _API_PAGE
    for title, names in _API.items():
        yield from ("", f"## {title}", "", "```{eval-rst}")
        for name in names.split():
            kind = _kind(getattr(ckptkit, name))
            yield f".. auto{kind}:: ckptkit.{name}"
            yield from ("", f"   {_ALIAS}", "") if kind == "data" else ()
        yield "```"
    for module in _API_MODULES:
        yield from ("", f"## {module}", "", "```{eval-rst}", f".. automodule:: {module}", "   :no-members:", "")
        yield from (f".. autofunction:: {module}.{name}" for name in import_module(module).__all__)
        yield "```"
    yield ""


def _kind(value: object) -> str:
    """Return the kind of a public name, as the directives of autodoc call it; a type alias is data."""
    if inspect.isfunction(value):
        return "function"
    return "class" if isinstance(value, type) else "data"


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
