"""Clients of stores in files, which only one client may have open: one for all who use them in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_open: dict[Path, list[Any]] = {}  # the client, and how many have it
_lock = threading.RLock()  # the collector may close a store in the midst of opening another


def borrowed(path: Path, make: Callable[[], Any], end: Callable[[Any], None]) -> tuple[Any, Callable[[], None]]:
    """Return the client of a file or folder, and what gives it back; the last to do so ends it.

    Args:
        path: resolved.
        make: opens it.
        end: closes it.
    """
    with _lock:
        entry = _open.setdefault(path, [None, 0])
        entry[1] += 1
        try:
            entry[0] = entry[0] or make()
        except BaseException:
            _open.pop(path)
            raise

    def give_back() -> None:
        with _lock:
            entry[1] -= 1
            if not entry[1]:
                end(_open.pop(path)[0])

    return entry[0], give_back
