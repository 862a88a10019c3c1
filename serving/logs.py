"""The log of a server: one line for each request, as text or as JSON (configs/serve, `log`).

A line tells what was asked for and how it went: id, route template, status, seconds, model, tokens, finish reason. It never holds
keys, headers or replies, and no prompt unless `log.prompts` is true. Whatever a value holds, it cannot begin a new line.

    llmlab serve --set log.format=json 2>gateway.log; grep '"status": 5' gateway.log
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monitoring.metrics import PATHS
from pipelines.errors import NotWritable
from serving.record import Record
from serving.settings import LogConfig

LOGGERS = ("serving", "uvicorn", "opentelemetry")
LOG = logging.getLogger("serving.requests")
WATCHED = ("/healthz", "/readyz", *PATHS)  # asked every few seconds: told at the level debug while all is well
PLAIN = re.compile(r"[\w.:/{}@+-]+", re.ASCII)


class JsonLines(logging.Formatter):
    """Each record is one JSON object, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        content = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name,
                   "message": record.getMessage(), **_facts(record)}  # fmt: skip
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


class TextLines(logging.Formatter):
    """Each record is one line for people; a traceback follows it, each of its lines behind a bar."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        facts = " ".join(f"{name}={_word(value)}" for name, value in _facts(record).items())
        message = json.dumps(record.getMessage(), ensure_ascii=True)[1:-1].replace('\\"', '"')
        line = f"{_time(record)} {record.levelname.lower()} {message} {facts}".rstrip()
        if record.exc_info:
            lines = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n    | {json.dumps(one)[1:-1]}" for one in lines)
        return line


@contextmanager
def written(config: LogConfig) -> Iterator[None]:
    """Write the log as configured for the length of the block.

    Raises:
        NotWritable: the file cannot be written to.
    """
    handler = _handler(config.file)
    handler.setFormatter(JsonLines() if config.format == "json" else TextLines())
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(config.level.upper() if logger.name == "serving" else "WARNING")
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        handler.close()


def write_request(record: Record, route: str, status: int, seconds: float) -> None:
    """Write the line of a request that is over."""
    level = logging.DEBUG if route in WATCHED and status < 400 else logging.INFO
    if LOG.isEnabledFor(level):
        facts = {"id": record.id, "method": record.method, "route": route, "status": status, "seconds": round(seconds, 4),
                 "aborted": not record.complete or None, "trace_id": record.span.trace_id, **record.facts}  # fmt: skip
        LOG.log(level, "request", extra={"facts": {name: value for name, value in facts.items() if value is not None}})


def _handler(file: str | None) -> logging.Handler:
    if file is None:
        return logging.StreamHandler(sys.stderr)
    try:
        return logging.FileHandler(Path(file), encoding="utf-8")
    except OSError as error:
        raise NotWritable(f"the log {file} cannot be written ({error.strerror})", "a file that this user may write",
                          "--set log.file=gateway.log, or log.file=null for standard error") from None  # fmt: skip


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = getattr(record, "facts", {})
    return facts


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if PLAIN.fullmatch(text) else json.dumps(text)
