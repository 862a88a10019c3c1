"""A registry on a port of its own: what is answered, to whom, and that nothing stays behind."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from monitoring import exporter
from monitoring.exporter import Exporter


def get(url: str, path: str = "", method: str = "GET") -> tuple[int, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request(method, path or parts.path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_it_serves_its_registry_and_nothing_else() -> None:
    registry = CollectorRegistry()
    Gauge("depth_metres", "How deep it is.", registry=registry).set(3)
    with Exporter(registry, 0) as served:
        status, text = get(served.url)
        assert status == 200
        assert [(f.name, f.samples[0].value) for f in text_string_to_metric_families(text)] == [("depth_metres", 3.0)]
        assert get(served.url, "/")[0] == get(served.url, "/metrics/x")[0] == 404
        assert get(served.url, method="POST")[0] == 405
        with socket.socket() as outside:  # another address of this machine
            assert outside.connect_ex(("127.0.0.2", urlsplit(served.url).port or 0)) != 0


def test_a_scrape_sees_all_of_a_change_or_nothing() -> None:
    registry = CollectorRegistry()
    both = [Counter(name, name, registry=registry) for name in ("first", "second")]
    stop = threading.Event()
    with Exporter(registry, 0) as served:

        def change() -> None:
            while not stop.is_set():
                with served.lock:
                    for counter in both:
                        counter.inc()
                        time.sleep(0.0005)

        worker = threading.Thread(target=change)
        worker.start()
        try:
            seen = [
                {s.name: s.value for f in text_string_to_metric_families(get(served.url)[1]) for s in f.samples}
                for _ in range(30)
            ]
        finally:
            stop.set()
            worker.join()
    assert all(values["first_total"] == values["second_total"] for values in seen)
    assert len({values["first_total"] for values in seen}) > 3


def test_a_port_in_use_is_refused_and_given_back_at_the_end() -> None:
    with Exporter(CollectorRegistry(), 0) as served:
        port = urlsplit(served.url).port or 0
        with pytest.raises(OSError, match="in use"):
            Exporter(CollectorRegistry(), port)
    with Exporter(CollectorRegistry(), port) as again:
        assert get(again.url)[0] == 200


def test_a_silent_client_neither_blocks_others_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter._Handler, "timeout", 0.5)
    before = set(threading.enumerate())
    with Exporter(CollectorRegistry(), 0) as served, socket.socket() as silent:
        silent.connect(("127.0.0.1", urlsplit(served.url).port or 0))
        assert get(served.url)[0] == 200
        began = time.monotonic()
        served.close()
        assert time.monotonic() - began < 0.4
        silent.settimeout(5)
        assert silent.recv(1) == b""  # dropped
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
