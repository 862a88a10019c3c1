"""The log: a line for each request with its id, which nobody can forge and which holds no prompt."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.errors import NotWritable
from serving import record
from serving.access import Access
from serving.drain import Drain
from serving.edge import Edge
from serving.logs import written
from serving.rates import Rates
from serving.settings import LogConfig, load_serve_config
from serving.traces import NO_SPAN
from tests.serving.conftest import MODEL, wait_until

EVIL = 'x" status=200\r\n2026-01-01 info request id=forged \u2028 \x1b[31m'


def config(file: Path, form: Any = "json", level: Any = "info") -> LogConfig:
    return LogConfig(format=form, level=level, file=str(file), prompts=False)


def test_a_request_is_one_line(http: httpx.Client, tmp_path: Path) -> None:
    with written(config(tmp_path / "log")):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "the secret word"}], "max_tokens": 3, "stream": True}
        answer = http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "abc-1", "Authorization": "Bearer hidden"})
        refused = http.get("/v1/models/none", headers={"X-Request-Id": "bad id" + "x" * 99})
        lines = wait_until(
            lambda: (tmp_path / "log").read_text().splitlines()[1:] and (tmp_path / "log").read_text().splitlines()
        )
    first, second = map(json.loads, lines)
    assert answer.headers["X-Request-Id"] == first["id"] == "abc-1"
    assert first["route"] == "/v1/chat/completions" and first["status"] == 200 and first["model"] == MODEL
    assert first["output_tokens"] == 3 and first["input_tokens"] > 3 and first["finish_reason"] == "length"
    assert 0 < first["ttft_seconds"] < first["seconds"] and "aborted" not in first
    assert second["route"] == "/v1/models/{name:path}" and second["status"] == 404
    assert refused.headers["X-Request-Id"] == second["id"] == refused.json()["request_id"] != "bad id" + "x" * 99
    assert "secret word" not in "".join(lines) and "hidden" not in "".join(lines)


def test_a_client_that_leaves_is_told(http: httpx.Client, tmp_path: Path) -> None:
    with written(config(tmp_path / "log")):
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": True,
        }
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_bytes())
        line = wait_until(lambda: (tmp_path / "log").read_text())
    assert json.loads(line)["aborted"] is True


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_forges_a_line(tmp_path: Path, form: Any) -> None:
    with written(config(tmp_path / "log", form)):
        log = logging.getLogger("serving.requests")
        log.info("request", extra={"facts": {"route": EVIL, "model": EVIL}})
        log.warning("came: %s", EVIL)
        try:
            raise ValueError(EVIL)
        except ValueError as error:
            log.error("unexpected", exc_info=error)
    text = (tmp_path / "log").read_text(encoding="utf-8")
    starts = [line for line in text.splitlines() if not line.startswith("    | ")]
    assert len(starts) == 3 and all("forged" not in line[:40] for line in starts) and "\x1b" not in text and "\u2028" not in text
    assert form == "text" or [json.loads(line)["level"] for line in starts] == ["info", "warning", "error"]


def test_an_unexpected_error_has_the_id_of_its_request(tmp_path: Path) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("out of order")

    async def ask() -> httpx.Response:
        access = Access(None, "127.0.0.1", Rates(tmp_path / "spent.sqlite"))
        transport = httpx.ASGITransport(Edge(broken, lambda _: 1000, access, Drain(1), load_serve_config().connections))
        async with httpx.AsyncClient(transport=transport, base_url="http://lab") as client:
            return await client.get("/healthz", headers={"X-Request-Id": "r-42"})

    with written(config(tmp_path / "log")):
        answer = asyncio.run(ask())
    error, request = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "unexpected error r-42"
    assert "r-42" in error["message"] and "out of order" in error["traceback"] and "Traceback" not in answer.text
    assert request["id"] == answer.headers["X-Request-Id"] == "r-42" and request["status"] == 500


def test_prompts_are_kept_only_when_asked_for() -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    for prompts in (True, False):
        own = record.Record("id", "POST", NO_SPAN, prompts=prompts)
        own.asked(body)
        assert own.facts == ({"prompt": body["messages"]} if prompts else {})


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match="cannot be written"), written(config(tmp_path / "none" / "log")):
        pass
