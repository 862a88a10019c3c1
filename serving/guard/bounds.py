"""The guards `repetition` and `length`: a reply that goes round in circles, and one that does not end."""

from __future__ import annotations

import re
from collections import Counter, deque

from serving.guard.contract import Action

LONGEST_WORD = 16
WORD = re.compile(rf"\w{{1,{LONGEST_WORD}}}")  # so that one endless word is many, too


class RepetitionWindow:
    """Finds the same run of words for the n-th time; with "block" the reply ends there.

    Args:
        action: "report" or "block".
        words: length of a run.
        times: how often it may come, less one.
    """

    name = "repetition"
    finish_reason = "content_filter"
    held = False

    def __init__(self, action: Action, words: int, times: int) -> None:
        self.action, self.times, self.found, self.stopped = action, times, list[str](), False
        self._run: deque[str] = deque(maxlen=words)
        self._seen: Counter[int] = Counter()
        self._begun = ""  # a word that may go on; it is out already

    def feed(self, piece: str) -> str:
        """Return the piece, or its part up to the end of the run that is one too many."""
        if self.found:
            return piece
        text, begun = self._begun + piece, len(self._begun)
        self._begun = ""
        for word in WORD.finditer(text):
            if word.end() == len(text) and len(word[0]) < LONGEST_WORD:
                self._begun = word[0]
            elif self._repeats(word[0]):
                self.stopped = self.action == "block"
                return piece[: max(0, word.end() - begun)] if self.stopped else piece
        return piece

    def end(self) -> str:
        """Look at the last word."""
        if self._begun and not self.found:
            self._repeats(self._begun)
        return ""

    def _repeats(self, word: str) -> bool:
        self._run.append(word)
        if len(self._run) == self._run.maxlen:
            run = hash(tuple(self._run))
            self._seen[run] += 1
            if self._seen[run] >= self.times:
                self.found.append("repetition")
        return bool(self.found)


class LengthWindow:
    """Finds a reply with too many characters; with "block" it ends there.

    Args:
        action: "report" or "block".
        max_chars: longest reply.
    """

    name = "length"
    finish_reason = "length"
    held = False

    def __init__(self, action: Action, max_chars: int) -> None:
        self.action, self.found, self.stopped, self._room = action, list[str](), False, max_chars

    def feed(self, piece: str) -> str:
        """Return the piece, or as much of it as there is room for."""
        out = piece[: self._room] if self.action == "block" else piece
        if len(piece) > self._room and not self.found:
            self.found.append("length")
            self.stopped = self.action == "block"
        self._room = max(0, self._room - len(piece))
        return out

    def end(self) -> str:
        """Return nothing: nothing was held."""
        return ""
