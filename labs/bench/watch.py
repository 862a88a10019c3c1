"""What watching costs: `llmlab bench watch`. Thousands of requests of strangers, then scrapes of the real gateway.

The requests make up models, routes, methods, keys and filters, since that is what could become labels. Most are refused, so that
no time goes into generating; every fiftieth is a real chat. The scrape times are of the machine as it is now.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import string
import time
from typing import Any

from serving.settings import load_serve_config

MODEL = "smollm2-135m"
AT_ONCE = 16
SCRAPES = 30
INTERVAL_SECONDS = 5.0  # of monitoring/prometheus/prometheus.yml
REAL_EVERY = 50
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "BREW", "PROPFIND")
MOST_SERIES, MOST_SCRAPE_SECONDS, MOST_CPU_SHARE = 2000, 0.05, 0.02


def bench_watch(requests: int) -> dict[str, Any]:
    """Return the series before and after so many requests, and the time and processor time of a scrape.

    Raises:
        LabError: the server does not start.
    """
    from labs.screen import say
    from serving.launch import running

    config = load_serve_config("default", ["port=0", "engine_port=0", "keys=null", "log.level=error"])
    with running(MODEL, config, adapter="none", say=say) as served:
        before = series(served.url)
        asyncio.run(strangers(served.url, requests))
        after = series(served.url)
        return {"requests": requests, "series_before": before, "series_after": after} | scrapes(served.url)


def series(url: str) -> int:
    """Return how many series the gateway exports."""
    import httpx

    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return sum(1 for line in lines if not line.startswith("#"))


def scrapes(url: str) -> dict[str, Any]:
    """Return seconds of a scrape, and the share of a core that scraping takes, by this process' own processor time."""
    import httpx

    took = []
    with httpx.Client(trust_env=False) as client:
        client.get(f"{url}/metrics")
        began = time.process_time()
        for _ in range(SCRAPES):
            start = time.perf_counter()
            client.get(f"{url}/metrics").raise_for_status()
            took.append(time.perf_counter() - start)
        cpu = (time.process_time() - began) / SCRAPES  # the gateway's and the client's, which are one process here
    return {
        "scrape_p50_seconds": round(statistics.median(took), 4),
        "scrape_max_seconds": round(max(took), 4),
        "cpu_share_of_a_core": round(cpu / INTERVAL_SECONDS, 4),
    }


async def strangers(url: str, requests: int, seed: int = 0) -> None:
    """Send so many requests, with names made up anew for each; whatever is answered is fine, as long as it is answered."""
    import httpx

    drawn = random.Random(seed)
    made = iter([_request(drawn, number) for number in range(requests)])
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as client:

        async def one_after_another() -> None:
            for method, path, extra in made:
                await client.request(method, path, **extra)

        await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))


def _request(drawn: random.Random, number: int) -> tuple[str, str, dict[str, Any]]:
    name = "".join(drawn.choices(string.ascii_lowercase + string.digits + "-/.", k=12)).strip("/.") or "x"
    headers = {"Authorization": f"Bearer {name}", "X-Request-Id": name.replace("/", "-")}
    if number % REAL_EVERY == 0:
        chat = {"model": MODEL, "messages": [{"role": "user", "content": name}], "max_tokens": 1, "stream": number % 100 == 0}
        return "POST", "/v1/chat/completions", {"json": chat, "headers": headers}
    kind = drawn.randrange(5)
    if kind == 0:
        return drawn.choice(METHODS), f"/{name}", {"headers": headers}
    if kind == 1:
        return "GET", f"/v1/models/{name}", {"headers": headers}
    if kind == 2:
        return "POST", "/v1/chat/completions", {"json": {"model": name, "messages": [{"role": "user", "content": "x"}]}}
    if kind == 3:
        return "POST", "/v1/rag/query", {"json": {"question": name, "model": name, "where": name}, "headers": headers}
    return drawn.choice(METHODS), f"/v1/documents/{name}", {"headers": headers}
