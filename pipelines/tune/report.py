"""What a file of rows holds, before anything is trained on it: repetitions, leaks, private data, lengths, and the mask.

Nothing is changed and nothing is shown here. Texts that look private are counted and located, never quoted. Run by:

    llmlab data report faq.jsonl --eval held-out.jsonl
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import DataError, TrainingFailed
from pipelines.private_forms import KINDS
from pipelines.tune.packing import encode
from pipelines.tune.rows import Row

SHINGLE_WORDS = 5
NEAR = 0.8
COMMON_SHINGLE_ROWS = 50  # a shingle of more rows is a phrase of the format, not a sign of a copy
OVERLAP_WORDS = 13
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Report:
    """Origins are places such as "faq.jsonl:12"; token counts are of the model's tokenizer, with its template.

    Attributes:
        rows: how many there are.
        copies: (origin, origin of the first) of rows that repeat another one word for word.
        near_copies: (origin, origin, similarity 0..1): Jaccard index of their word 5-grams (Broder 1997) of 0.8 or more.
        overlap: rows of the evaluation file that share 13 words in a row (Brown et al. 2020, arXiv 2005.14165) with a row
            here, or a whole shorter text.
        private: for each kind of pipelines.private, such as e-mail, card and API key, the rows that hold one.
        prompt_tokens, reply_tokens: for each row, tokens that are read and tokens that are learnt.
        too_long: rows that would lose their end, were they cut at max_tokens.
        silent: rows without a supervised token.
        endless: rows whose template leaves a reply without its end.
    """

    rows: int
    copies: list[tuple[str, str]]
    near_copies: list[tuple[str, str, float]]
    overlap: list[str]
    private: dict[str, list[str]]
    prompt_tokens: list[int]
    reply_tokens: list[int]
    too_long: list[str]
    silent: list[str]
    endless: list[str]

    @property
    def supervised_share(self) -> float:
        """Return the share of tokens that are learnt, 0..1."""
        return sum(self.reply_tokens) / max(1, sum(self.prompt_tokens) + sum(self.reply_tokens))


def report(rows: Sequence[Row], tokenizer: Any, max_tokens: int, evaluation: Sequence[Row] = ()) -> Report:
    """Look a set of rows over.

    Args:
        rows: what would be learnt.
        tokenizer: of the model that would learn it.
        max_tokens: longest sequence of the recipe.
        evaluation: rows that must not be among them.
    """
    lengths, too_long, silent, endless = [], [], [], []
    for row in rows:
        try:
            encoded = encode(row, tokenizer)
        except TrainingFailed:
            endless.append(row.origin)
            continue
        lengths.append((len(encoded.tokens) + 1 - encoded.supervised, encoded.supervised))
        if len(encoded.tokens) > max_tokens:
            too_long.append(row.origin)
        if not encoded.supervised:
            silent.append(row.origin)
    return Report(
        rows=len(rows), copies=_copies(rows), near_copies=list(_near_copies(rows)), overlap=overlap(rows, evaluation),
        private={kind.name: [row.origin for row in rows if kind.search(text_of(row), 0)] for kind in KINDS},
        prompt_tokens=[p for p, _ in lengths], reply_tokens=[r for _, r in lengths],
        too_long=too_long, silent=silent, endless=endless,
    )  # fmt: skip


def check_overlap(rows: Sequence[Row], evaluation: Sequence[Row], *, allowed: bool) -> None:
    """Raise `DataError` if rows to evaluate with are among those to learn from, unless that is allowed."""
    shared = [] if allowed else overlap(rows, evaluation)
    if shared:
        raise DataError(f"{len(shared)} of {len(evaluation)} evaluation rows overlap with the rows to learn, first {shared[0]}",
                        f"no text of {OVERLAP_WORDS} words in both", "llmlab data report FILE --eval FILE lists them; "
                        "--set allow_overlap=true trains all the same")  # fmt: skip


def overlap(rows: Sequence[Row], evaluation: Sequence[Row]) -> list[str]:
    """Return the origins of evaluation rows whose prompt shares 13 words in a row, or all its words, with a row's prompt."""
    if not evaluation:
        return []
    known = {gram for row in rows for gram in _grams(_words(_asked(row)), OVERLAP_WORDS)}
    return [row.origin for row in evaluation if known.intersection(_grams(_words(_asked(row)), OVERLAP_WORDS))]


def text_of(row: Row) -> str:
    """Return all turns of a row as one text."""
    if row.text is not None:
        return row.text
    return "\n".join([*(turn["content"] for turn in row.messages), row.rejected or ""])


def mask(row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return a row as the model sees it: (text, whether it is learnt), in pieces."""
    encoded = encode(row, tokenizer)
    tokens = [*encoded.tokens, encoded.labels[-1] or 0]
    learnt = [False, *(label is not None for label in encoded.labels)]
    pieces: list[tuple[list[int], bool]] = []
    for token, flag in zip(tokens, learnt, strict=True):
        if pieces and pieces[-1][1] == flag:
            pieces[-1][0].append(token)
        else:
            pieces.append(([token], flag))
    return [(tokenizer.decode(ids), flag) for ids, flag in pieces]


def draw(found: Report, max_tokens: int, title: str, path: Path) -> None:
    """Draw how long prompts and replies are, with the limit, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    whole = [p + r for p, r in zip(found.prompt_tokens, found.reply_tokens, strict=True)]
    for values, label in ((found.reply_tokens, "replies (learnt)"), (whole, "whole rows")):
        axes.hist(values, bins=30, alpha=0.6, label=label)
    axes.axvline(max_tokens, color="tab:red", linestyle="--", label=f"max_tokens {max_tokens}")
    axes.set(title=title, xlabel="tokens", ylabel="rows")
    axes.legend()
    figure.savefig(path, dpi=120)


def _copies(rows: Sequence[Row]) -> list[tuple[str, str]]:
    first: dict[str, str] = {}
    found = []
    for row in rows:
        text = " ".join(_words(text_of(row)))
        if text in first:
            found.append((row.origin, first[text]))
        else:
            first[text] = row.origin
    return found


def _near_copies(rows: Sequence[Row]) -> Iterator[tuple[str, str, float]]:
    """Yield pairs that are alike but not the same; candidates are rows that share a shingle."""
    shingles = [set(_grams(_words(text_of(row)), SHINGLE_WORDS)) for row in rows]
    holders: dict[tuple[str, ...], list[int]] = {}
    for number, own in enumerate(shingles):
        shared: Counter[int] = Counter()
        for shingle in own:
            others = holders.setdefault(shingle, [])
            if len(others) < COMMON_SHINGLE_ROWS:
                shared.update(others)
                others.append(number)
        for other, _ in shared.most_common(3):
            common = len(own & shingles[other])
            similarity = common / (len(own) + len(shingles[other]) - common)
            if NEAR <= similarity < 1:
                yield rows[number].origin, rows[other].origin, round(similarity, 3)


def _asked(row: Row) -> str:
    if row.text is not None:
        return row.text
    return "\n".join(turn["content"] for turn in row.prompt if turn["role"] == "user")


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: Sequence[str], size: int) -> Iterable[tuple[str, ...]]:
    """Return all runs of `size` words; of a shorter text the whole."""
    return (tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))) if words else ()
