"""The command line: one file per command, and the exit code of each outcome.

0: nothing to report. 1: differences or findings. 2: trouble. 128+n: signal n. 70: a bug, with its traceback.

Importing this package imports nothing else, so that ``run`` is ready before the user can press Ctrl-C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptkit.cli.common.program import ckpt, main

__all__ = ["ckpt", "main", "run"]

_INTERRUPTED = 130  # 128 + SIGINT


def run() -> None:
    """Run the program on the process's arguments and exit with its code."""
    import sys

    is_started = False
    try:
        import gc

        gc.disable()  # a command is short and makes no cycles; the collector would take half the time of a large diff
        from ckptkit.cli.common.program import main

        is_started = True
        code = main(sys.argv[1:])
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interpreter would print a traceback while it ends
    except KeyboardInterrupt:
        code = _INTERRUPTED
        if sys.stderr is not None:
            sys.stderr.write("ckpt: interrupted\n" if is_started else "ckpt: interrupted: nothing was written\n")
    raise SystemExit(code)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckptkit.cli.common import program

    return getattr(program, name)
