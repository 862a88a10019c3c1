"""Ask the running server a question and show the answer with its sources. `make ask Q="Who developed Falcon 40B?"`

`Chat` is for commands that have a model work for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.config import unknown
from pipelines.errors import EngineError, LabError

if TYPE_CHECKING:
    import httpx

TIMEOUT_SECONDS = 300.0
REPLY_TOKENS = 96
KEY_VARIABLE = "LLMLAB_API_KEY"
T = TypeVar("T")


def ask(server: str, question: str, k: int | None = None, where: str | None = None, model: str | None = None,
        max_tokens: int | None = None) -> dict[str, Any]:  # fmt: skip
    """Return the server's answer to a question; see POST /v1/rag/query, which chooses what is None.

    Raises:
        EngineError: nothing answers at that address.
        LabError: the server refused the question; says why.
    """
    import httpx

    given = {"question": question, "k": k, "where": where, "model": model, "max_tokens": max_tokens}
    body = {key: value for key, value in given.items() if value is not None}
    send = partial(
        httpx.post, f"{server}/v1/rag/query", json=body, timeout=TIMEOUT_SECONDS, headers=key_header(), trust_env=False
    )
    return _answered(server, send, dict)


def models(server: str) -> list[str]:
    """Return the names that the server serves, the base first; errors as for `ask`."""
    import httpx

    send = partial(httpx.get, f"{server}/v1/models", timeout=TIMEOUT_SECONDS, headers=key_header(), trust_env=False)
    return _answered(server, send, _generators)


def preferred(server: str) -> str:
    """Return the model for a question that names none: the newest adapter, or the base where there is none."""
    names = models(server)
    return names[min(1, len(names) - 1)]


def _generators(content: Any) -> list[str]:
    """Return the names of the models that generate; the list has the embedder too."""
    return [str(card["id"]) for card in content["data"] if card["task"] == "generate"]


class Chat:
    """A served model that replies in JSON, always with the likeliest token; `with` it.

    Args:
        server: address of the gateway.
        model: a name that it serves; None for the first one, which is the base.
    """

    def __init__(self, server: str, model: str | None) -> None:
        self.server, self.model = server, model or ""

    def __enter__(self) -> Chat:
        """Connect; `EngineError` if nothing answers there, `UnknownName` if the model is not served."""
        import httpx

        self._client = httpx.Client(base_url=self.server, timeout=TIMEOUT_SECONDS, headers=key_header(), trust_env=False)
        send = partial(self._client.get, "/v1/models")
        names = _answered(self.server, send, _generators)
        if not names or self.model not in ["", *names]:
            raise unknown("served model", self.model, names)
        self.model = self.model or names[0]
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up."""
        self._client.close()

    def __call__(self, messages: list[dict[str, str]], schema: dict[str, Any]) -> str:
        """Return the reply to chat turns, which the engine holds to a JSON schema; cut if it is very long."""
        form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": REPLY_TOKENS, "response_format": form}
        send = partial(self._client.post, "/v1/chat/completions", json=body)
        return _answered(self.server, send, lambda content: str(content["choices"][0]["message"]["content"]))


def key_header() -> dict[str, str]:
    """Return the header that carries the API key of the environment (LLMLAB_API_KEY), if there is one."""
    key = os.environ.get(KEY_VARIABLE, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _answered(server: str, send: Callable[[], httpx.Response], read: Callable[[Any], T]) -> T:
    """Return what `read` takes of the server's answer; errors as for `ask`."""
    import httpx

    try:
        response = send()
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise EngineError(
            f"nothing answers at {server} ({type(error).__name__})", "a running server", "make serve, in another terminal"
        ) from None
    try:
        content = response.json()
        if not response.is_error:
            return read(content)
        problem = content["error"]
    except (ValueError, KeyError, TypeError, IndexError):
        raise EngineError(f"what answers at {server} is not this gateway (HTTP {response.status_code})", "a running server",
                          "make serve PORT=8001, then make ask PORT=8001") from None  # fmt: skip
    raise LabError(f"the server refused (HTTP {response.status_code}): {problem['message']}", problem.get("expected", ""),
                   problem.get("next", ""))  # fmt: skip


def show_answer(answer: dict[str, Any]) -> None:
    """Print an answer, the passages it cites, and where the time went."""
    from labs.screen import OUT

    OUT.print(answer["answer"], style="bold", markup=False)
    for passage in answer["citations"]:
        OUT.print(f"  [{passage['number']}] {passage['title']} ({passage['source']}, score {passage['score']:.2f})", markup=False)
        OUT.print(f"      {passage['text']}", markup=False, style="dim")
    for passage in answer["held_back"]:
        OUT.print(f"  held back: {passage['title']} ({passage['source']}): it {passage['reason']}", markup=False)
    if answer["abstained"]:
        OUT.print("  nearest: " + "; ".join(p["title"] for p in answer["passages"]), markup=False, style="dim")
    times = ", ".join(
        f"{stage.removesuffix('_seconds')} {value:.2f} s" for stage, value in answer["timings"].items() if value is not None
    )
    OUT.print(f"  {answer['model']}: {times}", markup=False, style="dim")
