"""The command ``ckpt doctor``: the versions of what ckptkit runs with, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.options import report_options
from ckptkit.cli.common.printing import ReportFormat, echo_report
from ckptkit.core.text import listed, plural
from ckptkit.render.page import Line, Page, Table, as_code

__all__ = ["doctor"]

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<extras>[\w,-]+)\])?\s*(?:>=(?P<bound>[\d.]+))?[^;]*")
_EXTRA = re.compile(r"""extra == ['"](?P<extra>[\w-]+)['"]""")


@dataclass(frozen=True, slots=True)
class _Package:
    """A package that ckptkit or one of its extras needs; ``bound`` is the lowest version that works."""

    name: str
    bound: str
    version: str | None

    @property
    def problem(self) -> str:
        if self.version is None:
            return "missing"
        return "too old" if _numbers(self.version) < _numbers(self.bound) else ""


@click.command(cls=Command)
@report_options
@click.pass_context
def doctor(context: click.Context, *, report_format: ReportFormat) -> None:
    """Show the versions that ckpt runs with, which extras are installed, and what is missing.

    Imports torch, because an import can fail where the package is installed. Exit code 1 if ckpt cannot work.

    \b
    ckpt doctor
    ckpt doctor --markdown      for a bug report
    """  # noqa: D301 - \b is click's mark
    required, extras = _requirements()
    torch = _torch()
    problems = [*_problems(required, torch), *_other_programs()]
    echo_report(
        report_format,
        lambda: _page(required, extras, torch, problems),
        lambda: {
            "schema": "ckptkit.doctor/1",
            "ckptkit": _version("ckptkit"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch,
            "packages": [_document(package) for package in required],
            "extras": [{"name": name, "packages": [_document(p) for p in packages]} for name, packages in extras],
            "problems": problems,
        },
    )
    context.exit(1 if problems else 0)


def _page(
    required: list[_Package], extras: list[tuple[str, list[_Package]]], torch: dict[str, object], problems: list[str]
) -> Page:
    rows = [
        (
            "ckptkit",
            _version("ckptkit") or "not installed",
            "",
            os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
        ),
        ("Python", platform.python_version(), "", sys.executable),
        *((package.name, package.version or "missing", f">= {package.bound}", "") for package in required),
    ]
    states = []
    for name, packages in extras:
        missing = [package.name for package in packages if package.problem]
        installed = len(packages) - len(missing)
        state = "installed" if not missing else f"{installed} of {len(packages)} installed"
        states.append((name, state, listed(missing, 4, show=str) if missing else ""))
    torch_line = f"torch: {torch['error']}" if torch["error"] else f"torch computes on {torch['devices']}"
    return [
        Table(("", "version", "needs", "at"), tuple(rows)),
        Table(("extra", "state", "missing or too old"), tuple(states)),
        Line((torch_line,)),
        Line((platform.platform(),)),
        *(Line(("problem: ", as_code(problem))) for problem in problems),
        Line(((plural(len(problems), "problem") if problems else "nothing is missing that ckpt needs"),)),
    ]


def _document(package: _Package) -> dict[str, str | None]:
    return {
        "name": package.name, "version": package.version, "lowest": package.bound or None,
        "problem": package.problem or None,
    }  # fmt: skip


def _requirements() -> tuple[list[_Package], list[tuple[str, list[_Package]]]]:
    """Return the packages that ckptkit needs, and those of each extra that a user could want."""
    required: list[_Package] = []
    extras: dict[str, list[_Package]] = {}
    for text in (metadata.requires("ckptkit") or ()) if _version("ckptkit") else ():
        match = _REQUIREMENT.match(text)
        if match is None or match["name"] == "ckptkit":
            continue
        package = _Package(match["name"], match["bound"] or "", _version(match["name"]))
        extra = _EXTRA.search(text)
        if extra is None:
            required.append(package)
        else:
            extras.setdefault(extra["extra"], []).append(package)
    return required, list(extras.items())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)  # type: ignore[index]


def _torch() -> dict[str, object]:
    """Return the build of torch and its devices, or the error of its import."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0], "devices": "", "cuda": None}
    accelerators = [
        name for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if module.is_available()
    ]
    return {"error": None, "devices": ", ".join(["cpu", *accelerators]), "cuda": torch.version.cuda}


def _problems(required: list[_Package], torch: dict[str, object]) -> Iterator[str]:
    if _version("ckptkit") is None:
        yield "ckptkit is not installed, so what it needs is not known: pip install -e . in its checkout"
    for package in required:
        if package.problem:
            yield f"{package.name} is {package.problem}: ckptkit needs {package.name}>={package.bound}"
        elif package.name == "torch" and torch["error"]:
            yield f"torch is installed and cannot be imported: {torch['error']}"


def _other_programs() -> Iterator[str]:
    """Yield a sentence where the shell would start another program that is also called ``ckpt``."""
    started = shutil.which("ckpt")
    ours = os.path.join(os.path.dirname(sys.executable), "ckpt")
    if started and os.path.exists(ours) and not os.path.samefile(started, ours):
        yield f"{started} comes first on PATH and is another program than {ours}"
