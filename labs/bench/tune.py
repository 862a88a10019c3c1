"""Trainers compared on one task, in one run: `llmlab bench tune`, `make bench`.

XQuAD reading (labs.bench.xquad), SmolLM2-135M, LoRA of rank 16 on every projection, eight rows a step. Each contender trains
for the same time in a process of its own, one after the other (labs.bench.contenders; LLaMA-Factory in its own environment);
its peak memory is what the operating system counted. Its adapters are asked the test questions afterwards, in one model, by
one function. The last line of stdout is one JSON document; curves and logs are kept in a folder of reports/.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labs.bench import xquad
from labs.bench.contenders import CONTENDERS, STEPS_FILE, Task
from pipelines import catalogue, weights
from pipelines.config import ROOT
from pipelines.errors import ConfigError, TrainingFailed
from pipelines.hardware import OPENMP_ENVIRONMENT

MODEL = "smollm2-135m"
LLAMA_FACTORY = "llama_factory"
LLAMA_FACTORY_PROGRAM = ROOT / ".venv-llamafactory" / "bin" / "llamafactory-cli"
ORDER = ("ours", "trl_tuned", "plain", "trl_default", LLAMA_FACTORY)
FULL_MINUTES, QUICK_MINUTES = 7.0, 0.4
FULL_MARKS = (1.0, 2.0, 4.0)
SHORT_MINUTES = 2.0
FULL_STEP_MARK, QUICK_STEP_MARK = 8, 1
FULL_QUESTIONS, QUICK_QUESTIONS = 64, 8
ROWS_PER_STEP = 8
GAP_ROWS = 8
GRACE_SECONDS = 30

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a contender did; `steps` are the rows of its log, `adapters` the kept ones by number of steps."""

    name: str
    steps: list[dict[str, Any]]
    adapters: dict[int, Path]
    peak_rss_bytes: int

    @property
    def seconds(self) -> float:
        """Return the seconds of training."""
        return float(self.steps[-1]["seconds"])

    def per_second(self, what: str) -> float:
        """Return the sum of a column of the log for each second of training."""
        return sum(float(step[what]) for step in self.steps) / self.seconds


def contenders(chosen: Sequence[str], *, quick: bool) -> list[str]:
    """Return who takes part, in the order of their turns.

    Raises:
        ConfigError: a name that is none of them, or whose environment is not set up.
    """
    for name in chosen:
        if name not in ORDER:
            raise ConfigError(f"{name} is no contender", ", ".join(ORDER), "llmlab bench tune --help")
    wanted = list(chosen) or [n for n in ORDER if n != LLAMA_FACTORY or (not quick and LLAMA_FACTORY_PROGRAM.exists())]
    if LLAMA_FACTORY in wanted and not LLAMA_FACTORY_PROGRAM.exists():
        raise ConfigError("LLaMA-Factory is not set up", str(LLAMA_FACTORY_PROGRAM), "make setup-llamafactory")
    if any(name.startswith("trl") for name in wanted):
        import importlib.util

        if importlib.util.find_spec("trl") is None:
            raise ConfigError("TRL is not installed", "the environment of the benchmark", "make bench")
    return [name for name in ORDER if name in wanted]


def bench_tune(names: Sequence[str], minutes: float, questions: int, *, quick: bool, progress: Progress) -> dict[str, Any]:
    """Train every contender, ask its adapters, and return the document of the run; `folder` in it holds curves and logs.

    Args:
        names: from `contenders`.
        minutes: of training for each.
        questions: how many test questions are asked; the same for all.
        quick: fewer marks, no second, shorter run of ours.
        progress: is told (stage, done, total).

    Raises:
        DataError: the XQuAD file is absent.
        TrainingFailed: a contender ended with an error; its log is named.
    """
    asked = xquad.held_out_questions(questions)
    rows = xquad.train_rows()
    entry = catalogue.runnable(MODEL)
    base = weights.obtain(entry, pull=False, say=lambda _: None)
    folder = ROOT / "reports" / f"bench-tune-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    folder.mkdir(parents=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": list(row.messages)}) + "\n" for row in rows), encoding="utf-8")
    turns = [(name, name, minutes) for name in names]
    if "ours" in names and not quick and minutes > SHORT_MINUTES:
        turns.insert(0, ("ours_short", "ours", SHORT_MINUTES))
    outcomes = []
    for label, name, length in turns:
        (folder / label).mkdir()
        marks = [m for m in FULL_MARKS if m < length and not quick]
        task = Task(str(base), str(file), entry.target_modules, str(folder / label), 60 * length, marks,
                    QUICK_STEP_MARK if quick else FULL_STEP_MARK)  # fmt: skip
        outcomes.append(_llama_factory(task, progress) if name == LLAMA_FACTORY else _run(label, name, task, progress))
    found = _ask(base, asked, outcomes, progress)
    document = _document(outcomes, found) | packed_gap(base, entry.target_modules) | {"folder": str(folder)}
    (folder / "result.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draw(document, folder / "curves.png")
    return document


def packed_gap(base: Path, target_modules: list[str]) -> dict[str, float]:
    """Compare a packed step with transformers' own loss, row by row and without packing.

    Returns:
        `packed_loss_gap` in nats per token, and `packed_gradient_gap` as a share of the largest gradient.
    """
    import torch
    from transformers import AutoTokenizer

    from pipelines.tune import adapter
    from pipelines.tune.finetune import load_base
    from pipelines.tune.packing import encode, families, fit, tree
    from pipelines.tune.recipe import Lora
    from pipelines.tune.sft import Supervised

    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = adapter.attach(load_base(base, "cpu", quantised=False), Lora(rank=16, alpha=32, dropout=0.0), target_modules,
                           quantised=False)  # fmt: skip
    with torch.no_grad():  # a fresh adapter has zeros, behind which half of the gradients vanish
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    rows = [encode(row, tokenizer) for row in xquad.train_rows()[:GAP_ROWS]]
    objective = Supervised(tokenizer.pad_token_id)
    packed = fit([tree([rows[i] for i in group]) for group in families(rows, GAP_ROWS)], 4096)
    terms = objective.count(packed)
    loss = objective.total(model, packed) / terms
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    alone = 0.0
    for row in rows:
        ids = torch.tensor([[*row.tokens, row.labels[-1]]])
        labels = torch.tensor([[-100, *(-100 if label is None else label for label in row.labels)]])
        part = model(input_ids=ids, labels=labels).loss * row.supervised / terms
        part.backward()
        alone += float(part.detach())
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    apart = max(float((p.grad - gradients[name]).abs().max()) for name, p in model.named_parameters() if p.grad is not None)
    return {"packed_loss_gap": abs(float(loss.detach()) - alone), "packed_gradient_gap": apart / largest}


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw F1 over minutes of training, one curve for each contender, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in document["curve"].items():
        points = [(0.0, document["base_f1"])] + [(point["minutes"], point["f1"]) for point in curve]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(title="XQuAD test questions, SmolLM2-135M", xlabel="minutes of training", ylabel="token F1", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def _run(label: str, name: str, task: Task, progress: Progress) -> Outcome:
    out = Path(task.out)
    task.write(out / "task.json")
    assert name in CONTENDERS
    peak = _process([sys.executable, "-m", "labs.bench.contenders", name, str(out / "task.json")], label, task, progress)
    steps = _rows(out / STEPS_FILE)
    adapters = {int(p.name.removeprefix("step-")): p for p in out.glob("step-*")}
    return Outcome(label, steps, adapters, peak)


def _llama_factory(task: Task, progress: Progress) -> Outcome:
    """Train with LLaMA-Factory, its own settings but for what the comparison fixes; stopped when time is up."""
    import yaml

    out = Path(task.out)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"xquad": {"file_name": task.rows, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}}
    (out / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    lora = task.settings.lora
    assert lora
    settings = {
        "model_name_or_path": task.model, "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": lora.rank,
        "lora_alpha": int(lora.alpha), "lora_target": "all", "dataset": "xquad", "dataset_dir": str(out), "template": "smollm2",
        "output_dir": str(out / "output"), "per_device_train_batch_size": ROWS_PER_STEP, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "num_train_epochs": 3.0, "logging_steps": 1, "save_steps": 4,
        "save_only_model": True, "report_to": "none", "use_cpu": True, "bf16": False, "fp16": False,
    }  # fmt: skip
    (out / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    log = out / "output" / "trainer_log.jsonl"
    peak = _process([str(LLAMA_FACTORY_PROGRAM), "train", str(out / "train.yaml")], LLAMA_FACTORY, task, progress, log)
    steps = [
        {
            "step": row["current_steps"],
            "seconds": _seconds(row["elapsed_time"]),
            "loss": row["loss"],
            "rows": ROWS_PER_STEP,
            "tokens": 0,
            "supervised_tokens": 0,
        }
        for row in _rows(log)
        if "loss" in row
    ]  # fmt: skip - it tells no tokens
    adapters = {int(p.name.removeprefix("checkpoint-")): p for p in (out / "output").glob("checkpoint-*")}
    return Outcome(LLAMA_FACTORY, steps, adapters, peak)


def _process(command: list[str], label: str, task: Task, progress: Progress, log: Path | None = None) -> int:
    """Run a contender and return its peak resident memory in bytes; with `log`, end it `seconds` after that file is there."""
    out = Path(task.out)
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DISABLE_VERSION_CHECK": "1", "PYTHONPATH": str(ROOT)}
    environment = os.environ | OPENMP_ENVIRONMENT | own
    began = 0.0
    stopped = False
    written = log or out / STEPS_FILE
    with (out / "output.txt").open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT,
                                   start_new_session=True)  # fmt: skip
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                began = began or (time.monotonic() if written.exists() else 0.0)
                elapsed = time.monotonic() - began if began else 0.0
                progress(label, min(round(elapsed), round(task.seconds)), round(task.seconds))
                if log and elapsed > task.seconds and not stopped:
                    os.killpg(process.pid, signal.SIGTERM)
                    stopped = True
                time.sleep(0.5)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode and not stopped:
        last = (out / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise TrainingFailed(f"{label} ended with status {process.returncode}: {' '.join(last)}", "a finished training",
                             f"less {out / 'output.txt'}")  # fmt: skip
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _ask(base: Path, questions: Sequence[xquad.Question], outcomes: Sequence[Outcome], progress: Progress) -> dict[str, Any]:
    """Return {"": base, "name/steps": adapter} -> scores and, for the last adapter of a contender, losses elsewhere."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    from pipelines import hardware
    from pipelines.tune.finetune import load_base
    from pipelines.tune.proof import Probe

    hardware.use_all_cores()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_base(base, "cpu", quantised=False)
    probe = Probe(tokenizer, [])
    every = [(o, steps) for o in outcomes for steps in sorted(o.adapters)]
    progress("test questions", 0, len(every) + 1)
    found: dict[str, Any] = {"": (xquad.score(model, tokenizer, questions), probe.measure(model).losses)}
    for done, (outcome, steps) in enumerate(every, 1):
        progress("test questions", done, len(every) + 1)
        tuned = PeftModel.from_pretrained(model, outcome.adapters[steps])
        losses = probe.measure(tuned).losses if steps == max(outcome.adapters) else {}
        found[f"{outcome.name}/{steps}"] = (xquad.score(tuned, tokenizer, questions), losses)
        model = tuned.unload()
    progress("test questions", len(every) + 1, len(every) + 1)
    return found


def _document(outcomes: Sequence[Outcome], found: dict[str, Any]) -> dict[str, Any]:
    speed = {o.name: o.per_second("rows") for o in outcomes}
    memory = {o.name: o.peak_rss_bytes for o in outcomes}
    curve = {o.name: [_point(o, steps, found) for steps in sorted(o.adapters)] for o in outcomes}
    common = set.intersection(*(set(o.adapters) for o in outcomes))
    same = max(common) if common else None
    elsewhere = {o.name: found[f"{o.name}/{max(o.adapters)}"][1] for o in outcomes}
    document: dict[str, Any] = {
        "examples_per_second": speed,
        "supervised_tokens_per_second": {o.name: o.per_second("supervised_tokens") for o in outcomes},
        "total_tokens_per_second": {o.name: o.per_second("tokens") for o in outcomes},
        "peak_rss_bytes": memory,
        "test_f1": {name: points[-1]["f1"] for name, points in curve.items()},
        "test_exact_match": {name: points[-1]["exact_match"] for name, points in curve.items()},
        "base_f1": found[""][0].f1, "base_exact_match": found[""][0].exact_match, "curve": curve,
        "equal_steps": {"steps": same, "f1": {o.name: found[f"{o.name}/{same}"][0].f1 for o in outcomes} if same else {}},
        "forgetting": {name: {k: v - found[""][1][k] for k, v in losses.items()} for name, losses in elsewhere.items()},
        "loss": {o.name: [(s["seconds"], s["loss"]) for s in o.steps if s["loss"] == s["loss"]] for o in outcomes},
    }  # fmt: skip
    for other, key in (("trl_default", "ratio_to_trl_default"), ("trl_tuned", "ratio_to_trl_tuned"), ("plain", "ratio_to_plain")):
        if "ours" in speed and other in speed:
            document[key] = speed["ours"] / speed[other]
    if "ours" in memory and "trl_default" in memory:
        document["peak_rss_ratio"] = memory["ours"] / memory["trl_default"]
    return document


def _point(outcome: Outcome, steps: int, found: dict[str, Any]) -> dict[str, Any]:
    at = next((s for s in outcome.steps if s["step"] == steps), outcome.steps[-1])
    scores = found[f"{outcome.name}/{steps}"][0]
    return {"steps": steps, "minutes": round(at["seconds"] / 60, 2), "examples": sum(s["rows"] for s in outcome.steps[:steps]),
            "f1": scores.f1, "exact_match": scores.exact_match}  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not lines:
        raise TrainingFailed(f"{path.parent} has no finished step", "at least one", f"less {path.parent / 'output.txt'}")
    return [json.loads(line) for line in lines]


def _seconds(clock: str) -> float:
    """Return the seconds of "h:mm:ss"."""
    total = 0.0
    for part in clock.split(":"):
        total = 60 * total + float(part)
    return total
