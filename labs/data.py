"""`llmlab data`: make rows to learn from, and look at them before a training does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.config import ROOT

if TYPE_CHECKING:
    from pipelines.tune.report import Report

SHOWN = 5
INTERRUPTED = 130
REPORTS = ROOT / "reports"

data_app = typer.Typer(no_args_is_help=True, help="Training data. Example: llmlab data report faq.jsonl")


@data_app.command("report")
def data_report(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and template count.")] = "smollm2-135m",
    evaluation: Annotated[Path | None, typer.Option("--eval", help="A file whose rows must not be in the first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest sequence of the recipe.")] = 1024,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show with their mask.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder of the picture; reports/ if not given.")] = None,
) -> None:
    """Report on a file of rows: copies, leaks, private data, lengths, and what is learnt; the last line is JSON.

    Examples: llmlab data report faq.jsonl; llmlab data report train.parquet --eval test.parquet --max-tokens 512
    """
    from transformers import AutoTokenizer

    from labs.screen import json_line, say, table
    from pipelines import catalogue, weights
    from pipelines.tune import report as looking
    from pipelines.tune.files import read_rows

    read = read_rows(file)
    tokenizer = AutoTokenizer.from_pretrained(weights.hf_directory(catalogue.runnable(model)))
    found = looking.report(read, tokenizer, max_tokens, read_rows(evaluation) if evaluation else ())
    for row in read[:rows]:
        _show_mask(row.origin, looking.mask(row, tokenizer))
    table(f"{file.name}, with the template of {model}", ["what", "rows", "where"], _findings(found))
    figures = _figures(found)
    table("Tokens", ["what", "value"], list(figures["tokens"].items()))
    picture = (out or REPORTS) / f"{file.stem}-lengths.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    looking.draw(found, max_tokens, f"{file.name}: {found.rows} rows", picture)
    say(f"picture: {picture}")
    json_line(figures)


def _show_mask(origin: str, pieces: list[tuple[str, bool]]) -> None:
    """Print a row as the model sees it: what is learnt in green, what is only read dim."""
    from rich.text import Text

    from labs.screen import OUT

    OUT.print(f"{origin}  (green is learnt, dim is only read)", style="bold", markup=False)
    text = Text()
    for piece, learnt in pieces:
        text.append(piece, style="green" if learnt else "dim")
    OUT.print(text)
    OUT.print("")


def _findings(found: Report) -> list[tuple[str, int, str]]:
    rows = [("exact copies", [f"{a} of {b}" for a, b in found.copies]),
            ("near copies", [f"{a} ~ {b} ({similarity:.2f})" for a, b, similarity in found.near_copies]),
            ("overlap with the evaluation file", found.overlap),
            *((f"looks like {kind}", origins) for kind, origins in found.private.items()),
            ("would lose their end", found.too_long), ("nothing is learnt", found.silent),
            ("the reply has no end", found.endless)]  # fmt: skip
    return [(what, len(places), ", ".join(places[:SHOWN]) + (" ..." if len(places) > SHOWN else "")) for what, places in rows]


def _figures(found: Report) -> dict[str, Any]:
    whole = sorted(p + r for p, r in zip(found.prompt_tokens, found.reply_tokens, strict=True)) or [0]
    return {
        "rows": found.rows, "exact_copies": len(found.copies), "near_copies": len(found.near_copies),
        "overlap": len(found.overlap), "private": {kind: len(origins) for kind, origins in found.private.items()},
        "lose_their_end": len(found.too_long), "nothing_learnt": len(found.silent), "no_end_of_turn": len(found.endless),
        "supervised_share": round(found.supervised_share, 4),
        "tokens": {"all": sum(whole), "learnt": sum(found.reply_tokens),
                   "median row": whole[len(whole) // 2], "longest row": whole[-1]},
    }  # fmt: skip


@data_app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="OWNER/NAME, OWNER/NAME/FILE, either with @REVISION.")]) -> None:
    """Fetch a file of rows from a data hub and print where it is. Example: llmlab data fetch openai/gsm8k/main/train.parquet."""
    from labs.screen import OUT, say
    from pipelines.tune.hub import fetch

    file = fetch(name, say)
    OUT.print(str(file), markup=False)
    say(f"next: llmlab data report {file}, or llmlab finetune --data {file} --epochs 3")


@data_app.command("from-docs")
def data_from_docs(
    docs: Annotated[Path, typer.Argument(help="A folder of documents, as for llmlab index sync.")],
    out: Annotated[Path, typer.Option(help="The file of rows, .jsonl; the same command goes on with it.")],
    per_chunk: Annotated[int, typer.Option(min=1, help="Questions to keep of a chunk, at most.")] = 2,
    distractors: Annotated[int, typer.Option(min=0, max=9, help="Passages beside the right one.")] = 2,
    abstain: Annotated[float, typer.Option(min=0, max=1, help="Share of the rows whose right passage is withheld.")] = 0.2,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of the running server.")] = None,
    model: Annotated[str | None, typer.Option(help="A model that it serves; its first one if not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about so many chunks only, a sample of all.")] = None,
    seed: Annotated[int, typer.Option(help="Decides samples, orders, and what is withheld.")] = 0,
    round_trip: Annotated[bool, typer.Option(help="Keep a pair only if the engine finds the answer again.")] = True,
) -> None:
    """Have the running server write questions about documents, as rows to tune a reader with; the last line is JSON.

    Rules find answers in English text, the model only words the questions, and whatever fails a check is dropped. Among
    what SmolLM2-135M words, some rows are still clumsy or wrong: read the file and delete what you do not want, or serve a
    larger model. Ctrl-C keeps what is done.

    Example: llmlab data from-docs ~/notes --out notes.jsonl && llmlab finetune --data notes.jsonl --epochs 3
    """
    import time
    from functools import partial

    from labs.ask import Chat
    from labs.screen import CountScreen, json_line, say, table
    from pipelines.config import load, named
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.index import RagConfig
    from pipelines.tune import from_docs
    from serving.settings import load_serve_config

    began, out, server, rag = time.monotonic(), out.expanduser(), load_serve_config(), load(named("rag", "default"), RagConfig)
    from_docs.check_out(out, docs.expanduser())
    try:
        with Chat(f"http://{server.host}:{port or server.port}", model) as chat, CountScreen() as screen:
            job = from_docs.Job(docs.expanduser(), out, chat.model, rag.chunk_max_tokens, per_chunk, distractors, abstain,
                                round_trip, seed)  # fmt: skip
            embed = partial(load_embedder, rag.embedder, threads=1)
            made = from_docs.make(job, chat, embed, limit, screen.update)
    except KeyboardInterrupt:
        say(f"interrupted; what is done is kept in {out}, and the same command goes on")
        raise typer.Exit(INTERRUPTED) from None
    table(f"{made['kept']} of {made['asked']} pairs kept", ["dropped because", "pairs"], list(made["dropped"].items()))
    say(f"{out}: {made['kept']} rows, {made['abstentions']} of them abstain; read some of them, then\n"
        f"next: llmlab data report {out}, llmlab finetune --data {out} --epochs 3" if made["kept"] else
        "no pair was kept; next: a larger model, or documents with sentences that state facts")  # fmt: skip
    json_line(made | {"seconds": round(time.monotonic() - began, 1)})


@data_app.command("from-questions")
def data_from_questions(
    questions: Annotated[Path, typer.Argument(help='JSON lines {"question": ..., "source": ..., "answer": ...}.')],
    out: Annotated[Path, typer.Option(help="The file of rows, .jsonl.")],
    index: Annotated[str, typer.Option(help="The index that holds the documents.")] = "knowledge",
    abstain: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers that are withheld.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Decides which, and the order of passages.")] = 0,
) -> None:
    """Make rows to tune a reader with from questions that people have answered; the last line is JSON.

    Each answer in the words of its document; no source says that no document answers. The passages are those of the index,
    as many as in service.

    Example: llmlab data from-questions asked.jsonl --index notes --out notes.jsonl && llmlab finetune --data notes.jsonl
    """
    from labs.screen import CountScreen, json_line, say
    from pipelines.config import load, named
    from pipelines.rag.asked import read_questions
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.index import RagConfig
    from pipelines.rag.retrieve import open_retriever
    from pipelines.tune import from_questions

    out, rag = out.expanduser(), load(named("rag", "default"), RagConfig)
    from_questions.check_out(out)
    asked = read_questions(questions.expanduser())
    with CountScreen() as screen:
        retriever = open_retriever(index, load_embedder(rag.embedder), rag)
        made = from_questions.make(asked, retriever, rag.top_k, abstain, seed,
                                   lambda done, total: screen.update("retrieve", done, total))  # fmt: skip
    from_questions.write(made.rows, out)
    withheld = sum(row["withheld"] for row in made.rows)
    for lost in made.lost[:SHOWN]:
        say(f"left out: {lost.text!r}, whose answer stands in no chunk of {lost.source}")
    say(f"{out}: {len(made.rows)} rows, {withheld} of them abstain; {len(made.lost)} questions left out\n"
        f"next: llmlab data report {out}, llmlab finetune --data {out} --epochs 3")  # fmt: skip
    json_line({"questions": len(asked), "rows": len(made.rows), "abstentions": withheld, "lost": len(made.lost)})


@data_app.command("show")
def data_show(name: Annotated[str, typer.Argument()] = "reader", rows: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """Print a few training groups as the model sees them."""
    from labs.screen import OUT
    from pipelines.rag.answer import messages
    from pipelines.tune import data
    from pipelines.tune.groups import training_groups

    config = data.load_reader(name)
    corpus, _ = data.corpora(config)
    for group in training_groups(config, corpus, rows, 4, seed=1):
        OUT.print(messages("...", group[0].passages)[1]["content"].rsplit("\n", 1)[0], markup=False)
        for e in group:
            OUT.print(f"  {e.question}  ->  {e.reply}", markup=False)
        OUT.print("")


@data_app.command("export")
def data_export(file: Annotated[Path, typer.Argument(help="Ends with .jsonl, .csv or .parquet.")], name: str = "reader",
                examples: Annotated[int, typer.Option(min=1)] = 600) -> None:  # fmt: skip
    """Write training examples as chat messages, for other trainers. Example: llmlab data export reader.parquet."""
    from labs.screen import say
    from pipelines.tune.chats import export

    say(f"wrote {export(name, examples, file)} examples to {file}")
