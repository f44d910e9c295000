"""Names of donors on the command line, and a number for each: ``--weight NAME=X``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click

from ckptkit.core.text import nearest, plural, quoted
from ckptkit.plans.recipes.paths import distinct_names

__all__ = ["donor_weights"]


def donor_weights(given: Sequence[str], base: str, donors: Sequence[str]) -> list[float]:
    """Return the weight of each donor by ``NAME=X``; 1 without one. ``base`` and ``donors`` are paths.

    A donor has its path as a name, and the name that a merge with a method gives it. Raises ``UsageError`` for a name
    that no donor or more than one has, for one that is given twice, and for a text that is not a finite number.
    """
    names = distinct_names([base, *donors])[1:]
    weights = [1.0] * len(donors)
    seen: dict[int, str] = {}
    for text in given:
        name, sign, value = text.rpartition("=")
        if not sign or not name:
            raise click.UsageError(f"--weight {text}: give NAME=X, as in {names[0] if names else 'NAME'}=0.5")
        position = _position(name, donors, names)
        if position in seen:
            raise click.UsageError(f"--weight {text}: the weight of {donors[position]} is given twice")
        seen[position] = text
        weights[position] = _number(value, text)
    return weights


def _position(name: str, donors: Sequence[str], names: Sequence[str]) -> int:
    by_path = [number for number, path in enumerate(donors) if path == name]
    found = by_path or [number for number, own in enumerate(names) if own == name]
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
