"""Run a command as a process of its own, and measure its time and its peak of memory."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.descriptions import Command, Growth, Row
from tests.benchmarks.reasons import last_error

__all__ = ["Grown", "Measured", "Programs", "Rules", "Run", "Side", "grow", "measure", "run"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# The peak of a process begins at the memory of the process that starts it. So a bare interpreter starts each command.
LAUNCHER = """
import os, sys, time
begin = time.perf_counter()
child = os.fork()
if not child:
    try:
        for number, name in ((1, "stdout.log"), (2, "stderr.log")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.execvp(sys.argv[1], sys.argv[1:])
    finally:
        os._exit(127)
_, status, usage = os.wait4(child, 0)
seconds = time.perf_counter() - begin
print(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))
"""

CONSOLE_SCRIPT = "import sys; from ckptkit.cli import run; sys.exit(run())"


@dataclass(frozen=True)
class Rules:
    """How often and how long a command may run."""

    runs: int = 5  # turns that count
    budget: float = 15.0  # seconds for the turns of a row, of which one counts in any case
    once: float = 10.0  # a command that takes longer runs once, and this first run counts
    longest: float = 90.0  # a command that takes longer is ended
    processor: bool = False  # count the seconds of the processors, not of the clock


@dataclass(frozen=True)
class Run:
    """One run of a process: its seconds, its peak above that of a bare interpreter, and what it wrote, in bytes."""

    seconds: float
    peak: float
    problem: str = ""
    ended: bool = False  # it took too long
    written: int = 0


@dataclass
class Side:
    """The runs of one command, by turn; the first turn does not count, unless it is the only one."""

    turns: dict[int, Run] = field(default_factory=dict)

    @property
    def counted(self) -> dict[int, Run]:
        """The runs that count."""
        return {turn: run for turn, run in self.turns.items() if turn or len(self.turns) == 1}

    @property
    def problem(self) -> str:
        """Why the command failed, or nothing."""
        return next((run.problem for run in self.turns.values() if run.problem), "")

    @property
    def ended(self) -> bool:
        """Whether a run took too long."""
        return any(run.ended for run in self.turns.values())

    @property
    def seconds(self) -> float:
        """The median of the seconds."""
        return statistics.median(run.seconds for run in self.counted.values())

    @property
    def peak(self) -> float:
        """The largest peak, in bytes."""
        return max(run.peak for run in self.counted.values())

    @property
    def written(self) -> int:
        """The bytes of all outputs."""
        return max(run.written for run in self.counted.values())


@dataclass(frozen=True)
class Measured:
    """A row with the runs of ckptkit, if it can do the work, and of each rival."""

    row: Row
    ours: Side | None
    rivals: tuple[Side, ...]


@dataclass(frozen=True)
class Grown:
    """The fastest run of both sides for each size; a side that failed has no run for that size."""

    growth: Growth
    sizes: tuple[float, ...]
    ours: tuple[Run, ...]
    rival: tuple[Run, ...]


@dataclass(frozen=True)
class Programs:
    """Where programs are: the folder of the environments of those peers that are installed, and their names."""

    directory: Path
    folder: Path | None
    installed: frozenset[str]

    def line(self, command: Command) -> list[str]:
        """Return the command line of a command."""
        python = sys.executable
        if command.peer:
            assert self.folder is not None
            programs = self.folder.resolve() / command.peer / "bin"
            if command.program != "script":
                return [str(programs / command.program), *command.arguments]
            python = str(programs / "python")
        starts = {
            "ckpt": [python, "-c", CONSOLE_SCRIPT],
            "python": [python],
            "script": [python, str(HERE / "scripts.py")],
            "timed": [python, str(HERE / "timed.py")],
        }
        return [*starts.get(command.program, [command.program]), *command.arguments]

    def can(self, command: Command) -> bool:
        """Tell whether the environment of the command is there."""
        return not command.peer or command.peer in self.installed

    def variables(self, command: Command) -> dict[str, str]:
        """Return the environment variables: only this environment sees this checkout."""
        leave_out = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS"}
        kept = {name: value for name, value in os.environ.items() if name not in leave_out}
        return kept | {"HF_HUB_OFFLINE": "1"} | ({} if command.peer else {"PYTHONPATH": str(ROOT)})


def run(programs: Programs, command: Command, rules: Rules, bare: float = 0.0) -> Run:
    """Run a command once in the directory of the files, after removing what earlier commands wrote."""
    for old in programs.directory.glob("out*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *programs.line(command)],
        cwd=programs.directory,
        env=programs.variables(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = launcher.communicate(timeout=rules.longest)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        return Run(rules.longest, 0.0, ended=True)
    except BaseException:  # an interrupt: the command must not write on while its directory is removed
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        raise
    seconds, processor, peak, exit_code = (float(word) for word in text.split())
    errors = (programs.directory / "stderr.log").read_text(encoding="utf-8", errors="replace")
    if exit_code not in command.exit_codes or "Traceback (most recent call last)" in errors:
        return Run(seconds, max(peak - bare, 0.0), f"exit code {exit_code:.0f}: {last_error(errors)}")
    if command.reports:
        seconds, peak = (float(word) for word in (programs.directory / "stdout.log").read_text("utf-8").split())
        return Run(seconds, peak)
    written = sum(file.stat().st_size for file in programs.directory.glob("out*") if file.is_file())
    return Run(processor if rules.processor else seconds, max(peak - bare, 0.0), written=written)


def measure(programs: Programs, row: Row, rules: Rules, bare: float) -> Measured:
    """Run ckptkit and each rival alternately, so that a change of the machine's speed affects all of them."""
    commands = [row.ours, *(rival.command for rival in row.rivals)]
    sides = [Side() for _ in commands]
    active = {place: command for place, command in enumerate(commands) if command and programs.can(command)}
    begin = time.perf_counter()
    for turn in range(rules.runs + 1):
        if turn > 1 and time.perf_counter() - begin > rules.budget:
            break
        for place, command in list(active.items()):
            ran = sides[place].turns[turn] = run(programs, command, rules, bare)
            if ran.problem or ran.ended or ran.seconds > rules.once:
                del active[place]
        if row.ours is not None and 0 not in active:
            break
    return Measured(row, sides[0] if row.ours else None, tuple(sides[1:]))


def grow(programs: Programs, growth: Growth, rules: Rules, bare: float) -> tuple[Run, Run]:
    """Run ckptkit and the rival alternately on the files of one size, and return the fastest run of each."""
    fastest: list[Run] = []
    for turn in range(min(rules.runs, 1) + 1):
        pair = [run(programs, command, rules, bare) for command in (growth.ours, growth.rival.command)]
        fastest = [min(both, key=lambda one: one.seconds) for both in zip(fastest or pair, pair, strict=True)]
        if turn == 0 and max(one.seconds for one in pair) > rules.once:
            break
    return fastest[0], fastest[1]
