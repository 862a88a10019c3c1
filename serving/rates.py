"""How much each API key may use: requests per minute as a token bucket, and tokens per day.

Both are in a small SQLite file, so that a restart gives nobody a second day's worth. Several gateways and workers on one machine
share the file; gateways on several machines each count for themselves. What generations under way may still take is in memory.
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from monitoring.metrics import ADMISSION_REFUSED
from serving.keys import Key
from serving.problems import RateLimited

SCHEMA = "CREATE TABLE IF NOT EXISTS spent (day TEXT, name TEXT, tokens INTEGER, PRIMARY KEY (day, name)) WITHOUT ROWID"
ADD = "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET tokens = tokens + excluded.tokens"
BUCKETS = "CREATE TABLE IF NOT EXISTS bucket (sha256 TEXT PRIMARY KEY, left REAL, at REAL) WITHOUT ROWID"
FILL = "INSERT OR REPLACE INTO bucket VALUES (?, ?, ?)"
BUSY_SECONDS = 1.0


class Rates:
    """What each key has used; `path` is the SQLite file, which is made when the first key with a limit asks."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock = path, clock
        self._in_flight: dict[str, int] = {}
        self._database: sqlite3.Connection | None = None

    def take_request(self, key: Key) -> None:
        """Count one request; `RateLimited` if there were too many, with the seconds until the next one may come."""
        limit = key.requests_per_minute
        if limit is None:
            return
        left = self._take(key.sha256, limit, self.clock())
        if left < 1:
            ADMISSION_REFUSED.labels(reason="key_requests").inc()
            raise RateLimited(f"the key {key.name} may send {limit} requests a minute", "requests", (1 - left) * 60 / limit)

    def reserve(self, key: Key, tokens: int) -> Callable[[], None]:
        """Hold the tokens that a generation may take against the key's budget, and return what gives them back.

        A generation begins while any token is left, so a budget is overdrawn by less than one generation.

        Raises:
            RateLimited: the budget is used up, with the seconds until the next day; or what is left of it is held.
        """
        if key.tokens_per_day is None:
            return lambda: None
        spent, held = self._spent(key), self._in_flight.get(key.name, 0)
        if spent + held >= key.tokens_per_day:
            ADMISSION_REFUSED.labels(reason="key_tokens").inc()
            came = f"the key {key.name} may use {key.tokens_per_day} tokens a day (UTC) and has used {spent}"
            seconds = _seconds_to_midnight() if spent >= key.tokens_per_day else 1.0
            raise RateLimited(came + (f"; its running requests may take {held}" if held else ""), "tokens", seconds)
        self._in_flight[key.name] = held + tokens
        return lambda: self._in_flight.update({key.name: self._in_flight[key.name] - tokens})

    def spend(self, key: Key, tokens: int) -> None:
        """Charge a key for tokens that were read or generated."""
        if key.tokens_per_day is not None and tokens:
            self._open().execute(ADD, (_today(), key.name, tokens))

    def close(self) -> None:
        """Close the file."""
        if self._database:
            self._database.close()
            self._database = None

    def _take(self, sha256: str, limit: int, now: float) -> float:
        """Take one request out of a key's bucket, if there is one in it, and return how many there were."""
        database = self._open()
        with database:
            database.execute("BEGIN IMMEDIATE")  # no other worker reads the bucket before this one has written it
            row = database.execute("SELECT left, at FROM bucket WHERE sha256 = ?", (sha256,)).fetchone()
            before, then = row if row and row[1] <= now else (float(limit), now)  # the clock began anew with the machine
            left = min(float(limit), before + (now - then) * limit / 60)
            database.execute(FILL, (sha256, left - 1 if left >= 1 else left, now))
        return left

    def _spent(self, key: Key) -> int:
        row = self._open().execute("SELECT tokens FROM spent WHERE day = ? AND name = ?", (_today(), key.name)).fetchone()
        return int(row[0]) if row else 0

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT, 0o600))
            opened = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            opened.execute(
                "PRAGMA synchronous = OFF"
            )  # a power cut may forget some tokens; a request is not made to wait for the disk
            opened.execute(SCHEMA)
            opened.execute(BUCKETS)
            opened.execute("DELETE FROM spent WHERE day < ?", (_today(),))
            self._database = opened
        return self._database


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _seconds_to_midnight() -> float:
    now = datetime.now(UTC)
    return math.ceil((datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC) - now).total_seconds())
