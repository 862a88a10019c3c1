"""One request while it is answered: who asks, and what it holds of the gateway until its answer ends.

`serving.edge` makes one for each request and lets go of everything at its end, however it ends: a generator that a broken
connection leaves behind is collected some time later, and a place must be free at once. It decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from serving.access import Access
from serving.keys import Key


@dataclass
class Visit:
    """A request.

    Attributes:
        access: the keys of the server.
        key: of the one who asks; None for somebody without a key, where none is needed.
        prompt_tokens: of its generation, estimated; 0 before it was let in.
        held: what to call at the end of the request.
    """

    access: Access
    key: Key | None = None
    prompt_tokens: int = 0
    held: list[Callable[[], None]] = field(default_factory=list)

    def reserve(self, tokens: int) -> None:
        """Hold tokens against the key's budget until the request ends; `RateLimited` if it is used up."""
        if self.key:
            self.held.append(self.access.rates.reserve(self.key, tokens))

    def spend(self, tokens: int) -> None:
        """Charge the key for tokens that were read and generated."""
        if self.key:
            self.access.rates.spend(self.key, tokens)

    def leave(self) -> None:
        """Let go of everything that is held; safe to call twice."""
        while self.held:
            self.held.pop()()


VISIT: ContextVar[Visit] = ContextVar("visit")
