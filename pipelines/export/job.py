"""A tuned run as a model of its own: merge -> GGUF -> quantise -> Modelfile. `make export MODEL=... QUANTISATION=q8_0`

The adapter is merged into the base in full precision, also where it was learnt on a 4-bit base. After each step the model is
asked the same prompts as before it, and a step that moves it further than it may fails. The result is a run: the merged
model for transformers and vLLM, the GGUF file for llama.cpp and Ollama, and divergence.json.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import catalogue, hardware, weights
from pipelines.catalogue import Model
from pipelines.errors import ConfigError, ExportFailed
from pipelines.export import convert, quantise
from pipelines.export.divergence import Divergence, compare, golden_prompts, of_llamacpp, of_transformers
from pipelines.export.modelfile import MODELFILE, modelfile
from pipelines.runs import Draft, Run, draft
from pipelines.tune import adapter, rehearsal, template
from pipelines.tune.finetune import KIND as FINETUNE
from pipelines.tune.finetune import MODEL_FOLDER, load_base
from pipelines.tune.turns import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

KIND = "export"
NONE = "none"
DIVERGENCE_FILE = "divergence.json"
STEPS = ("merged", "converted", "quantised")
CONTEXT_TOKENS = 4096
PRE_TOKENIZER_OF_REHEARSALS = "gpt-2"  # byte-level BPE with that model's splitting, as pipelines.tune.rehearsal trains it
# How far a step may move the model, in nats, as the mean over the prompts. Merging and converting are arithmetic, so what they
# may do is rounding; a base that was in 4 bits while the adapter was learnt is another base, and quantising is meant to lose.
ALLOWED = {"merged": 1e-3, "merged from 4 bits": 0.5, "converted": 1e-2, "quantised": 1.0}

Progress = Callable[[str, int, int], None]


def export(run: Run, quantisation: str, progress: Progress) -> Run:
    """Export a finetune run and return the new run.

    Args:
        run: a finished finetune run; of a rehearsal the result is a rehearsal too.
        quantisation: one of `quantise.choices()`, or "none" for the merged model without a GGUF file.
        progress: is told (stage, done, total).

    Raises:
        UnknownName: no such quantisation.
        ConfigError: the run is not of this kind.
        WeightsMissing: the base is not on this machine.
        ExportFailed: a step cannot be done, or moves the model too far.
    """
    if quantisation != NONE:
        quantise.check(quantisation)
    if run.kind != FINETUNE:
        raise ConfigError(f"run {run.id} is {run.kind} of {run.model}", f"a {FINETUNE} run", "llmlab runs")
    entry = catalogue.runnable(run.model)
    config = {"run": run.id, "fingerprint": run.fingerprint, "quantisation": quantisation}
    with draft(KIND, run.model, config, rehearsal=run.rehearsal) as work, _base(entry, run) as base:
        work.forget()
        return _Export(run, entry, base, work, progress).make(quantisation)


class _Export:
    """The steps, in order; each leaves the table of log-probabilities that the next is compared with."""

    def __init__(self, run: Run, entry: Model, base: Path, work: Draft, progress: Progress) -> None:
        self.run, self.entry, self.base, self.work, self.progress = run, entry, base, work, progress
        self.device = hardware.choose_device().choice
        self.method = str(run.json("config.json")["recipe"]["method"])
        self.quantised = bool(run.json("config.json")["quantised"])
        self.folder = work.path / MODEL_FOLDER
        self.tokenizer = load_tokenizer(base, entry)
        self.lock = run.json(template.LOCK_FILE)
        self.prompts = golden_prompts(self.lock, self.tokenizer)
        self.found: dict[str, Divergence] = {}

    def make(self, quantisation: str) -> Run:
        hardware.use_all_cores()
        table = self._merge()
        files = []
        if quantisation != NONE:
            file = self._gguf(table, quantisation)
            files = [file]
            text = modelfile(file.name, self.tokenizer, min(CONTEXT_TOKENS, self._context()))
            (self.work.path / MODELFILE).write_text(text, encoding="utf-8")
        template.check(self.lock, template.render_with(_tokenizer_of(self.folder)), "the exported tokenizer")
        self.work.write_json(template.LOCK_FILE, self.lock)
        self.work.write_json(DIVERGENCE_FILE, {step: asdict(found) for step, found in self.found.items()})
        sizes = {path.name: path.stat().st_size for path in [*self.folder.glob("*.safetensors"), *files]}
        facts = {"quantisation": quantisation, "bytes": sizes}
        return self.work.finish(facts | {f"kl_{step}": d.mean for step, d in self.found.items()}, inputs=(self.run,))

    def _merge(self) -> np.ndarray:
        """Write the merged model, read it again, and compare it with the model as it was trained."""
        self.progress("merging", 0, 3)
        trained = of_transformers(self._trained(), self.prompts)
        self.progress("merging", 1, 3)
        if self.method == "full":
            model = load_base(self.run.path / MODEL_FOLDER, self.device, quantised=False)
        else:
            plain = load_base(self.base, self.device, quantised=False)
            model = adapter.resume(plain, self.run.path / adapter.ADAPTER_FOLDER, quantised=False, checkpointing=False)
            model = model.merge_and_unload(safe_merge=True)
        model.config.name_or_path = ""
        with weights.quiet_loading():
            model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        if (self.base / rehearsal.PIECES_FILE).is_file():
            shutil.copyfile(self.base / rehearsal.PIECES_FILE, self.folder / rehearsal.PIECES_FILE)
        del model
        self.progress("merging", 2, 3)
        table = of_transformers(load_base(self.folder, self.device, quantised=False), self.prompts)
        self._note("merged", trained, table, ALLOWED["merged from 4 bits" if self.quantised else "merged"])
        self.progress("merging", 3, 3)
        return table

    def _trained(self) -> Any:
        """Return the model as the run left it: base, in 4 bits if it was, with the adapter beside it."""
        if self.method == "full":
            return load_base(self.run.path / MODEL_FOLDER, self.device, quantised=False)
        base = load_base(self.base, self.device, quantised=self.quantised)
        return adapter.resume(base, self.run.path / adapter.ADAPTER_FOLDER, quantised=self.quantised, checkpointing=False)

    def _gguf(self, table: np.ndarray, quantisation: str) -> Path:
        """Write the GGUF file in 16 bits and then, if that is wanted, in fewer; return the last."""
        self.progress("converting to GGUF", 0, 2)
        file = self.work.path / f"{self.entry.name}-{quantise.F16}.gguf"
        convert.to_gguf(self.folder, file, PRE_TOKENIZER_OF_REHEARSALS if self.run.rehearsal else "")
        self.progress("converting to GGUF", 1, 2)
        precise = of_llamacpp(file, self.prompts)
        self._note("converted", table, precise, ALLOWED["converted"])
        self.progress("converting to GGUF", 2, 2)
        if quantisation == quantise.F16:
            return file
        smaller = self.work.path / f"{self.entry.name}-{quantisation}.gguf"
        quantise.quantise(file, smaller, quantisation, self.progress)
        self._note("quantised", precise, of_llamacpp(smaller, self.prompts), ALLOWED["quantised"])
        file.unlink()
        return smaller

    def _note(self, step: str, before: np.ndarray, after: np.ndarray, allowed: float) -> None:
        self.found[step] = found = compare(before, after)
        if not found.mean <= allowed:
            raise ExportFailed(f"the {step} model is another model: its next-token probabilities moved by {found.mean:.3g} nats "
                               f"on average over {found.prompts} prompts", f"at most {allowed:g}",
                               f"look at {self.work.path}, or another --quantisation")  # fmt: skip

    def _context(self) -> int:
        return self.entry.context_tokens or CONTEXT_TOKENS


@contextmanager
def _base(entry: Model, run: Run) -> Iterator[Path]:
    """Yield the folder of the base; that of a rehearsal is made again, which gives the same weights."""
    if not run.rehearsal:
        yield weights.obtain(entry, pull=False, say=lambda _: None)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield rehearsal.build(entry, rehearsal.texts(), Path(folder))


def _tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
