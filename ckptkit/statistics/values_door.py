"""What the numbers of a tensor are: counted, summed and binned in one pass over its bytes, in bounded memory."""

from __future__ import annotations

from ckptkit.statistics.accumulator import Accumulator, why_not_judged
from ckptkit.statistics.numbers import Numbers, merged
from ckptkit.statistics.threads import Bench

__all__ = ["Accumulator", "Bench", "Numbers", "merged", "why_not_judged"]
