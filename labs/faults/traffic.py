"""What users do, so that panels show something: chats and questions to the documents, from a few clients that keep coming.

It counts nothing and judges no answer; errors are a part of the lesson, and clients simply ask again.
"""

from __future__ import annotations

import itertools
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

CHATS = ("Say hello.", "Thank you!", "Good morning.", "Translate to French: cat")  # a healthy model stops by itself
QUESTIONS = ("Who developed Falcon 40B?", "Who launched Phi-2?", "In which language is Qdrant written?", "What does LoRA freeze?")
CHATS_AT_A_TIME = 3
CHAT_TOKENS, ANSWER_TOKENS = 48, 16
PAUSE_SECONDS = 0.3  # of a client between two requests
TIMEOUT_SECONDS = 120.0


class Traffic:
    """Some clients of one gateway, for the length of the block; `clients` may change meanwhile."""

    def __init__(self, url: str, clients: int) -> None:
        self.url, self.clients = url, clients
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Traffic:
        """Begin."""
        self.resize(self.clients)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop; what is under way is left alone, since the gateway ends too."""
        self._stopping.set()

    def resize(self, clients: int) -> None:
        """Let so many clients come; those beyond it stay away after their request."""
        self.clients = clients
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for number in range(clients):
            if not any(thread.name == f"client-{number}" for thread in self._threads):
                thread = threading.Thread(target=self._come, args=(number,), name=f"client-{number}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _come(self, number: int) -> None:
        import httpx

        turns = itertools.islice(itertools.count(), number, None)
        with httpx.Client(base_url=self.url, trust_env=False, timeout=TIMEOUT_SECONDS) as client:
            while number < self.clients and not self._stopping.wait(PAUSE_SECONDS):
                try:
                    self._ask(client, next(turns))
                except (httpx.HTTPError, KeyError, ValueError):
                    continue

    def _ask(self, client: httpx.Client, turn: int) -> None:
        """Chat a little with each served model, and ask the documents a question."""
        models = [card["id"] for card in client.get("/v1/models").json()["data"] if card["task"] == "generate"]
        for model, number in itertools.product(models, range(CHATS_AT_A_TIME)):
            _read(client, "/v1/chat/completions", {
                "model": model, "stream": True, "max_tokens": CHAT_TOKENS, "temperature": 0,
                "messages": [{"role": "user", "content": CHATS[(turn + number) % len(CHATS)]}],
            })  # fmt: skip
        question = QUESTIONS[turn % len(QUESTIONS)]
        _read(client, "/v1/rag/query", {"question": question, "stream": True, "max_tokens": ANSWER_TOKENS})


def _read(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    with client.stream("POST", path, json=body) as reply:
        for _ in reply.iter_bytes():
            pass
