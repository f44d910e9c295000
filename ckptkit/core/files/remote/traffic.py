"""Counts of what was asked of each store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Meter", "Traffic", "forget_traffic", "meter_of", "traffic"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was asked of one store since the process began, or since ``forget_traffic``.

    A round is a time in which requests are under way; requests of one round wait for the network together.
    """

    store: str  # such as s3://bucket
    requests: int
    rounds: int
    received: int  # bytes
    sent: int  # bytes
    retries: int
    seconds: float  # in which requests were under way


class Meter:
    """Counts the requests of one store; threads share it."""

    def __init__(self, store: str) -> None:
        """Start with no request."""
        self.store = store
        self._lock = threading.Lock()
        self._held = 0
        self._clear()

    def _clear(self) -> None:
        self._requests = self._rounds = self._received = self._sent = self._retries = self._open = 0
        self._seconds = self._since = 0.0
        self._in_round = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request, which is under way in the block."""
        with self._lock:
            self._requests += 1
            if not self._in_round:
                self._rounds += 1
                self._in_round = True
            if not self._open:
                self._since = time.monotonic()
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if not self._open:
                    self._seconds += time.monotonic() - self._since
                    self._in_round = self._held > 0

    def hold(self) -> None:
        """Begin to ask for something: until ``let_go``, requests are of one round, however fast the answers come."""
        with self._lock:
            self._held += 1

    def let_go(self) -> None:
        """Say that the first request of what was asked begins now."""
        with self._lock:
            self._held -= 1
            self._in_round = self._in_round and (self._held > 0 or self._open > 0)

    def add(self, *, requests: int = 0, received: int = 0, sent: int = 0, retries: int = 0) -> None:
        """Count bytes, retries, and requests that took no time."""
        with self._lock:
            self._requests += requests
            self._received += received
            self._sent += sent
            self._retries += retries

    def traffic(self) -> Traffic:
        """Return the counts up to now."""
        with self._lock:
            seconds = self._seconds + (time.monotonic() - self._since if self._open else 0.0)
            return Traffic(self.store, self._requests, self._rounds, self._received, self._sent, self._retries, seconds)

    def forget(self) -> None:
        """Count from zero; a request that is under way counts as one of a new round."""
        with self._lock:
            under_way = self._open
            self._clear()
            if under_way:
                self._open, self._requests, self._rounds, self._since = under_way, under_way, 1, time.monotonic()
                self._in_round = True


_meters: dict[str, Meter] = {}


def meter_of(store: str) -> Meter:
    """Return the one meter of a store."""
    return _meters.setdefault(store, Meter(store))


def traffic() -> tuple[Traffic, ...]:
    """Return the counts of every store of which something was asked."""
    return tuple(counts for meter in tuple(_meters.values()) if (counts := meter.traffic()).requests)


def forget_traffic() -> None:
    """Count from zero."""
    for meter in tuple(_meters.values()):
        meter.forget()
