"""The command line: one group, one file a command, and the one map from what happened to an exit code.

0: nothing to report. 1: differences or findings. 2: trouble. 128+n: signal n. 70: a bug, with its traceback.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import FrameType

import click

from ckptkit.cli.options import put, tell
from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError

__all__ = ["ckpt", "main", "run"]


def _version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import version

        put(f"ckpt {version('ckptkit')}")
        context.exit()


class _Commands(click.Group):
    """Commands by name, each imported from its own file when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _SUMMARIES:
            return None
        command: click.Command = getattr(import_module(f"ckptkit.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))


_SUMMARIES = {
    "show": "What is in a checkpoint: tensors, other entries, warnings.",
    "check": "Read every stored byte, and say what is damaged or odd.",
    "stats": "What the numbers are: mean, extremes, norms, zeros, NaN.",
    "diff": "What a model expects against what a checkpoint has.",
    "align": "Find the rules by which one side's names become the other's.",
    "remap": "Rename, keep, drop and cast tensors, and write the rest.",
    "merge": "Lay the values of donors over a base where they fit.",
    "convert": "Write another format, shards, or another dtype.",
    "optim": "Show the state of an optimizer by name, and edit it as the weights were.",
    "preflight": "One page before training: what loads, what trains, one verdict.",
    "groups": "Check param groups against the live model.",
}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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


class _Stopped(BaseException):
    """A signal asked for the end; raised so that temporary files are removed on the way out."""


def _stop(number: int, _frame: FrameType | None) -> None:
    raise _Stopped(number)


def run() -> None:
    """Run the program on the process's arguments and exit with its code."""
    gc.disable()  # a command lives for seconds and makes no cycles; looking for them costs half of a large diff
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run the program and return the exit code; every expected failure is one line on stderr."""
    _stand_in_for_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode must not turn a name into a crash
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, _stop)
    # torch without numpy is a supported set-up, and a warning on every live model says nothing about the model.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)
    try:
        code = _invoke(list(arguments))
        sys.stdout.flush()
    except CkptkitError as error:
        return _complain(error.reason, error.hint, error.path)
    except click.exceptions.NoArgsIsHelpError as error:  # its message is the whole help
        for line in error.format_message().split("\n"):
            _say(line)
        return 2
    except click.UsageError as error:
        context = error.ctx.command_path if error.ctx else "ckpt"
        return _complain(error.format_message(), f"see {context} --help", None)
    except click.ClickException as error:
        return _complain(error.format_message(), None, None)
    except (click.Abort, KeyboardInterrupt):
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
    except MemoryError:
        code = None  # said below: until the exception is gone, it holds on to what filled the memory
    except Exception:  # noqa: BLE001 - a bug must not look like a finding
        return _bug()
    return _complain("the work takes more memory than there is", None, None) if code is None else code


def _stand_in_for_closed_streams() -> None:
    if sys.stdout is not None and sys.stderr is not None:
        return
    # A number below 3 that is free would go to the next file opened, and whatever torch prints would end up in it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the end
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _invoke(arguments: list[str]) -> int:
    if "_CKPT_COMPLETE" in os.environ:
        ckpt.main(arguments, prog_name="ckpt", standalone_mode=False)
        return 0
    # Not click's own main: it ends a broken pipe with 1, which here would mean "different".
    try:
        with ckpt.make_context("ckpt", arguments) as context:
            ckpt.invoke(context)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    return 0


def _complain(reason: str, hint: str | None, path: str | None) -> int:
    where = f"{printable(path)}: " if path else ""
    _say(f"ckpt: {where}{reason}")
    if hint:
        _say(f"hint: {hint}")
    return 2


def _say(line: str) -> None:
    try:
        tell(line)
    except OSError:  # nobody reads stderr either
        return


def _output_gone(code: int) -> int:
    # Python would flush stdout once more at exit, fail again, and print about it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _bug() -> int:
    import traceback

    for line in traceback.format_exc().split("\n")[:-1]:  # which may quote names too
        _say(line)
    _say("ckpt: this is a bug in ckptkit; please report it with the lines above")
    return 70
