"""The learning rate of each layer as a picture of bars."""

from __future__ import annotations

import math
from typing import Any

from ckptkit.param_groups import ParamGroupsPlan, PlannedGroup
from ckptkit.param_groups.plain import plain_option
from ckptkit.render.page import Table

__all__ = ["rate_table", "shown_number"]

_WIDTH = 24
_SPREAD = 100  # from where on bars of their true length would be too short to tell apart
_SHORT = 10


def rate_table(plan: ParamGroupsPlan) -> Table | None:
    """Return one row for each layer and rate in it, from input to output; None where the plan knows no layers."""
    counts: dict[tuple[int, float], int] = {}
    for group in plan.groups:
        rate = _rate(group)
        for parameter in group.parameters:
            if parameter.layer is not None and rate is not None:
                counts[parameter.layer, rate] = counts.get((parameter.layer, rate), 0) + 1
    if not counts:
        return None
    rates = [rate for _, rate in counts]
    above = [rate for rate in rates if rate > 0]
    log = bool(above) and max(above) / min(above) >= _SPREAD
    rows = tuple(
        (str(layer), f"{count:,}", shown_number(rate), _bar(rate, above, log=log))
        for (layer, rate), count in sorted(counts.items())
    )
    return Table(
        ("layer", "parameters", "lr", "log scale" if log else ""), rows, frozenset({"layer", "parameters", "lr"})
    )


def shown_number(value: Any) -> str:
    """Return a number short enough for a column: as it is, or to six digits."""
    text = str(value)
    return text if not isinstance(value, float) or len(text) <= _SHORT else f"{value:.6g}"


def _rate(group: PlannedGroup) -> float | None:
    rate, scale = (plain_option(group.options.get(key, missing)) for key, missing in (("lr", None), ("lr_scale", 1.0)))
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not isinstance(scale, int | float):
        return None
    return float(rate * scale)


def _bar(rate: float, above: list[float], *, log: bool) -> str:
    if rate <= 0:
        return ""
    low, high = min(above), max(above)
    share = math.log(rate / low) / math.log(high / low) if log else rate / high
    return "█" * max(1, round(share * (_WIDTH - 1)) + 1 if log else round(share * _WIDTH))
