"""`llmlab data`: look at what a training would learn from, before it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.config import ROOT

if TYPE_CHECKING:
    from pipelines.tune.report import Report

SHOWN = 5
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
    from pipelines.tune.export import export

    say(f"wrote {export(name, examples, file)} examples to {file}")
