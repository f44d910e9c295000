"""The group of all commands, and the exit code of each outcome."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import FrameType

import click

from ckptkit.cli.common.commands import CommandGroup, NoCommandError
from ckptkit.cli.common.hints import usage_trouble
from ckptkit.cli.common.printing import print_line, print_message
from ckptkit.core.gc_pause import rare_gc
from ckptkit.errors import CkptkitError

__all__ = ["FILES", "ckpt", "main"]


def _version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print_line(f"ckpt {version('ckptkit')}")
        except PackageNotFoundError:
            raise CkptkitError("ckptkit is not installed, so it has no version", hint="see ckpt doctor") from None
        context.exit()


_TRACES = "ckptkit.formats.writing.traces"
_LONG_HINT = 120  # characters, above which each way out has its own line
_SUMMARIES = {
    "show": "List the tensors, other entries and warnings of a checkpoint.",
    "check": "Read every stored byte, and report what is damaged or unusual.",
    "stats": "Show mean, extremes, norms, zeros and NaN of each tensor.",
    "digest": "Hash each tensor, and check against recorded hashes.",
    "diff": "Compare what a model expects with what a checkpoint has.",
    "align": "Find the rules that rename one checkpoint to match another.",
    "remap": "Rename, keep, drop and cast tensors, and write the result.",
    "merge": "Copy the values of other checkpoints into a base where they fit.",
    "convert": "Write another format, shards, or another dtype.",
    "delta": "Write what changed between two checkpoints as a small patch.",
    "apply": "Make a checkpoint of its base and a patch, bit by bit.",
    "optim": "Show and edit the state of an optimizer by parameter name.",
    "preflight": "Check a run before training: what loads, what trains, a verdict.",
    "groups": "Check param groups against the live model.",
    "git": "Show in git diff which tensors changed.",
    "doctor": "Show the versions that ckpt runs with, and what is missing.",
    "completion": "Print the script that completes ckpt in a shell.",
}

FILES = {"apply": "deltas", "delta": "deltas"}  # of the commands that are not in a file of their own


class _Commands(CommandGroup):
    """A group whose commands are imported from their own files when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _SUMMARIES:
            return None
        command: click.Command = getattr(import_module(f"ckptkit.cli.{FILES.get(cmd_name, cmd_name)}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-V", "--version", is_flag=True, callback=_version, expose_value=False, is_eager=True,
              help="Show the version and exit.")  # fmt: skip
@click.pass_context
def ckpt(context: click.Context) -> None:
    """See what a checkpoint holds, see what will load, make it fit, and check what the optimizer trains.

    \b
    A PATH is a file or directory of any known format, recognised by its content.
    PATH::a.b is a mapping inside a checkpoint. py:package.module:callable is a
    live model; ckpt runs the code of that model. Arguments go in parentheses:
    'py:mynet:build(num_classes=4)'.

    Exit codes: 0 nothing to report, 1 differences or findings, 2 trouble.
    """  # noqa: D301 - \b is click's mark
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        context.color = False


class _Stopped(KeyboardInterrupt):
    """A signal asked the process to end; raising it removes temporary files on the way out."""


def _raise_stopped(number: int, _frame: FrameType | None) -> None:
    raise _Stopped(number)


def main(arguments: Sequence[str]) -> int:
    """Run the program and return the exit code; every expected failure is one line on stderr."""
    _replace_closed_streams()
    if traces := sys.modules.get(_TRACES):
        traces.forget()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name must not crash a terminal without Unicode
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _raise_stopped)
    # Every live model would cause this warning where numpy is missing, and torch works without numpy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)
    try:
        with rare_gc():
            code = _invoke(list(arguments))
        sys.stdout.flush()
    except CkptkitError as error:
        return _report_trouble(error.reason, error.hint, error.path)
    except NoCommandError as error:  # the message is the whole help
        for line in error.format_message().split("\n"):
            _print_error_line(line)
        return 2
    except click.UsageError as error:
        return _report_trouble(*usage_trouble(error), None)
    except click.ClickException as error:
        return _report_trouble(error.format_message(), None, None)
    except _Stopped as stopped:
        return _report_stopped(int(stopped.args[0]))
    except (click.Abort, KeyboardInterrupt):
        return _report_interrupt()
    except BrokenPipeError:
        return _discard_stdout(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO) and error.filename is None:
            _discard_stdout(2)
            return _report_trouble(f"standard output: {os.strerror(error.errno).lower()}", None, None)
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        return _report_trouble((error.strerror or str(error) or type(error).__name__).lower(), None, path)
    except MemoryError:
        code = None  # reported below, because the exception keeps the objects alive that filled the memory
    except Exception:  # noqa: BLE001 - a bug must not look like a finding
        return _report_bug()
    except BaseException as error:  # noqa: BLE001 - ckptkit raises none, so the code of a live model did
        from ckptkit.core.text import first_line

        return _report_trouble(f"code that the command ran raised {first_line(error)}", None, None)
    if code is None:
        return _report_trouble("the command needs more memory than this machine has", _left_behind(), None)
    return code


def _replace_closed_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed."""
    if sys.stdout is not None and sys.stderr is not None:
        return
    # The next opened file would get a free descriptor below 3, and the output of torch would end up in that file.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _invoke(arguments: list[str]) -> int:
    if "_CKPT_COMPLETE" in os.environ:
        from ckptkit.cli.common.completing import use_whole_words_in_bash

        use_whole_words_in_bash()
        with contextlib.suppress(SystemExit):  # click ends the program after the completions
            ckpt.main(arguments, prog_name="ckpt", standalone_mode=False)
        return 0
    # Not click's own main, which ends a broken pipe with code 1. Here code 1 means "different".
    try:
        with ckpt.make_context("ckpt", arguments) as context:
            ckpt.invoke(context)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    return 0


def _report_trouble(reason: str, hint: str | None, path: str | None) -> int:
    from ckptkit.core.text import printable

    where = f"{printable(path)}: " if path else ""
    _print_error_line(f"ckpt: {where}{reason}")
    if hint:
        ways = hint.split("; ") if len(hint) > _LONG_HINT else [hint]
        for number, way in enumerate(ways):
            _print_error_line(f"{'      ' if number else 'hint: '}{way}")
    return 2


def _report_interrupt() -> int:
    traces = sys.modules.get(_TRACES)  # nothing is written before it is imported
    is_clean = traces is None or traces.has_left_nothing()
    _report_trouble("interrupted: nothing was written" if is_clean else "interrupted", _left_behind(), None)
    return 128 + signal.SIGINT


def _report_stopped(number: int) -> int:
    if left := _left_behind():
        _report_trouble(f"ended by {signal.Signals(number).name}", left, None)
    return 128 + number


def _left_behind() -> str | None:
    """Return what is to be said of shards that are kept, or of an output in a store that is not the old or new one."""
    traces = sys.modules.get(_TRACES)
    if traces is None:
        return None
    kept = traces.kept()
    return f"{kept}: --continue goes on from there" if kept else traces.left_between() or None


def _print_error_line(line: str) -> None:
    try:
        print_message(line)
    except OSError:  # stderr is closed too
        return


def _discard_stdout(code: int) -> int:
    # Python flushes stdout once more at exit. That would fail again and print a message.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _report_bug() -> int:
    import traceback

    text = traceback.format_exc()
    urls = sys.modules.get("ckptkit.core.files.remote.urls")  # libraries put whole URLs into their messages
    text = urls.without_secrets(text) if urls is not None else text
    for line in text.split("\n")[:-1]:  # line by line, because a traceback may quote names
        _print_error_line(line)
    _print_error_line("ckpt: this is a bug in ckptkit; please report it with the lines above")
    if left := _left_behind():
        _print_error_line(f"hint: {left}")
    return 70
