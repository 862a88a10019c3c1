"""What guessing tokens from the prompt brings to answers that repeat it: two llama.cpp engines, with it and without, in turns.

The questions ask for a passage word for word, in the prompt that the reader has in service; it is the only one there, since a
small model that is shown several writes sentences of its own. Guesses should change the speed only, but several tokens at once
are computed in another order than one by one, so the replies are compared too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from labs.bench.serve_contenders import alone
from labs.bench.serve_figures import tpot
from labs.bench.serve_load import Outcome, Target, client, send
from pipelines.catalogue import Model
from pipelines.config import ROOT
from pipelines.rag.answer import messages

REPLY_TOKENS = 64
CONTEXT_TOKENS = 2048
QUESTION = "Repeat the text of passage [1] word for word."

Progress = Callable[[str, int, int], None]


class Page(NamedTuple):
    """A passage of a prompt."""

    title: str
    text: str


def speculation(model: Model, prompts: int, work: Path, progress: Progress) -> dict[str, Any]:
    """Return `speculation_ratio`, how many times the tokens a second come with it, and the share of equal replies.

    Args:
        model: whose base llama.cpp serves.
        prompts: how many.
        work: for the engines' logs.
        progress: is told (stage, done, total).
    """
    from serving.engines.llamacpp import LlamaCpp

    engine, urls = LlamaCpp(), []
    base = engine.base_path(model, False, print)
    with ExitStack() as stack:
        for on in (False, True):
            ran = alone(engine, model.name, base, work / f"speculation-{on}", CONTEXT_TOKENS, 1, speculation=on)
            urls.append(stack.enter_context(ran).url)
        without, with_it = asyncio.run(_asked([Target(url, model.name) for url in urls], prompts, progress))
    return {
        "speculation_ratio": sum(map(tpot, without)) / sum(map(tpot, with_it)),
        "speculation_equal_replies": sum(a.text == b.text for a, b in zip(without, with_it, strict=True)) / len(without),
    }  # fmt: skip


async def _asked(targets: list[Target], prompts: int, progress: Progress) -> tuple[list[Outcome], list[Outcome]]:
    outcomes: tuple[list[Outcome], list[Outcome]] = ([], [])
    pages = _pages()
    async with client(targets[0]) as off, client(targets[1]) as on:
        for done in range(prompts):
            passages = [pages[done % len(pages)]]
            body = {"messages": messages(QUESTION, passages), "max_tokens": REPLY_TOKENS, "temperature": 0}
            for http, target, kept in zip((off, on), targets, outcomes, strict=True):
                kept.append(await send(http, target, body))
            progress("speculation", done + 1, prompts)
    return outcomes


def _pages() -> list[Page]:
    """Return the first paragraph of each page of labs/knowledge."""
    files = sorted((ROOT / "labs" / "knowledge").glob("*.md"))
    parts = [
        [part for part in file.read_text(encoding="utf-8").split("\n") if part and not part.startswith("#")] for file in files
    ]
    return [Page(file.stem, part[0]) for file, part in zip(files, parts, strict=True)]
