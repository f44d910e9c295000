"""Names of donors on the command line, and a number for each: ``--weight NAME=X``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import click

from ckptkit.core.files.places import kind_at, name_of
from ckptkit.core.text import nearest, plural, quoted
from ckptkit.formats import split_path

__all__ = ["donor_weights"]


def donor_weights(given: Sequence[str], donors: Sequence[str]) -> list[float]:
    """Return the weight of each donor by ``NAME=X``; 1 without one.

    The name of a donor is its path, the name of its directory, or the name of its file without the suffix. Raises
    ``UsageError`` for a name that no donor or more than one has, for one that is given twice, and for a text that is
    not a finite number.
    """
    weights = [1.0] * len(donors)
    seen: dict[int, str] = {}
    for text in given:
        name, sign, value = text.rpartition("=")
        if not sign or not name:
            raise click.UsageError(f"--weight {text}: give NAME=X, as in {_name(donors[0]) if donors else 'NAME'}=0.5")
        position = _position(name, donors)
        if position in seen:
            raise click.UsageError(f"--weight {text}: the weight of {donors[position]} is given twice")
        seen[position] = text
        weights[position] = _number(value, text)
    return weights


def _name(path: str) -> str:
    base = name_of(path.rstrip("/"))
    return base if kind_at(split_path(path)[0]) == "folder" else os.path.splitext(base)[0]


def _position(name: str, donors: Sequence[str]) -> int:
    by_path = [number for number, path in enumerate(donors) if path == name]
    found = by_path or [number for number, path in enumerate(donors) if _name(path) == name]
    if len(found) == 1:
        return found[0]
    if len(by_path) > 1:
        raise click.UsageError(
            f"--weight: {name} is given {len(by_path)} times: give it once, with the sum of its weights"
        )
    if found:
        paths = ", ".join(donors[number] for number in found)
        raise click.UsageError(
            f"--weight: {plural(len(found), 'donor')} have the name {quoted(name)}: give one of {paths}"
        )
    names = [_name(path) for path in donors]
    near = nearest(name, names)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(names)}"
    raise click.UsageError(f"--weight: no donor has the name {quoted(name)}; {hint}")


def _number(value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise click.UsageError(f"--weight {text}: {quoted(value)} is not a finite number")
    return number
