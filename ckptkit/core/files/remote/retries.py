"""When a request is sent again, and how long it waits before that."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass
from typing import Final

__all__ = ["Retries", "timeout"]

_MOST_TRIES = 5  # without a byte between them
_MOST_IN_ALL = 50  # a server that sends a few bytes and cuts the connection each time
_FIRST_DELAY: Final = 0.3  # seconds, doubled each time
_LONGEST_DELAY = 10.0
_LONGEST_ASKED = 60.0


def timeout() -> float:
    """Return the seconds without a byte after which a request ends: 30, or ``CKPTKIT_TIMEOUT``."""
    try:
        seconds = float(os.environ.get("CKPTKIT_TIMEOUT", ""))
    except ValueError:
        return 30.0
    return seconds if seconds > 0 else 30.0


@dataclass(slots=True)
class Retries:
    """The tries of one request."""

    tries: int = 0
    in_all: int = 0

    def progressed(self) -> bool:
        """Count from zero again, since bytes came; False after the last try."""
        self.tries = 0
        self.in_all += 1
        return self.in_all < _MOST_IN_ALL

    async def wait(self, after: float | None) -> bool:
        """Wait before the next try, as long as the server asks or twice as long as before; False after the last try."""
        self.tries += 1
        self.in_all += 1
        if self.tries >= _MOST_TRIES or self.in_all >= _MOST_IN_ALL or (after or 0) > _LONGEST_ASKED:
            return False
        delay = min(_FIRST_DELAY * 2 ** (self.tries - 1), _LONGEST_DELAY)
        # Jitter: requests that failed together must not all come back together.
        await asyncio.sleep(max(after or 0.0, 0.0) + delay * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
        return True
