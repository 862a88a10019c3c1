"""The guards `secrets` and `personal`: what pipelines.private finds is reported, replaced, or a reason to stop."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.private import begins_of, in_place_of, kinds_of, redacted, spans
from pipelines.private_forms import Group
from serving.guard.contract import Action

LOOK_BACK = 4  # characters before a place that the patterns look at


class PrivateScreen:
    """Finds private data of a group in a whole text."""

    def __init__(self, name: Group) -> None:
        self.name, self._kinds = name, kinds_of(name)

    def find(self, text: str) -> Sequence[str]:
        """Return the kind of each thing that is found."""
        return [found.kind for found in spans(text, self._kinds)]

    def redacted(self, text: str) -> str:
        """Return the text with each thing replaced by its kind."""
        return redacted(text, self._kinds)[0]


class PrivateWindow:
    """Replaces private data in a reply, or stops the reply at it, however the reply is cut into pieces.

    Of what was fed it keeps only what may still become part of a match, and a few characters before that.
    """

    finish_reason = "content_filter"

    def __init__(self, name: Group, action: Action) -> None:
        self.name, self.action, self.found, self.stopped = name, action, list[str](), False
        self._kinds, self._begins = kinds_of(name), begins_of(name)
        self._text, self._at = "", 0  # all before `_at` is out

    @property
    def held(self) -> bool:
        """Return True if text waits."""
        return self._at < len(self._text)

    def feed(self, piece: str) -> str:
        """Return what can no longer become part of a match, in its final form."""
        self._text += piece
        if not self._begins.search(self._text, self._at):
            return self._let_out(len(self._text))
        return self._out(min(kind.open_from(self._text) for kind in self._kinds))

    def end(self) -> str:
        """Return the rest."""
        return self._out(len(self._text))

    def _out(self, until: int) -> str:
        """Let the text before `until` out, and matches that begin before it as a whole."""
        pieces = []
        for found in spans(self._text, self._kinds, self._at, until):
            pieces.append(self._text[self._at : found.start])
            self.found.append(found.kind)
            self._at = found.end
            if self.action == "block":
                self.stopped, self._text, self._at = True, "", 0
                return "".join(pieces)
            pieces.append(in_place_of(found.kind))
        pieces.append(self._let_out(max(until, self._at)))
        return "".join(pieces)

    def _let_out(self, until: int) -> str:
        """Return the text before `until` that is not out, and keep what is looked back at."""
        out, kept = self._text[self._at : until], max(0, until - LOOK_BACK)
        self._text, self._at = self._text[kept:], until - kept
        return out
