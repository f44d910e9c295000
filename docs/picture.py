"""Draw the picture of the README: ``python docs/picture.py`` runs the commands in a terminal and writes an SVG."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "_static" / "terminal.svg"
COMMANDS = (
    "ckpt diff fixtures/lenet_10class.pth fixtures/lenet_tuned.safetensors --values -q",
    "ckpt diff py:fixtures.lenet:build fixtures/lenet_ddp.pt --strip auto -q",
    "ckpt groups validate --model py:fixtures.lenet:build fixtures/groups.toml",
)
_COLUMNS = 100
_THEME = TerminalTheme(
    (27, 31, 39),
    (214, 219, 229),
    [(27, 31, 39), (255, 107, 107), (126, 211, 134), (240, 200, 100), (110, 168, 254), (200, 146, 234), (110, 210, 220),
     (214, 219, 229)],
)  # fmt: skip
# A picture that is shown inside another page may load no font.
_FONTS = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def in_a_terminal(command: str) -> str:
    """Return what a command prints on a terminal, with its colours."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(_COLUMNS), "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    arguments = [sys.executable, "-m", "ckptkit", *command.split()[1:]]
    with subprocess.Popen(arguments, stdout=theirs, stderr=theirs, stdin=theirs, cwd=ROOT, env=environment):
        os.close(theirs)
        pieces = []
        try:
            while piece := os.read(ours, 65536):
                pieces.append(piece)
        except OSError:  # Linux reports the end of a terminal as an error
            pass
    os.close(ours)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def draw(commands: Sequence[str]) -> str:
    """Return the SVG of a terminal in which the commands ran."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=_COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        for number, command in enumerate(commands):
            if number:
                console.print()
            console.print(Text.assemble(("$ ", "bold cyan"), (command, "bold")))
            console.print(Text.from_ansi(in_a_terminal(command).rstrip()), soft_wrap=True)
        console.print()  # else the frame cuts the descenders of the last line
        before, rest = CONSOLE_SVG_FORMAT.split("    @font-face", 1)
        form = before + "    " + rest[rest.index(".{unique_id}-matrix") :].replace("Fira Code, monospace", _FONTS)
        return console.export_svg(title="ckpt", theme=_THEME, code_format=form, unique_id="ckpt")


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(COMMANDS), encoding="utf-8")
