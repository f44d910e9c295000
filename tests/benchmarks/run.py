"""Time ckptkit beside other programs, and print ratios: ``python tests/benchmarks/run.py --peers``.

All commands run alternately, each as a process, so that a change of the machine's speed affects all of them. A ratio is
the median of the ratios of all turns. Memory is the peak of the process above that of a bare interpreter. Seconds
differ between machines and are printed for orientation only. The exit code is 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import inputs, machine
from tests.benchmarks.descriptions import Row, code
from tests.benchmarks.growth import GROWTH, SIZES
from tests.benchmarks.measure import Grown, Measured, Programs, Rules, grow, measure, run
from tests.benchmarks.peers import PEERS, prepare
from tests.benchmarks.report import Report
from tests.benchmarks.rows import ROWS

GB = 1e9


def main() -> int:
    """Run the rows, print the report, and return 1 if a limit is exceeded."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does, they remove the directories
        signal.signal(number, _stop)
    begin, load = time.perf_counter(), machine.busy()
    rules = Rules(options.runs, options.budget, processor=options.processor)
    skipped: list[str] = []
    with _folder(options.peers) as folder, _folder(options.files or "") as directory:
        assert directory is not None
        missing = _prepare(folder)
        if options.prepare:
            return int(bool(missing))
        installed = frozenset(one.name for one in PEERS if folder and one.name not in missing)
        with tempfile.TemporaryDirectory(prefix="ckptkit-benchmark-", dir=directory) as name:
            programs = Programs(Path(name), folder, installed)
            bare = min(run(programs, code(""), rules).peak for _ in range(3))
            rows = tuple(_rows(programs, options, rules, bare, skipped))
            growth = tuple(_growth(programs, options, rules, bare, skipped)) if options.growth else ()
    report = Report(
        machine=machine.describe(),
        load=(load, machine.busy()),
        minutes=(time.perf_counter() - begin) / 60,
        scale=options.scale,
        command=_command(options),
        processor=options.processor,
        peers={one.title: missing.get(one.name) or one.does for one in PEERS} if folder else {},
        rows=rows,
        growth=growth,
        skipped=tuple(skipped),
    )
    if options.json:
        report.write_json(options.json)
    if options.write:
        report.write_page(options.write)
    print(report.markdown())
    return int(bool(report.above()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add(
        "--peers", nargs="?", const="", metavar="FOLDER", help="compare with peers too; FOLDER keeps their environments"
    )
    add("--prepare", action="store_true", help="only make the environments of the peers")
    add("--only", default="", metavar="TEXT", help="only rows whose group or name contains this, and no growth")
    add("--scale", type=float, default=1.0, help="share of the full sizes (1 GB, 100,000 tensors)")
    add("--quick", action="store_true", help="a scale of 0.05, one run of each command: to see that all of them work")
    add("--runs", type=int, default=5, help="turns that count, after a first turn that does not")
    add("--budget", type=float, default=15.0, help="seconds for the turns of a row; one turn counts in any case")
    add("--processor", action="store_true", help="count seconds of the processors: rough, but for busy machines")
    add("--no-growth", dest="growth", action="store_false", help="leave out the files of growing size")
    add("--files", type=Path, metavar="FOLDER", help="where to write files; default: the folder for temporary files")
    add("--write", type=Path, metavar="PAGE", help="replace the results in a page of the documentation")
    add("--json", type=Path, metavar="FILE", help="write every figure")
    options = parser.parse_args()
    if options.quick:
        options.scale, options.runs = 0.05 * options.scale, 0
    if options.only:
        options.growth = False
    return options


def _command(options: argparse.Namespace) -> str:
    """Return the command line without the folders of this machine."""
    words = ["python", "tests/benchmarks/run.py"]
    words += ["--peers"] if options.peers is not None else []
    words += ["--only", options.only] if options.only else [] if options.growth else ["--no-growth"]
    words += ["--quick"] if options.quick else [] if options.scale == 1 else ["--scale", f"{options.scale:g}"]
    return shlex.join([*words, *(["--processor"] if options.processor else [])])


@contextmanager
def _folder(name: str | Path | None) -> Iterator[Path | None]:
    """Yield the folder with this name, a temporary one where the name is empty, or None where there is none."""
    if name is None:
        yield None
    elif str(name):
        Path(name).mkdir(parents=True, exist_ok=True)
        yield Path(name)
    else:
        with tempfile.TemporaryDirectory(prefix="ckptkit-benchmark-") as made:
            yield Path(made)


def _prepare(folder: Path | None) -> dict[str, str]:
    """Make the environments that are missing, and return the reason for each that could not be made."""
    missing = {}
    for one in PEERS if folder else ():
        assert folder is not None
        if reason := prepare(folder, one):
            missing[one.name] = f"not installed: {reason}"
            _say(f"{one.name} {missing[one.name]}")
    return missing


def _rows(
    programs: Programs, options: argparse.Namespace, rules: Rules, bare: float, skipped: list[str]
) -> Iterator[Measured]:
    """Measure the rows that are asked for; each file is written for the first row that needs it."""
    rows = [row for row in ROWS if options.only in f"{row.group}: {row.name}"]
    if programs.folder is None:
        rows = [replace(row, rivals=tuple(one for one in row.rivals if not one.command.peer)) for row in rows]
    for place, row in enumerate(rows):
        if reason := _too_large(programs.directory, row, options.scale):
            skipped.append(f"{row.name}: {reason}")
            continue
        for name in row.files:
            if not (programs.directory / name).exists():
                inputs.write(programs.directory / name, inputs.scaled(inputs.FILES[name], options.scale))
        begin = time.perf_counter()
        yield measure(programs, row, rules, bare)
        _say(f"{row.group}: {row.name} took {time.perf_counter() - begin:.0f} s")
        later = {name for other in rows[place + 1 :] for name in other.files}
        for name in row.files:
            if name not in later:
                _remove(programs.directory / name)


def _growth(
    programs: Programs, options: argparse.Namespace, rules: Rules, bare: float, skipped: list[str]
) -> Iterator[Grown]:
    """Measure the works on files of growing size: each size is written once, for all of them."""
    for unit, full in SIZES.items():
        works = [one for one in GROWTH if one.unit == unit and programs.can(one.rival.command)]
        sizes: list[float] = []
        pairs = []
        for size in (one * options.scale for one in full[:: 2 if options.quick else 1]):
            files = inputs.grown(unit, size)
            needed, free = (
                2 * sum(made.size for made in files.values()) + GB,
                shutil.disk_usage(programs.directory).free,
            )
            if needed > free:
                skipped.append(
                    f"growth to {size:,g} {unit}: needs {needed / GB:.0f} GB of disk, {free / GB:.0f} are free"
                )
                continue
            for name, made in files.items():
                inputs.write(programs.directory / name, made)
            pairs.append([grow(programs, growth, rules, bare) for growth in works])
            sizes.append(size)
            for name in files:
                _remove(programs.directory / name)
            _say(f"growth: {size:,g} {unit}")
        for place, growth in enumerate(works):
            both = [of_size[place] for of_size in pairs]
            yield Grown(growth, tuple(sizes), tuple(ours for ours, _ in both), tuple(theirs for _, theirs in both))


def _too_large(directory: Path, row: Row, scale: float) -> str:
    """Return why the disk is too small for a row, or nothing."""
    absent = tuple(name for name in row.files if not (directory / name).exists())
    needed = inputs.size_of(absent, scale) + 2 * inputs.size_of(row.files, scale) + GB
    free = shutil.disk_usage(directory).free
    return f"needs {needed / GB:.0f} GB of disk, {free / GB:.0f} are free" if needed > free else ""


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
