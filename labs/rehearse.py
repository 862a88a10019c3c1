"""Every open model taken through its life, shrunk: `llmlab rehearse [NAMES]`. The matrix is configs/models/README.md.

Each model is its true architecture with random weights: tuned with LoRA and with QLoRA, proven, merged, read again, asked,
written as GGUF and run by llama.cpp, and served by vLLM where `make setup-vllm` went through. What a model of that size writes
means nothing; that every step works does. Results are kept in labs/measured/rehearsals.json, a model at a time, and the matrix
is written from them, so a run of a few models leaves the others' rows as they were.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pipelines import hardware, runs
from pipelines.catalogue import Model, all_models
from pipelines.config import CONFIGS, ROOT
from pipelines.errors import EngineError, ExportFailed, LabError, TrainingFailed, Unsupported
from pipelines.plan import Plan
from pipelines.runs import Run
from pipelines.tune.training import Step
from pipelines.weights import quiet_loading

KEPT = ROOT / "labs" / "measured" / "rehearsals.json"
MATRIX = CONFIGS / "models" / "README.md"
COLUMNS = ("lora", "qlora", "merged", "generates", "images", "gguf", "vllm")
TITLES = {"lora": "LoRA", "qlora": "QLoRA", "merged": "merged and read again", "generates": "generates", "images": "images",
          "gguf": "GGUF, llama.cpp", "vllm": "vLLM"}  # fmt: skip
OVERRIDES = ("schedule.rows_per_step=2", "schedule.rows_per_prompt=2", "schedule.steps=3")
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp")
NEW_TOKENS = 8
HEAD = """# The catalogue, rehearsed

One file for each model. Each row below is its true architecture, shrunk, with random weights, taken through its whole life.
The matrix is written by `llmlab rehearse`; do not edit it.
"""
ENGINE_SECONDS = 600.0
ENGINE_CONTEXT = 256
HOST = "127.0.0.1"
ERROR = re.compile(r"(\b\w+(?:Error|Exception): .+?|Value error, .+?)(?: \[type=.*)?$", re.MULTILINE)
LOOK_ABOVE = ("core initialization failed", "failed to be inspected", "validation error for")

State = Literal["works", "not supported", "fails", "not tried", "-"]
Say = Callable[[str], object]


@dataclass(frozen=True)
class Cell:
    """What became of a step.

    Attributes:
        state: "not supported" is what a library or an engine says of itself, "fails" is ours; "-" does not apply.
        detail: what was seen, or the error.
    """

    state: State
    detail: str = ""


class Silent:
    """A watcher of a tuning that shows nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def plan(self, plan: Plan) -> None:
        """Show nothing."""

    def begin(self, model: str, recipe: str, *, rehearsal: bool) -> None:
        """Show nothing."""

    def step(self, step: Step) -> None:
        """Show nothing."""

    def proof(self, card: dict[str, Any]) -> None:
        """Show nothing."""

    def outcome(self, planned: dict[str, Any]) -> None:
        """Show nothing."""


def rehearse(models: Sequence[Model], say: Say) -> dict[str, dict[str, Cell]]:
    """Rehearse the models, keep what became of each, and write the matrix anew.

    Args:
        models: open ones.
        say: is told of each model when it is done.
    """
    found = {}
    for model in models:
        began = time.monotonic()
        with _own_runs():
            found[model.name] = life(model)
        keep(model.name, found[model.name])
        MATRIX.write_text(matrix(), encoding="utf-8")
        states = ", ".join(f"{name} {cell.state}" for name, cell in found[model.name].items())
        say(f"{model.name}: {states} ({time.monotonic() - began:.0f} s)")
    return found


def life(model: Model) -> dict[str, Cell]:
    """Take a model through its life and return what became of each step; a step that fails ends only what needs it."""
    cells = dict.fromkeys(COLUMNS, Cell("not tried", "a step before it did not work"))
    tuned: dict[str, Run] = {}
    for recipe in ("lora", "qlora"):
        cells[recipe] = _tried(lambda recipe=recipe: _tuned(model, recipe, tuned))  # type: ignore[misc]
    merged: list[Run] = []
    for run in tuned.values():
        cells["merged"] = _tried(lambda run=run: _merged(run, merged))  # type: ignore[misc]
        if cells["merged"].state != "works":
            break
    if merged:
        folder = merged[0].path / "model"
        cells["generates"] = _tried(lambda: _generates(model, folder))
        cells["images"] = _tried(lambda: _sees(model, folder)) if "image" in model.modality else Cell("-", "it reads text only")
        cells["gguf"] = _tried(lambda: _as_gguf(model, tuned["lora"]))
        cells["vllm"] = _tried(lambda: _by_vllm(model, folder)) if hardware.vllm_is_installed() else Cell(
            "not tried", "vLLM is not installed (make setup-vllm)")  # fmt: skip
    return cells


def keep(name: str, cells: dict[str, Cell]) -> None:
    """Put the results of a model among those that are kept."""
    every = kept()
    versions = {package: version(package) for package in VERSIONS}
    if vllm := hardware.vllm_version():
        versions["vllm"] = vllm
    every[name] = {"cells": {k: asdict(c) for k, c in cells.items()}, "versions": versions, "date": time.strftime("%Y-%m-%d")}
    runs.write_text(KEPT, json.dumps(dict(sorted(every.items())), indent=1) + "\n")


def kept() -> dict[str, Any]:
    """Return the results of every model that was rehearsed, by name."""
    if not KEPT.is_file():
        return {}
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return found


def matrix() -> str:
    """Return the matrix as Markdown, from the kept results; models without any are "not tried"."""
    every, notes = kept(), list[str]()
    titles = " | ".join(TITLES[column] for column in COLUMNS)
    lines = [HEAD, f"| model | architecture | {titles} |", "|---|---|" + "---|" * len(COLUMNS)]
    for model in all_models():
        if model.runnable and model.config:
            cells = every.get(model.name, {"cells": {}})["cells"]
            shown = [_cell(cells.get(column, {"state": "not tried", "detail": "llmlab rehearse was not run"}), notes)
                     for column in COLUMNS]  # fmt: skip
            lines.append(f"| {model.name} | {model.config['model_type']} | " + " | ".join(shown) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    newest = max((kept["date"] for kept in every.values()), default="")
    versions = {name: number for kept in every.values() if kept["date"] == newest for name, number in kept["versions"].items()}
    if newest:
        lines += ["", f"Last run {newest}: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."]
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, str], notes: list[str]) -> str:
    if cell["state"] in ("works", "-"):
        return f"works, {cell['detail']}" if cell["state"] == "works" and cell["detail"] else cell["state"]
    if cell["detail"] not in notes:
        notes.append(cell["detail"])
    return f"{cell['state']} [{notes.index(cell['detail']) + 1}]"


def _tried(step: Callable[[], str]) -> Cell:
    """Return what became of a step; what llama.cpp, vLLM and bitsandbytes said is not ours."""
    try:
        return Cell("works", step())
    except (ExportFailed, EngineError, Unsupported) as error:
        return Cell("not supported", _one_line(error.came))
    except LabError as error:
        return Cell("fails", _one_line(error.came))
    except Exception as error:  # the error of any library belongs into the matrix
        return Cell("fails", _one_line(f"{type(error).__name__}: {error}"))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:240]


def _tuned(model: Model, recipe: str, into: dict[str, Run]) -> str:
    from pipelines.tune.finetune import Job, finetune

    into[recipe] = finetune(Job(model.name, recipe, OVERRIDES, rehearse=True, pull=False, resume=False), Silent())
    return ""


def _merged(run: Run, into: list[Run]) -> str:
    from pipelines.export.job import NONE, export

    into.append(export(run, NONE, lambda *_: None))
    return ""


def _generates(model: Model, folder: Path) -> str:
    import torch
    from transformers import AutoConfig

    from pipelines.architecture import loader
    from pipelines.tune.turns import load_tokenizer, tokens_of

    tokenizer = load_tokenizer(folder, model)
    prompt = torch.tensor([tokens_of(tokenizer, [{"role": "user", "content": "Hello"}], reply_follows=True)])
    with quiet_loading():
        speaker = loader(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval()
    made = speaker.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS,
                            min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    with torch.inference_mode():
        again = speaker(input_ids=made[:, :-1]).logits[0, prompt.shape[1] - 1 :].argmax(-1)
    if not torch.equal(again[1:], made[0, prompt.shape[1] + 1 :]):
        raise TrainingFailed("with its cache the model writes other tokens than without", "the same ones")
    return ""


def _sees(model: Model, folder: Path) -> str:
    from labs.sight import look

    return look(model, folder)


def _as_gguf(model: Model, run: Run) -> str:
    from pipelines.export.job import export

    assert model.serving  # runnable
    export(run, model.serving.quantisation, lambda *_: None)
    return model.serving.quantisation


def _by_vllm(model: Model, folder: Path) -> str:
    import httpx

    from serving.address import check_free
    from serving.engines import named
    from serving.engines.contract import Launch
    from serving.settings import load_serve_config
    from serving.supervisor import Supervisor

    with tempfile.TemporaryDirectory() as work:
        machine = hardware.probe()
        launch = Launch(model=model.name, base=folder, adapters=(), host=HOST, port=check_free(HOST, 0, ""), slots=1,
                        context_tokens=ENGINE_CONTEXT, threads=machine.cpus, gpu=bool(machine.gpus), work=Path(work))  # fmt: skip
        supervisor = Supervisor(named("vllm"), launch, ENGINE_SECONDS, load_serve_config().restart)
        try:
            supervisor.spawn()
            try:
                supervisor.await_health()
            except EngineError as error:
                raise EngineError(_reason(supervisor.log).replace(str(folder), model.name) or error.came) from None
            body = {"model": model.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": NEW_TOKENS}
            reply = httpx.post(f"{launch.url}/v1/chat/completions", json=body, timeout=ENGINE_SECONDS, trust_env=False)
        finally:
            supervisor.stop()
    if reply.status_code != 200:
        raise EngineError(f"vLLM answers {reply.status_code}: {reply.text[:200]}")
    return ""


def _reason(log: Path) -> str:
    """Return the last error that vLLM's log names, but none that says to look above it; pydantic's begins its own line."""
    found = ERROR.findall(log.read_text(encoding="utf-8", errors="replace"))
    return next((f"vLLM: {line}" for line in reversed(found) if not any(words in line for words in LOOK_ABOVE)), "")


@contextmanager
def _own_runs() -> Iterator[None]:
    """Keep the runs of a rehearsal away from the user's; they are gone afterwards."""
    before = os.environ.get("LLMLAB_RUNS")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMLAB_RUNS"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["LLMLAB_RUNS"]
            else:
                os.environ["LLMLAB_RUNS"] = before
