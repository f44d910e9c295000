"""What ``-v`` prints: how much a command asked of each store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckptkit.cli.common.printing import print_message
from ckptkit.core.text import human_bytes, plural

if TYPE_CHECKING:
    from ckptkit.core.files.remote.traffic import Traffic

__all__ = ["reported_traffic", "traffic_line"]

_COUNTERS = "ckptkit.core.files.remote.traffic"


@contextmanager
def reported_traffic() -> Iterator[None]:
    """Print one line on stderr for each store of which the block asked something, also where it raises."""
    if _COUNTERS in sys.modules:  # nothing is asked before it is imported
        sys.modules[_COUNTERS].forget_traffic()
    try:
        yield
    finally:
        if _COUNTERS in sys.modules:
            for counts in sys.modules[_COUNTERS].traffic():
                print_message(traffic_line(counts))


def traffic_line(counts: Traffic) -> str:
    """Return a line such as ``s3://bucket: 3 requests in 2 rounds, 131.0 kB read, 0.2 s``."""
    moved = [
        f"{human_bytes(number)} {word}"
        for number, word in ((counts.received, "read"), (counts.sent, "written"))
        if number or (word == "read" and not counts.sent)
    ]
    repeated = [plural(counts.retries, "retry", "retries")] if counts.retries else []
    asked = f"{plural(counts.requests, 'request')} in {plural(counts.rounds, 'round')}"
    return f"{counts.store}: {', '.join((asked, *moved, *repeated, f'{counts.seconds:.1f} s'))}"
