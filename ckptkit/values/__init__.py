"""What the numbers of a tensor are: counted, summed and binned in one pass over its bytes, in bounded memory."""

from __future__ import annotations

from ckptkit.values.accumulator import Accumulator, why_not_judged
from ckptkit.values.bench import Bench
from ckptkit.values.numbers import Numbers, merged

__all__ = ["Accumulator", "Bench", "Numbers", "merged", "why_not_judged"]
