"""A training while it runs: does it learn, how fast, and does it fit into memory?"""

from __future__ import annotations

from prometheus_client import Gauge

from monitoring import metrics as m
from monitoring.dashboards.plots import Board, Plot, Query, Variable, rate

WHICH = 'model=~"$model", recipe=~"$recipe"'
LEGEND = "{{model}}, {{recipe}}"


def _of(metric: Gauge) -> str:
    return f"{m.series_name(metric)}{{{WHICH}}}"


def _query(metric: Gauge) -> tuple[Query, ...]:
    return (Query(_of(metric), LEGEND),)


LEARNING = (
    Plot(
        "Training loss",
        "none",
        "It falls quickly, then slowly, with noise between steps. A rise that stays means that the learning rate is too high: "
        "Ctrl-C, then --set optimiser.learning_rate with a third of it.",
        (Query(_of(m.TRAINING_LOSS), LEGEND), Query(_of(m.TRAINING_FIRST_LOSS), "first step, {{model}}")),
        width=12,
    ),
    Plot(
        "Gradient norm",
        "none",
        "Before clipping. Always above max_gradient_norm: every step is clipped, so the learning rate counts for less than it "
        "says. Zero: nothing is learnt.",
        _query(m.TRAINING_GRADIENT_NORM),
    ),
    Plot(
        "Learning rate",
        "none",
        "Warm-up, then a cosine to zero. Another shape means that the run was resumed with another recipe.",
        _query(m.TRAINING_LEARNING_RATE),
    ),
)

PACE = (
    Plot(
        "Training tokens per second",
        "suffix: tok/s",
        "A fall at even rows means that the machine is shared or throttled, or has begun to swap: look at the memory below.",
        _query(m.TRAINING_TOKENS_PER_SECOND),
    ),
    Plot(
        "Step duration",
        "s",
        "Longer steps at the same rows: the machine is shared. The alert for a training that stands still counts in these.",
        _query(m.TRAINING_STEP_DURATION),
    ),
    Plot(
        "Rows learnt per second",
        "suffix: rows/s",
        "Falls when rows get longer, although tokens per second stay: then there is nothing to repair.",
        (Query(rate(m.TRAINING_ROWS, by="model, recipe", where=WHICH), LEGEND),),
    ),
    Plot(
        "Training peak memory",
        "bytes",
        "Near the machine's memory: lower schedule.max_tokens or schedule.sequences_at_once before it is killed.",
        _query(m.TRAINING_PEAK_MEMORY),
    ),
)

PROGRESS = (
    Plot(
        "Training progress",
        "percentunit",
        "Steps done of steps planned. If it stands still, look at the training's terminal: the alert says so after ten minutes.",
        (Query(f"{_of(m.TRAINING_STEPS_DONE)} / {_of(m.TRAINING_STEPS_PLANNED)}", LEGEND),),
        kind="value",
        width=8,
    ),
    Plot(
        "Training time left",
        "s",
        "At the mean pace so far. Too long: fewer schedule.steps, or NPROC=2 on a CPU with free cores.",
        _query(m.TRAINING_ETA),
        kind="value",
        width=8,
    ),
    Plot(
        "Since the last step",
        "s",
        "More than twenty steps' time: the training stands still. Look at its terminal and at the machine's memory.",
        (Query(f"time() - {_of(m.TRAINING_LAST_STEP)}", LEGEND),),
        kind="value",
        width=8,
    ),
)

BOARD = Board(
    "training",
    "training",
    "The training that runs now: loss, pace, memory and how long it will take. Empty between two trainings.",
    {"Learning": LEARNING, "Pace": PACE, "Progress": PROGRESS},
    (
        Variable("model", "Model", m.series_name(m.TRAINING_STEPS_PLANNED)),
        Variable("recipe", "Recipe", m.series_name(m.TRAINING_STEPS_PLANNED)),
    ),
)
