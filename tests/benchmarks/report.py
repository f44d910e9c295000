"""The results as tables in Markdown, as JSON, and inside a page of the documentation."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.descriptions import Rival
from tests.benchmarks.inputs import text_of
from tests.benchmarks.measure import Grown, Measured, Run, Side

__all__ = ["Report", "ratios"]

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
MB = 1e6


@dataclass(frozen=True)
class Report:
    """Everything that a run found."""

    machine: str
    load: tuple[float, float]  # before and after
    minutes: float
    scale: float
    command: str
    processor: bool  # seconds are those of the processors
    peers: dict[str, str]  # title of each peer, and why it is missing, or what it does
    rows: tuple[Measured, ...]
    growth: tuple[Grown, ...]
    skipped: tuple[str, ...]

    def markdown(self) -> str:
        """Return all tables, with the machine and what was skipped."""
        parts = [
            f"`{self.command}` took {self.minutes:.0f} minutes: {self.machine}. {self._conditions()}",
            self._summary(),
        ]
        for group in dict.fromkeys(measured.row.group for measured in self.rows):
            parts += [f"### {group}", _table(_COLUMNS, self._group(group))]
        sizes = list(self._sizes())
        if sizes:
            parts += ["### Sizes of outputs", _table(_SIZE_COLUMNS, sizes)]
        if self.growth:
            parts += ["### Growth", _table(_GROWTH_COLUMNS, (_grown(one) for one in self.growth))]
        parts += ["### What the others do differently", _table(("program", "work", "difference"), self._differences())]
        parts += [_table(("peer", ""), self.peers.items())] if self.peers else []
        if self.skipped:
            parts.append("Skipped:\n\n" + "\n".join(f"- {line}" for line in self.skipped))
        return "\n\n".join(parts) + "\n"

    def write_json(self, path: Path) -> None:
        """Write every figure of every run."""
        document = dataclasses.asdict(self)
        path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")

    def write_page(self, path: Path) -> None:
        """Replace the results in a page, between its two marks."""
        page = path.read_text(encoding="utf-8")
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{path} lacks the lines {BEGIN} and {END}")
        path.write_text(f"{before}{BEGIN}\n\n{self.markdown()}\n{END}{after}", encoding="utf-8")

    def above(self) -> list[str]:
        """Return what is above a limit, in words."""
        lines = []
        for measured in self.rows:
            row, ours = measured.row, measured.ours
            if ours is None:
                continue
            if ours.problem or ours.ended:
                lines.append(f"{row.name}: {ours.problem or 'it took too long'}")
                continue
            lines += [
                f"{row.name}: {_number(ratio)} of {rival.name}, limit {rival.limit:g}"
                for rival, ratio in _judged(measured)
                if rival.limit is not None and ratio > rival.limit
            ]
            lines += [
                f"{row.name}: {_number(share)} of the bytes of {rival.name}, limit {rival.size:g}"
                for rival, _, share in _shares(measured)
                if rival.size is not None and share > rival.size
            ]
            if row.seconds is not None and ours.seconds > row.seconds:
                lines.append(f"{row.name}: {_seconds(ours.seconds)}, limit {row.seconds:g} s")
            if row.megabytes is not None and ours.peak / MB > row.megabytes:
                lines.append(f"{row.name}: {ours.peak / MB:.0f} MB, limit {row.megabytes:g} MB")
        return lines

    def behind(self) -> list[str]:
        """Return the rivals without a limit that were faster, in words."""
        return [
            f"{measured.row.name}: {_number(ratio)} of {rival.name}" + (f" ({rival.differs})" if rival.differs else "")
            for measured in self.rows
            for rival, ratio in _judged(measured)
            if rival.limit is None and ratio > 1
        ]

    def _conditions(self) -> str:
        busy = max(self.load)
        parts = [f"Load {self.load[0]:.1f} before and {self.load[1]:.1f} after."]
        if self.load[0] > 1:
            parts.append(f"**Other programs ran meanwhile (load {busy:.1f}), so the figures are rough.**")
        if not math.isclose(self.scale, 1):
            parts.append(f"**Sizes were {self.scale:g} of the full ones, for which the limits are made.**")
        if self.processor:
            parts.append("Seconds are those that the processors worked, without waiting for the disk.")
        return " ".join(parts)

    def _summary(self) -> str:
        above, behind = self.above(), self.behind()
        title = "Above a limit" if self.scale >= 1 else "Above a limit, although limits are made for full sizes"
        parts = ["\n".join((f"{title}:\n", *(f"- {line}" for line in above))) if above else "No limit was exceeded."]
        if behind:
            parts.append("Behind another program, without a limit:\n\n" + "\n".join(f"- {line}" for line in behind))
        missing = [measured.row.name for measured in self.rows if measured.ours is None]
        if missing:
            parts.append("ckptkit cannot do this yet:\n\n" + "\n".join(f"- {name}" for name in missing))
        return "\n\n".join(parts)

    def _group(self, group: str) -> Iterable[Sequence[str]]:
        for measured in self.rows:
            row, ours = measured.row, measured.ours
            if row.group != group:
                continue
            work = row.name + (f" ({text})" if (text := text_of(row.files, self.scale)) else "")
            seconds, peak = ("not built", "") if ours is None else _cells(ours)
            if ours is not None and not ours.problem and not ours.ended:
                if row.seconds is not None:
                    seconds = _bold(f"{seconds}, limit {row.seconds:g} s", bold=ours.seconds > row.seconds)
                if row.megabytes is not None:
                    peak = _bold(f"{peak}, limit {row.megabytes:g}", bold=ours.peak / MB > row.megabytes)
            for place, (rival, side) in enumerate(zip(row.rivals, measured.rivals, strict=True)):
                own = (work, seconds, peak) if place == 0 else ("", "", "")
                yield (*own, rival.name, *_compared(ours, rival, side), *_cells(side))

    def _sizes(self) -> Iterable[Sequence[str]]:
        for measured in self.rows:
            for place, (rival, side, share) in enumerate(_shares(measured)):
                assert measured.ours is not None
                assert rival.size is not None
                text = text_of(measured.row.files, self.scale)
                work = measured.row.name + (f" ({text})" if text else "")
                own = (work, _megabytes(measured.ours.written)) if place == 0 else ("", "")
                bold = _bold(_number(share), bold=share > rival.size)
                yield (*own, rival.name, bold, f"{rival.size:g}", _megabytes(side.written))

    def _differences(self) -> Iterable[Sequence[str]]:
        seen = set()
        for measured in self.rows:
            for rival in measured.row.rivals:
                if rival.differs and (rival.name, rival.differs) not in seen:
                    seen.add((rival.name, rival.differs))
                    yield rival.name, measured.row.name, rival.differs


_COLUMNS = ("work", "ckptkit", "MB", "compared with", "ratio", "from – to", "limit", "other", "MB")
_SIZE_COLUMNS = ("work", "MB of ckptkit", "compared with", "share", "limit", "MB of the other")
_GROWTH_COLUMNS = ("work", "sizes", "ckptkit", "each", "compared with", "other", "each", "ratio", "MB of ckptkit")


def ratios(ours: Side, rival: Side) -> list[float]:
    """Return the ratio of each turn in which both ran and count, smallest first; else that of the medians."""
    turns = ours.counted.keys() & rival.counted.keys()
    pairs = [ours.turns[turn].seconds / rival.turns[turn].seconds for turn in turns]
    return sorted(pairs) or [ours.seconds / rival.seconds]


def _judged(measured: Measured) -> Iterable[tuple[Rival, float]]:
    """Yield the ratio to each rival where both sides have done the work."""
    ours = measured.ours
    if ours is None or ours.problem or ours.ended:
        return
    for rival, side in zip(measured.row.rivals, measured.rivals, strict=True):
        if side.turns and not side.problem:
            yield rival, statistics.median(ratios(ours, side))


def _shares(measured: Measured) -> Iterable[tuple[Rival, Side, float]]:
    """Yield the share that the output of ckptkit has of that of each rival whose outputs are compared."""
    for (rival, _), side in zip(_judged(measured), _done(measured), strict=True):
        if rival.size is not None and measured.ours is not None and side.written:
            yield rival, side, measured.ours.written / side.written


def _done(measured: Measured) -> Iterable[Side]:
    """Return the rivals that have done the work."""
    ours = measured.ours
    if ours is None or ours.problem or ours.ended:
        return ()
    return (side for side in measured.rivals if side.turns and not side.problem)


def _megabytes(count: int) -> str:
    return f"{count / MB:.1f}"


def _compared(ours: Side | None, rival: Rival, side: Side) -> tuple[str, str, str]:
    limit = "" if rival.limit is None else f"{rival.limit:g}"
    if ours is None or ours.problem or ours.ended or not side.turns or side.problem:
        return "", "", limit
    found = ratios(ours, side)
    ratio = statistics.median(found)
    text = ("< " if side.ended else "") + _number(ratio)
    spread = f"{_number(found[0])} – {_number(found[-1])}" if len(found) > 1 else "one run"
    return _bold(text, bold=ratio > (1 if rival.limit is None else rival.limit)), spread, limit


def _cells(side: Side) -> tuple[str, str]:
    if not side.turns:
        return "not installed", ""
    if side.problem:
        return f"failed: {side.problem}".replace("|", "/"), ""
    if side.ended:
        return f"ended after {side.seconds:.0f} s", ""
    return _seconds(side.seconds), f"{side.peak / MB:.0f}"


def _grown(grown: Grown) -> Sequence[str]:
    growth = grown.growth
    sizes = [f"{size:,.3g}" if growth.unit == "GB" else f"{size:,.0f}" for size in grown.sizes]
    own, other = (_slope(grown.sizes, runs) for runs in (grown.ours, grown.rival))
    ratio = own / other if own > 0 and other > 0 else math.nan  # start-up hides the growth of small files
    limit = growth.rival.limit
    return (
        growth.name,
        f"{', '.join(sizes)} {growth.unit}",
        _series(grown.ours),
        _each(own, growth.unit),
        growth.rival.name,
        _series(grown.rival),
        _each(other, growth.unit),
        _bold(_number(ratio), bold=limit is not None and ratio > limit) + (f", limit {limit:g}" if limit else ""),
        ", ".join(f"{run.peak / MB:.0f}" for run in grown.ours),
    )


def _slope(sizes: Sequence[float], runs: Sequence[Run]) -> float:
    """Return the seconds for each unit of size, by least squares over the runs that ended well."""
    good = [(size, run.seconds) for size, run in zip(sizes, runs, strict=True) if not run.problem and not run.ended]
    if len(good) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*good, strict=True)).slope


def _series(runs: Sequence[Run]) -> str:
    return ", ".join("failed" if run.problem else "ended" if run.ended else f"{run.seconds:.2f}" for run in runs) + " s"


def _each(slope: float, unit: str) -> str:
    return f"{slope:.2f} s/GB" if unit == "GB" else f"{slope * 1e6:.1f} µs"


def _number(ratio: float) -> str:
    if math.isnan(ratio):
        return "not seen"
    return f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bold(text: str, *, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
