"""Run the blocks of a page of the documentation, in order, in one folder that has a copy of ``fixtures/``.

- A ``console`` block is a session: each line that begins with ``$`` is a command, and the text below it is what it
  prints on stdout and then on stderr. A line ``...`` stands for any lines.
- A ``python`` block runs in the names of the blocks before it, and its functions ``test_...`` are called. A ``text``
  block directly below it is what it prints.
- A ``code-block`` with a caption is a file of that name, which the page goes on with.

A page that needs more than the first tier of tests says so in its first line: ``<!-- needs: transformers -->``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.features import records_beside_tensors
from tests.helpers_cli import ROOT, run_ckpt

__all__ = ["PAGES", "PageRunner", "needs"]

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in path.parts
}
_BLOCK = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
_CAPTION = re.compile(r"^:caption:[ ]*(?P<name>[\w./-]+)\n", re.MULTILINE)
_RECORDS = re.compile(
    r"[\d.]+ kB (?:in \d+ records read, \d+ compared with a checksum|read, \d+ of \d+ checksums compared)"
)
_RECORDS_ON_PAGES = 6
_NEEDS = re.compile(r"<!-- needs: (?P<names>[\w, -]+) -->")


def needs(page: str) -> list[str]:
    """Return the modules that a page needs beyond those of the first tier."""
    match = _NEEDS.match(page)
    return [] if match is None else [name.strip() for name in match["names"].split(",")]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: the word behind the fence, the text, and whether the block before ends just above."""

    kind: str
    body: str
    follows: bool


def blocks_of(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    end = -1
    for match in _BLOCK.finditer(page):
        yield Block(match["info"].strip(), match["body"], not page[end : match.start()].strip() if end >= 0 else False)
        end = match.end()


class PageRunner:
    """Runs pages in one folder and one namespace."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.capfd = folder, capfd
        self.names: dict[str, Any] = {}
        shutil.copytree(ROOT / "fixtures", folder / "fixtures", ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def _forget_modules(self) -> None:
        """Forget the modules that the page wrote, so that another page can write others of the same name."""
        inside = f"{self.folder}{os.sep}"
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(inside):
                del sys.modules[name]

    def run(self, page: str) -> int:
        """Run every block, and return how many ran; an ``AssertionError`` shows what differs."""
        try:
            return self._run(page)
        finally:
            self._forget_modules()

    def _run(self, page: str) -> int:
        done, printed = 0, ""
        for block in blocks_of(page):
            if block.kind == "console":
                self._session(block.body)
            elif block.kind == "python":
                printed = self._python(block.body)
            elif block.kind.startswith("{code-block}") and (caption := _CAPTION.search(block.body)):
                self._write(caption["name"], block.body[caption.end() :])
            elif block.kind == "text" and block.follows and printed:
                assert_prints(printed, block.body)
            else:
                continue
            done += 1
        return done

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"), encoding="utf-8")

    def _python(self, code: str) -> str:
        self.capfd.readouterr()
        before: Mapping[str, Any] = dict(self.names)
        exec(compile(code, "page", "exec"), self.names)  # noqa: S102 - the page is part of this repository
        for name, value in list(self.names.items()):
            if name.startswith("test_") and before.get(name) is not value:
                value(*[self.folder] * value.__code__.co_argcount)
        return self.capfd.readouterr().out

    def _session(self, text: str) -> None:
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command = f"{command[:-1].rstrip()} {more.removeprefix('>').strip()}"
            assert_prints(self._shell(command), output, f"$ {command}\n")

    def _shell(self, command: str) -> str:
        words = shlex.split(command)
        if words[0] == "ckpt" and not {"|", ">", "&&", ";", "||"} & set(words):
            ran = run_ckpt(self.capfd, *words[1:])
            return ran.out + ran.err
        if code := _EXIT_CODE.fullmatch(command):
            ran = run_ckpt(self.capfd, *shlex.split(code["arguments"]))
            if code["file"]:
                (self.folder / code["file"]).write_text(ran.out, encoding="utf-8")
            echoed = f"exit code {ran.code}\n" if (ran.code == 0) == (code["if"] == "&&") else ""
            return ("" if code["file"] else ran.out) + echoed + ran.err
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"},
        )  # fmt: skip
        return done.stdout + done.stderr


# A page shows an exit code in this way. A process that loads torch takes a second.
_EXIT_CODE = re.compile(r"ckpt (?P<arguments>[^|<>&;$]+?)( > (?P<file>\S+))? (?P<if>&&|\|\|) echo \"exit code \$\?\"")


def assert_prints(printed: str, shown: str, what: str = "") -> None:
    """Assert that a page shows what was printed; a line ``...`` stands for any lines.

    Where torch writes fewer records than on the page, their number and size are not compared.
    """
    if records_beside_tensors() < _RECORDS_ON_PAGES:
        printed, shown = (_RECORDS.sub("some records", text) for text in (printed, shown))
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else f"{re.escape(line.rstrip())}\n"
        for line in shown.strip("\n").splitlines()
    )
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    if re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is None:
        assert what + "\n".join(lines) == what + shown.strip("\n")
