"""The command line: one group, one file a command, and the one map from what happened to an exit code.

0: nothing to report. 1: differences or findings. 2: trouble. 128+n: signal n. 70: a bug, with its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from ckptkit.cli.convert import convert
from ckptkit.cli.diff import diff
from ckptkit.cli.groups import groups
from ckptkit.cli.merge import merge
from ckptkit.cli.remap import remap
from ckptkit.cli.show import show
from ckptkit.errors import CkptkitError
from ckptkit.text import printable

__all__ = ["ckpt", "main", "run"]


def _version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"ckpt {version('ckptkit')}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-V", "--version", is_flag=True, callback=_version, expose_value=False, is_eager=True,
              help="Show the version and exit.")  # fmt: skip
@click.pass_context
def ckpt(context: click.Context) -> None:
    """See what a checkpoint holds, see what will load, make it fit, and prove what the optimizer trains.

    \b
    A PATH is a file or directory of any known format, told by its content;
    PATH::a.b is a mapping inside a checkpoint; py:package.module:callable
    is a live model (this runs that code, and only then).

    Exit codes: 0 nothing to report, 1 differences or findings, 2 trouble.
    """  # noqa: D301 - \b is click's mark
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        context.color = False


for command in (show, diff, remap, merge, convert, groups):
    ckpt.add_command(command)


class _Stopped(BaseException):
    """A signal asked for the end; raised so that temporary files are removed on the way out."""


def _stop(number: int, _frame: FrameType | None) -> None:
    raise _Stopped(number)


def run() -> None:
    """Run the program on the process's arguments and exit with its code."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run the program and return the exit code; every expected failure is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode must not turn a name into a crash
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        code = ckpt.main(list(arguments), prog_name="ckpt", standalone_mode=False)
        sys.stdout.flush()
    except CkptkitError as error:
        return _complain(error.reason, error.hint, error.path)
    except click.UsageError as error:
        context = error.ctx.command_path if error.ctx else "ckpt"
        return _complain(error.format_message(), f"see {context} --help", None)
    except click.ClickException as error:
        return _complain(error.format_message(), None, None)
    except click.Abort:
        return 128 + signal.SIGINT
    except _Stopped as stopped:
        return 128 + int(stopped.args[0])
    except BrokenPipeError:
        return _output_gone(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EBADF, errno.EIO) and error.filename is None:
            _output_gone(2)
            return _complain(f"standard output: {os.strerror(error.errno).lower()}", None, None)
        return _bug()
    except Exception:  # noqa: BLE001 - a bug must not look like a finding
        return _bug()
    return code if isinstance(code, int) else 0


def _complain(reason: str, hint: str | None, path: str | None) -> int:
    where = f"{printable(path)}: " if path else ""
    _say(f"ckpt: {where}{_one_line(reason)}")
    if hint:
        _say(f"hint: {_one_line(hint)}")
    return 2


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))


def _say(line: str) -> None:
    try:
        click.echo(line, err=True)
    except OSError:  # nobody reads stderr either
        return


def _output_gone(code: int) -> int:
    # Python would flush stdout once more at exit, fail again, and print about it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _bug() -> int:
    traceback.print_exc()
    _say("ckpt: this is a bug in ckptkit; please report it with the lines above")
    return 70
