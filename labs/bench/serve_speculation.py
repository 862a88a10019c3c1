"""What guessing tokens from the prompt brings to answers that repeat it: two llama.cpp engines, with it and without, in turns.

The questions ask for a passage word for word, in the prompt that the reader has in service; it is the only one there, since a
small model that is shown several writes sentences of its own. It does so even then for some pages, so a reply is an extract only
if its words do stand in the prompt. Guesses should change the speed only, but several tokens at once are computed in another
order than one by one, so the replies are compared too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from labs.bench.serve_contenders import alone
from labs.bench.serve_figures import tpot
from labs.bench.serve_load import Outcome, Target, answered, client, send
from pipelines.catalogue import Model
from pipelines.config import ROOT
from pipelines.rag.answer import messages

REPLY_TOKENS = 64
CONTEXT_TOKENS = 2048
WORDS_TOGETHER, EXTRACT_SHARE = 4, 0.8  # an extract: so many of its runs of four words stand in the prompt
QUESTION = "Repeat the text of passage [1] word for word."

Progress = Callable[[str, int, int], None]


class Page(NamedTuple):
    """A passage of a prompt."""

    title: str
    text: str


class Pair(NamedTuple):
    """What one prompt got.

    Attributes:
        plain: the reply without guesses.
        guessed: the reply with them.
        extract: the plain reply repeats its prompt.
    """

    plain: Outcome
    guessed: Outcome
    extract: bool


def speculation(model: Model, prompts: int, work: Path, progress: Progress) -> dict[str, Any]:
    """Return what guesses bring: how many times the tokens a second, and the share of equal replies.

    `speculation_ratio` is the median over the replies that are extracts, None if there is none, and `speculation_extracts` their
    number; `speculation_ratio_all` is the median over all replies, `speculation_equal_replies` the share of all that are equal.

    Args:
        model: whose base llama.cpp serves.
        prompts: how many.
        work: for the engines' logs.
        progress: is told (stage, done, total).

    Raises:
        EngineError: a prompt was not answered.
    """
    from serving.engines.llamacpp import LlamaCpp

    engine, urls = LlamaCpp(), []
    base = engine.base_path(model, False, print)
    with ExitStack() as stack:
        for on in (False, True):
            ran = alone(engine, model.name, base, work / f"speculation-{on}", CONTEXT_TOKENS, 1, speculation=on)
            urls.append(stack.enter_context(ran).url)
        pairs = asyncio.run(_asked([Target(url, model.name) for url in urls], prompts, progress))
    ratios = [(tpot(plain) / tpot(guessed), extract) for plain, guessed, extract in pairs if tpot(plain) and tpot(guessed)]
    extracts = [ratio for ratio, extract in ratios if extract]
    return {
        "speculation_ratio": median(extracts) if extracts else None, "speculation_extracts": len(extracts),
        "speculation_ratio_all": median(ratio for ratio, _ in ratios) if ratios else None,
        "speculation_equal_replies": sum(pair.plain.text == pair.guessed.text for pair in pairs) / len(pairs),
    }  # fmt: skip


def is_extract(reply: str, prompt: str) -> bool:
    """Tell whether a reply repeats its prompt: most of its runs of four words stand there, the last, maybe cut off, left out."""
    words, there = reply.split(), f" {' '.join(prompt.split())} "
    runs = [f" {' '.join(words[at : at + WORDS_TOGETHER])} " for at in range(len(words) - WORDS_TOGETHER)]
    return bool(runs) and sum(run in there for run in runs) >= EXTRACT_SHARE * len(runs)


async def _asked(targets: list[Target], prompts: int, progress: Progress) -> list[Pair]:
    """Ask both engines the same, prompt by prompt, each first in turns."""
    pairs, pages = [], _pages()
    async with client(targets[0]) as off, client(targets[1]) as on:
        sides = list(zip((off, on), targets, strict=True))
        for done in range(prompts):
            asked = messages(QUESTION, [pages[done % len(pages)]])
            body = {"messages": asked, "max_tokens": REPLY_TOKENS, "temperature": 0}
            turn = -1 if done % 2 else 1
            plain, guessed = [answered(await send(http, target, body)) for http, target in sides[::turn]][::turn]
            pairs.append(Pair(plain, guessed, is_extract(plain.text, asked[-1]["content"])))
            progress("speculation", done + 1, prompts)
    return pairs


def _pages() -> list[Page]:
    """Return the first paragraph of each page of labs/knowledge."""
    files = sorted((ROOT / "labs" / "knowledge").glob("*.md"))
    parts = [
        [part for part in file.read_text(encoding="utf-8").split("\n") if part and not part.startswith("#")] for file in files
    ]
    return [Page(file.stem, part[0]) for file, part in zip(files, parts, strict=True)]
