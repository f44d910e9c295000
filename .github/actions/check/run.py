"""Run one command of ckpt in a step of GitHub Actions; action.yml sets the variables that it reads."""  # noqa: INP001

from __future__ import annotations

import glob
import os
import secrets
import shlex
import subprocess
import sys


def main() -> int:
    """Return the exit code of the step."""
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # names of files may be in no encoding
    command = shlex.split(os.environ["CKPT_COMMAND"])
    arguments = shlex.split(os.environ["CKPT_ARGS"])
    lines = [line.strip() for line in os.environ["CKPT_PATHS"].splitlines()]
    paths = [path for line in lines if line for path in _found(line)]
    words = ["ckpt", *command, "--format", "actions", *arguments, *(["--", *paths] if paths else [])]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}  # Windows has another for a pipe
    try:
        done = subprocess.run(words, capture_output=True, env=environment, check=False)  # noqa: S603 - no shell
        code, out, messages = done.returncode, _text(done.stdout), _text(done.stderr)
    except FileNotFoundError:
        code, out, messages = 2, "", "ckpt: is not installed, or not on PATH\n"
    except OSError as error:  # such as too many paths for one command
        code, out, messages = 2, "", f"ckpt: {error.strerror}\n"
    # A name in a message must not be taken for a command of the workflow. The report takes care of its own names.
    token = secrets.token_hex(16)
    sys.stdout.write(f"::stop-commands::{token}\n{shlex.join(words)}\n{messages.rstrip()}\n::{token}::\n{out}")
    if code not in (0, 1) and not out:  # a report has annotations of its own
        first = messages.strip().split("\n")[0] or f"ckpt ended with exit code {code}"
        sys.stdout.write(f"::error title=ckpt::{_escaped(first)}\n")
    with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as outputs:
        outputs.write(f"exit-code={code}\n")
    return 0 if code == 1 and os.environ["CKPT_FAIL_ON_FINDINGS"] == "false" else code


def _found(pattern: str) -> list[str]:
    """Return the files that a pattern matches, in order; a path without a file stays, and ckpt says what is wrong."""
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True)) or [pattern]


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def _escaped(message: str) -> str:
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


if __name__ == "__main__":
    sys.exit(main())
