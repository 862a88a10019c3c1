"""What a run keeps of the steps of its training: the rows of metrics.jsonl, a picture of them, and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.runs import write_text

METRICS = "metrics.jsonl"


def draw_loss(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the loss of each step and its running mean as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    window = max(1, len(losses) // 20)
    smooth = [sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, color="0.75", label="step")
    axes.plot(steps, smooth, color="tab:blue", label="running mean")
    axes.set(title=title, xlabel="optimiser step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def keep_rows(path: Path, steps: int) -> None:
    """Drop the rows after the checkpoint, which will be measured again."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    write_text(path, "".join(rows[:steps]))


def facts_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a finished training, for its run; the final loss is the mean of the last five steps."""
    seconds, trained = sum(r["seconds"] for r in rows), sum(r["rows"] for r in rows)
    return {
        "steps": len(rows), "rows": trained, "final_loss": sum(r["loss"] for r in rows[-5:]) / len(rows[-5:]),
        "seconds": round(seconds, 1), "tokens_per_second": round(sum(r["tokens"] for r in rows) / seconds, 1),
        "rows_per_second": round(trained / seconds, 2), "peak_memory_bytes": max(r["peak_memory_bytes"] for r in rows),
    }  # fmt: skip
