"""The engine, as requests see it: an OpenAI chat request in, one completion or a stream of chunks out.

Every failure leaves here as one of the errors in `serving.problems`, and every generation is counted. A stream that is
closed early closes the connection to the engine, which then stops generating. `switch` turns new requests to another engine
or set of adapters; those under way end where they began.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from monitoring.metrics import (
    CACHED_TOKENS,
    FINISH_REASONS,
    GENERATED_TOKENS,
    GENERATION_DURATION,
    GENERATION_FINISHED,
    GENERATION_ITL,
    GENERATION_PROMPT_SIZE,
    GENERATION_REPLY_SIZE,
    GENERATION_REQUESTS,
    GENERATION_TTFT,
    PROMPT_TOKENS,
)
from serving import record
from serving.admission import estimated_tokens
from serving.engines.abilities import Abilities
from serving.engines.contract import Chat, Engine, Launch
from serving.loopback import Answer, Lost, Silent, ask
from serving.prices import UNKNOWN, Price
from serving.problems import BadRequest, EngineDown, EngineSilent, from_engine
from serving.supervisor import Supervisor
from serving.visit import VISIT

if TYPE_CHECKING:
    import httpx

CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"
OPERATIONS = {CHAT_PATH: "chat", TEXT_PATH: "text_completion"}  # as OpenTelemetry calls them
DONE = b"[DONE]"
GAPS_AT_ONCE = (
    32  # times between tokens that go into the metrics together: one by one they cost a tenth of all that a token costs here
)
HEALTH_SECONDS, METRICS_SECONDS = 2.0, 3.0  # Prometheus waits for 4

T = TypeVar("T")


class Meter:
    """Measures one generation: `async with` it, show it each chunk or the whole completion.

    The times to the first token and between tokens are measured on streams only: a completion in one piece does not show them.
    The key of the current request is charged for the tokens; for a stream that ends early, the pieces that came and the estimated
    prompt.

    Args:
        model: name of what generates.
        path: of the engine's endpoint, which says whether it is a chat or a text.
    """

    def __init__(self, model: str, path: str = CHAT_PATH) -> None:
        self.model, self.operation, self.began = model, OPERATIONS[path], time.perf_counter()
        self.first_token: float | None = None
        self.usage: dict[str, int] = {}
        self.cached_tokens = 0
        self.price, self.prompt_estimate = UNKNOWN, 0
        self.finish_reasons: list[str] = []
        self.pieces = 0
        self.visit = VISIT.get(None)
        self._record = record.current()
        self._newest = 0.0
        self._gaps: list[float] = []

    def see(self, event: Mapping[str, Any]) -> None:
        """Take the first token's time and the token counts from a chunk."""
        self.count(event)
        if not _has_token(event):
            return
        self.pieces += 1
        now = time.perf_counter()
        if self.first_token is None:
            self.first_token = now
            GENERATION_TTFT.labels(model=self.model).observe(now - self.began)
        else:
            self._gaps.append(now - self._newest)
            if len(self._gaps) == GAPS_AT_ONCE:
                self._tell_gaps()
        self._newest = now

    def count(self, event: Mapping[str, Any]) -> None:
        """Take the token counts, and why each reply ended, from a chunk or completion."""
        if event.get("usage"):
            self.usage = {
                key: int(event["usage"].get(key) or 0) for key in ("prompt_tokens", "completion_tokens", "total_tokens")
            }
            self.cached_tokens = int((event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        for choice in event.get("choices", ()):
            if reason := choice.get("finish_reason"):
                self.finish_reasons.append(reason)

    async def __aenter__(self) -> Meter:
        """Start measuring."""
        self._record.begin_generation(self.model, self.operation)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Count the generation by how it ended."""
        self._tell_gaps()
        outcome = _outcome(kind)
        GENERATION_REQUESTS.labels(model=self.model, outcome=outcome).inc()
        if self.usage or self.pieces or outcome == "cancelled":
            self._count_tokens(self.usage or {"prompt_tokens": self.prompt_estimate, "completion_tokens": self.pieces})
        if self.visit:
            self.visit.spend(self.usage.get("total_tokens", self.visit.prompt_tokens + self.pieces))
        if kind is None:
            GENERATION_DURATION.labels(model=self.model).observe(time.perf_counter() - self.began)
        ttft = self.first_token - self.began if self.first_token else None
        self._record.end_generation(self.usage, self.finish_reasons, ttft, error)

    def _tell_gaps(self) -> None:
        """Put the times between tokens into the metrics."""
        between = GENERATION_ITL.labels(model=self.model)
        for gap in self._gaps:
            between.observe(gap)
        self._gaps.clear()

    def _count_tokens(self, usage: Mapping[str, int]) -> None:
        """Count what was read and written, and what that costs."""
        prompt, reply = usage["prompt_tokens"], usage["completion_tokens"]
        PROMPT_TOKENS.labels(model=self.model).inc(prompt)
        GENERATED_TOKENS.labels(model=self.model).inc(reply)
        CACHED_TOKENS.labels(model=self.model).inc(min(self.cached_tokens, prompt))
        GENERATION_PROMPT_SIZE.labels(model=self.model).observe(prompt)
        GENERATION_REPLY_SIZE.labels(model=self.model).observe(reply)
        for reason in self.finish_reasons or ["none"]:
            GENERATION_FINISHED.labels(model=self.model, reason=reason if reason in FINISH_REASONS else "none").inc()
        self.price.charge(self.model, prompt, reply)


class Route:
    """The way to one engine with one set of names, and how many requests are on it."""

    def __init__(self, launch: Launch, supervisor: Supervisor, silence_seconds: float) -> None:
        self.launch, self.supervisor, self.silence_seconds = launch, supervisor, silence_seconds
        self.requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def get(self, path: str, seconds: float) -> tuple[int, str]:
        """Return status and text of a page of the engine; `Lost` or `TimeoutError` if there is none in time."""
        async with asyncio.timeout(seconds), self.ask("GET", path) as answer:
            return answer.status, (await answer.read()).decode()

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> AbstractAsyncContextManager[Answer]:
        """Send a request to the engine; what is returned and raised is that of `serving.loopback.ask`."""
        launch = self.launch
        return ask(launch.host, launch.port, method, path, body, headers, silence_seconds=self.silence_seconds)

    def __enter__(self) -> Route:
        """Count a request in."""
        self.requests += 1
        self._idle.clear()
        return self

    def __exit__(self, *_: object) -> None:
        """Count it out."""
        self.requests -= 1
        if not self.requests:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is on it."""
        await self._idle.wait()


class Upstream:
    """Sends requests to the engine."""

    def __init__(
        self, engine: Engine, launch: Launch, supervisor: Supervisor, silence_seconds: float, price: Price = UNKNOWN
    ) -> None:
        self.engine, self.silence_seconds, self.price = engine, silence_seconds, price
        self.route = Route(launch, supervisor, silence_seconds)
        self._abilities: Abilities | None = None

    @property
    def launch(self) -> Launch:
        """Return what new requests are answered by."""
        return self.route.launch

    @property
    def supervisor(self) -> Supervisor:
        """Return who keeps that engine running."""
        return self.route.supervisor

    def switch(self, launch: Launch, supervisor: Supervisor) -> Route:
        """Send new requests to another engine, or to the same one with other adapters; return the way of the earlier ones."""
        before, self.route = self.route, Route(launch, supervisor, self.silence_seconds)
        return before

    def check_up(self) -> None:
        """Raise `EngineDown`, with the reason and when to ask again, unless the engine runs."""
        status = self.supervisor.status
        if not status.up:
            raise EngineDown(status.reason, status.retry_after_seconds)

    async def healthy(self) -> bool:
        """Ask the engine itself whether it is well."""
        try:
            return (await self.route.get(self.engine.health_path, HEALTH_SECONDS))[0] == HTTPStatus.OK
        except (Lost, TimeoutError):
            return False

    async def metrics(self) -> str:
        """Return the engine's own metrics, empty if it has none; `EngineDown` if they cannot be had."""
        if not self.engine.metrics_path:
            return ""
        try:
            status, text = await self.route.get(self.engine.metrics_path, METRICS_SECONDS)
        except (Lost, TimeoutError) as error:
            raise self._lost(self.route, f"({str(error) or type(error).__name__})") from None
        if status != HTTPStatus.OK:
            raise self._lost(self.route, f"(status {status})")
        return text

    async def complete(self, body: Mapping[str, Any], path: str = CHAT_PATH) -> dict[str, Any]:
        """Return one completion, of a chat or, with the other path, of a text."""
        meter = Meter(body["model"], path)
        meter.price, meter.prompt_estimate = self.price, estimated_tokens(body)
        async with meter, self._sent(body, path) as reply:
            completion: dict[str, Any] = json.loads(await reply.read())
            meter.count(completion)
            return completion | {"model": body["model"]}  # llama.cpp names the base whatever answered

    async def stream(self, body: Mapping[str, Any], meter: Meter, path: str = CHAT_PATH) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed completion; the last one carries `usage`."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        route = self.route
        meter.price, meter.prompt_estimate = self.price, estimated_tokens(body)
        async with meter, self._sent(asked, path) as reply:
            async for data in reply.events():
                if data == DONE:
                    return
                event = orjson.loads(data)
                if "error" in event:
                    raise self._refusal(500, event["error"])
                meter.see(event)
                event["model"] = body["model"]
                yield event
            raise self._lost(route, "before the end of its reply")

    async def token_count(self, chat: Chat) -> int:
        """Return the length of a chat as the engine reads it, in tokens, up to where the reply begins."""
        return await self._ask(lambda client, launch: self.engine.count(client, launch, chat))

    async def abilities(self) -> Abilities:
        """Return what the engine can do with the model that it holds; asked once."""
        if self._abilities is None:
            self._abilities = await self._ask(self.engine.abilities)
        return self._abilities

    async def _ask(self, question: Callable[[httpx.Client, Launch], T]) -> T:
        """Ask the engine for something beside a generation, in a thread."""
        import httpx
        from starlette.concurrency import run_in_threadpool

        route = self.route

        def ask() -> T:
            with httpx.Client(timeout=self.silence_seconds, trust_env=False) as client:
                return question(client, route.launch)

        self.check_up()
        try:
            with route:
                return await run_in_threadpool(ask)
        except httpx.TimeoutException:
            raise self._silent() from None
        except httpx.HTTPStatusError as error:
            raise self._refusal(error.response.status_code, _error_object(error.response.content)) from None
        except httpx.HTTPError as error:
            raise self._lost(route, f"({type(error).__name__})") from None

    @asynccontextmanager
    async def _sent(self, body: Mapping[str, Any], path: str) -> AsyncIterator[Answer]:
        """Send a request; the block gets an answer with status 200."""
        self.check_up()
        route = self.route
        content = _encode(self.engine.select(body, route.launch))
        try:
            headers = record.current().asked(body)
            with route:
                async with route.ask("POST", path, content, headers) as reply:
                    if reply.status != HTTPStatus.OK:
                        raise self._refusal(reply.status, _error_object(await reply.read()))
                    yield reply
        except Silent:
            raise self._silent() from None
        except Lost as error:
            raise self._lost(route, f"({error})") from None

    def _silent(self) -> EngineSilent:
        return EngineSilent(f"the engine was silent for {self.silence_seconds:g} s", "an answer",
                            "a shorter request, or serve with more request_seconds")  # fmt: skip

    def _refusal(self, status: int, error: Mapping[str, Any]) -> Exception:
        return from_engine(status, error, self.engine.overflow(error))

    def _lost(self, route: Route, how: str) -> EngineDown:
        status = route.supervisor.status
        reason = "" if status.up else f": {status.reason}"
        return EngineDown(f"the connection to the engine was lost {how}{reason}", status.retry_after_seconds)


def text_of(event: Mapping[str, Any]) -> str:
    """Return the text that a chunk adds; empty for a chunk that adds none."""
    return "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices", ()))


def _has_token(event: Mapping[str, Any]) -> bool:
    for choice in event.get("choices", ()):
        piece = choice.get("delta", choice)  # a text completion has no delta
        if piece.get("content") or piece.get("text") or piece.get("reasoning_content") or piece.get("tool_calls"):
            return True
    return False


def _outcome(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "ok"
    if issubclass(kind, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return "refused" if issubclass(kind, BadRequest) else "error"


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # NaN, or a lone surrogate
        raise BadRequest(f"the request is not valid JSON: {error}", "finite numbers and valid Unicode") from None


def _error_object(content: bytes) -> Mapping[str, Any]:
    """Return the error object of an answer, whatever form it has."""
    try:
        body = json.loads(content)
    except ValueError:
        return {"message": content.decode("utf-8", "replace")[:500]}
    error = body.get("error", body) if isinstance(body, dict) else {"message": str(body)[:500]}
    return error if isinstance(error, dict) else {"message": str(error)}
