"""Files that are made from the code: ``python -m tests.generated`` writes them, and a test holds them against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import ckptkit
from ckptkit.core.findings import Code
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
}


def files() -> dict[Path, str]:
    """Return the text of each generated file."""
    package = ROOT / "ckptkit"
    return {
        package / "__init__.pyi": _stub(),
        package / "core" / "findings" / "code_names.py": _code_names(),
        ROOT / "docs" / "codes.md": "\n".join(_codes_page()),
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
    yield "Each finding has a code. Codes are stable: a script can select by them. The severity is the usual one first."
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


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
