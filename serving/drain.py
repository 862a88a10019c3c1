"""The end of a gateway: from the first signal on it begins nothing new, and what runs may end within the drain time.

It only knows whether that has begun, and how many requests are being answered; `serving.server` decides when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from monitoring.metrics import PATHS
from serving.problems import Stopping

STILL_ANSWERED = ("/healthz", *PATHS)  # the gateway lives until it has stopped; /readyz says that it takes nothing


class Drain:
    """The state of one gateway; `seconds` is the longest time that requests in flight get."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.in_flight = 0
        self._deadline: float | None = None

    def begin(self) -> None:
        """Begin nothing new from now on; safe to call twice, and from a signal handler or another thread."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.seconds

    def end(self) -> None:
        """Give what is in flight no more time."""
        self._deadline = 0.0

    @property
    def begun(self) -> bool:
        """Return whether the gateway is being stopped."""
        return self._deadline is not None

    @property
    def over(self) -> bool:
        """Return whether nothing is in flight any more, or what is has had its time."""
        return self._deadline is not None and (not self.in_flight or self._left() <= 0)

    def check(self, path: str) -> None:
        """Raise `Stopping` for a request that comes after the drain has begun."""
        if self.begun and path not in STILL_ANSWERED:
            raise Stopping("the gateway is being stopped and begins nothing new", self._left())

    def cut(self) -> Stopping:
        """Return what is said to a request whose time is over."""
        return Stopping("the gateway was stopped before this was finished", 1.0)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as in flight for the length of the block."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def _left(self) -> float:
        return self._deadline - time.monotonic() if self._deadline is not None else self.seconds
