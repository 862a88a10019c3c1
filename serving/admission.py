"""Which generations begin, which wait, and which are refused at once with 429 and the seconds after which there is room.

So many run as the engine has slots, so the engine itself never queues; a few more wait here, first come first served. Whoever
would wait too long hears so at once, from how long generations have taken, and not after having waited. The bounds are
`admission:` in configs/serve. It knows tokens and time, and nothing of HTTP; it runs on one event loop, so no lock is needed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monitoring.metrics import ADMISSION_REFUSED, ADMISSION_RUNNING, ADMISSION_WAIT, ADMISSION_WAITING
from serving.problems import Overloaded
from serving.settings import AdmissionBounds
from serving.visit import VISIT, Visit

BYTES_PER_TOKEN = 4  # of English text; other languages have more tokens, so their prompts count for less than they are
TURN_TOKENS = 8  # a role and the marks around it
NEWEST_SHARE = 0.2  # of the newest generation in the mean time of one
PATIENCE = 3  # how many times its longest wait a request is kept if the prediction was wrong


@dataclass(frozen=True)
class Need:
    """What a generation takes: sequences at once, and the tokens of its prompt (estimated) and of its longest reply."""

    sequences: int
    prompt_tokens: int
    reply_tokens: int


@dataclass(eq=False)
class _Place:
    """A generation that runs or waits."""

    visit: Visit
    size: int
    tokens: int
    granted: asyncio.Future[None]
    since: float


class Admission:
    """The places of one engine.

    Args:
        bounds: how many run and wait.
        slots: sequences that the engine generates at once.
        clock: seconds that only rise.
    """

    def __init__(self, bounds: AdmissionBounds, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.bounds, self.clock = bounds, clock
        self.size = bounds.running or slots
        self.queue_size = self.size if bounds.queued is None else bounds.queued
        self._running: set[_Place] = set()
        self._waiting: deque[_Place] = deque()
        self._seconds = 0.0
        self._show()

    async def enter(self, need: Need) -> None:
        """Take a place for the generation of the current request, which gives it back when it ends; wait for one if need be.

        Raises:
            Overloaded: there is no room, or there would be none for too long.
            RateLimited: the key has used up its tokens.
        """
        visit = VISIT.get()
        visit.reserve(need.prompt_tokens + need.sequences * need.reply_tokens)
        place = _Place(
            visit, min(need.sequences, self.size), need.prompt_tokens, asyncio.get_running_loop().create_future(), self.clock()
        )
        if self._waiting or self._used + place.size > self.size:
            self._check_room(place)
            await self._wait(place)
        else:
            self._grant(place)
        visit.prompt_tokens = need.prompt_tokens

    async def _wait(self, place: _Place) -> None:
        self._waiting.append(place)
        self._show()
        try:
            async with asyncio.timeout(PATIENCE * self.bounds.wait_seconds):
                await place.granted
        except TimeoutError:
            raise self._refusal("wait", f"there was no room for {PATIENCE * self.bounds.wait_seconds:g} s", place) from None
        finally:
            if place in self._waiting:  # it was not granted: the client left, or it was too long
                self._waiting.remove(place)
                self._advance()

    def _check_room(self, place: _Place) -> None:
        waiting, tokens = len(self._waiting), place.tokens + sum(each.tokens for each in self._waiting)
        if waiting >= self.queue_size:
            raise self._refusal(
                "queue", f"{len(self._running)} generations run and {waiting} wait, which is all there is room for", place
            )
        if tokens > self.bounds.queued_tokens:
            came = f"the prompts that wait would have {tokens} tokens, and there is room for {self.bounds.queued_tokens}"
            raise self._refusal("queued_tokens", came, place)
        seconds = self._expected(place)
        if seconds > self.bounds.wait_seconds:
            came = f"it would wait for about {seconds:.0f} s, and nobody waits for more than {self.bounds.wait_seconds:g} s here"
            raise self._refusal("wait", came, place)

    def _refusal(self, reason: str, came: str, place: _Place) -> Overloaded:
        ADMISSION_REFUSED.labels(reason=reason).inc()
        return Overloaded(came, "tokens" if reason == "queued_tokens" else "requests", self._expected(place))

    def _expected(self, place: _Place) -> float:
        """Return the seconds until there is room for a newcomer, if all take as long as those before did."""
        now, least = self.clock(), self._seconds / self.size
        ends = sorted(max(self._seconds - (now - each.since), least) for each in self._running for _ in range(each.size))
        turns, last = divmod(place.size + sum(each.size for each in self._waiting) - 1, self.size)
        return turns * self._seconds + (ends[min(last, len(ends) - 1)] if ends else 0.0)

    def _grant(self, place: _Place) -> None:
        began = self.clock()
        self._running.add(place)
        ADMISSION_WAIT.observe(began - place.since)
        place.since = began
        place.visit.held.append(lambda: self._release(place))
        if not place.granted.done():
            place.granted.set_result(None)
        self._show()

    def _release(self, place: _Place) -> None:
        self._running.discard(place)
        took = self.clock() - place.since
        self._seconds = took if not self._seconds else (1 - NEWEST_SHARE) * self._seconds + NEWEST_SHARE * took
        self._advance()

    def _advance(self) -> None:
        while self._waiting and self._used + self._waiting[0].size <= self.size:
            self._grant(self._waiting.popleft())
        self._show()

    @property
    def _used(self) -> int:
        return sum(place.size for place in self._running)

    def _show(self) -> None:
        ADMISSION_RUNNING.set(len(self._running))
        ADMISSION_WAITING.set(len(self._waiting))


def need_of(requests: Sequence[Mapping[str, Any]]) -> Need:
    """Return what generations take that are asked for at once, of chats or texts whose length is set; prompts are estimated."""
    return Need(len(requests), sum(map(estimated_tokens, requests)), requests[0]["max_tokens"])


def estimated_tokens(request: Mapping[str, Any]) -> int:
    """Return about how many tokens the prompt of a chat or text has."""
    prompt = request.get("prompt", request.get("messages"))
    if isinstance(prompt, list) and all(isinstance(part, int) for part in prompt):
        return len(prompt)  # token ids
    turns = len(prompt) if isinstance(prompt, list) else 1
    return len(json.dumps(prompt, ensure_ascii=False).encode("utf-8", "replace")) // BYTES_PER_TOKEN + TURN_TOKENS * turns
