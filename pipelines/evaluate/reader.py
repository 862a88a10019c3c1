"""Does the tuned model read? Base and adapter on held-out questions, with retrieved passages and without. `make eval`

The questions are about models that training never saw, and the passages are what retrieval finds, not the right ones by
construction. Replies are greedy. The result is a run of its own, with every reply in replies.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import catalogue, hardware, weights
from pipelines.errors import DataError, RehearsalRefused
from pipelines.evaluate.scores import Scores, score
from pipelines.rag.answer import closed_book_messages, messages, parse
from pipelines.runs import Run, draft
from pipelines.tune import adapter, data, template
from pipelines.tune.recipe import Recipe
from pipelines.tune.source import is_file
from pipelines.tune.turns import load_tokenizer, tokens_of

KIND = "evaluate"
MAX_NEW_TOKENS = 32  # the longest right reply has 24
BATCH = 16
VARIANTS = ("base", "tuned", "base, closed book", "tuned, closed book")

OnProgress = Callable[[str, int, int], None]


def evaluate(tuned: Run, limit: int | None, on_progress: OnProgress) -> Run:
    """Evaluate a finetune run against its base and return the evaluation run.

    Args:
        tuned: a finished finetune run.
        limit: ask only so many of the held-out questions; None asks all.
        on_progress: called with (variant, questions done, questions).

    Raises:
        RehearsalRefused: the run is a rehearsal; its weights are random.
        DataError: the run was tuned on a file, which has no questions about held-out models.
        WeightsMissing: the base is not on this machine.
    """
    if tuned.rehearsal:
        raise RehearsalRefused(f"run {tuned.id} is a rehearsal on random weights: its answers mean nothing", "a tuned model",
                               f"make finetune MODEL={tuned.model}")  # fmt: skip
    recipe = Recipe.model_validate(tuned.json("config.json")["recipe"])
    if is_file(recipe.data):
        raise DataError(f"run {tuned.id} was tuned on {recipe.data}", "a run on an instruction set of configs/data",
                        f"llmlab runs show {tuned.id}: its proof card has the loss on held-out rows")  # fmt: skip
    reader = data.load_reader(recipe.data)
    _, corpus = data.corpora(reader)
    examples = data.held_out_examples(reader, corpus, limit)
    config = {"run": tuned.id, "limit": limit, "max_new_tokens": MAX_NEW_TOKENS, "data": data.resolved(reader)}
    with draft(KIND, tuned.model, config) as work:
        (work.path / "replies.jsonl").unlink(missing_ok=True)
        scores = {}
        for variant, texts in _replies(tuned, examples, on_progress):
            passages = 0 if "closed" in variant else reader.passages
            replies = [parse(text, passages) for text in texts]
            scores[variant] = score(examples, replies)
            for example, text in zip(examples, texts, strict=True):
                work.append_jsonl("replies.jsonl", {"variant": variant, "reply": text} | _row(example))
        figures = summary(scores, len(examples))
        work.write_json("scores.json", {name: asdict(s) for name, s in scores.items()})
        draw(scores, f"{tuned.model}: {len(examples)} held-out questions", work.path / "scores.png")
        return work.finish(figures, inputs=(tuned,))


def summary(scores: dict[str, Scores], questions: int) -> dict[str, Any]:
    """Return the figures of an evaluation; closed book is the better of base and tuned."""
    base, tuned = scores["base"], scores["tuned"]
    closed = max(scores["base, closed book"].f1, scores["tuned, closed book"].f1)
    return {"f1_base": round(base.f1, 4), "f1_tuned": round(tuned.f1, 4), "f1_closed_book": round(closed, 4),
            "exact_match_base": round(base.exact_match, 4), "exact_match_tuned": round(tuned.exact_match, 4),
            "abstention_f1": round(tuned.abstention_f1, 4), "citation_accuracy": round(tuned.citation_accuracy, 4),
            "test_questions": questions}  # fmt: skip


def draw(scores: dict[str, Scores], title: str, path: Path) -> None:
    """Draw the scores of every variant as grouped bars, PNG."""
    from matplotlib.figure import Figure

    names = list(Scores.__dataclass_fields__)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(scores)
    for number, (variant, values) in enumerate(scores.items()):
        places = [i + number * width for i in range(len(names))]
        bars = axes.bar(places, [getattr(values, name) for name in names], width, label=variant)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks([i + 1.5 * width for i in range(len(names))], [n.replace("_", " ") for n in names])
    axes.set(title=title, ylim=(0, 1.05))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def generate(model: Any, tokenizer: Any, chats: Sequence[list[dict[str, str]]], on_done: Callable[[int], None]) -> list[str]:
    """Return one greedy reply for each chat; `on_done` is called with the number of replies after each batch."""
    import torch

    encoded = [tokens_of(tokenizer, c, reply_follows=True) for c in chats]
    order = sorted(range(len(chats)), key=lambda i: len(encoded[i]))
    texts, done = [""] * len(chats), 0
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt", padding_side="left").to(
            model.device
        )
        with torch.inference_mode():
            made = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for i, tokens in zip(rows, made[:, batch["input_ids"].shape[1] :], strict=True):
            texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
        done += len(rows)
        on_done(done)
    return texts


@dataclass(frozen=True)
class Loaded:
    """A tuned model beside its base; with an adapter both are one model."""

    tuned: Any
    base: Any
    tokenizer: Any

    @contextmanager
    def as_base(self) -> Iterator[Any]:
        """Yield the model as it was before it was tuned."""
        if self.tuned is self.base:
            with self.tuned.disable_adapter():
                yield self.tuned
        else:
            yield self.base


def load_tuned(run: Run) -> Loaded:
    """Return the model of a finetune run and its base, ready to generate.

    Raises:
        FingerprintMismatch: the base's chat template is not the one of the training.
    """
    from peft import PeftModel

    from pipelines.tune.finetune import MODEL_FOLDER, load_base

    hardware.use_all_cores()
    entry = catalogue.runnable(run.model)
    folder, device = weights.hf_directory(entry), hardware.choose_device().choice
    base = load_base(folder, device, quantised=run.json("config.json")["quantised"]).eval()
    tokenizer = load_tokenizer(folder, entry)
    template.check(run.json(template.LOCK_FILE), template.render_with(tokenizer), "transformers")
    if (run.path / MODEL_FOLDER).is_dir():
        return Loaded(load_base(run.path / MODEL_FOLDER, device, quantised=False).eval(), base, tokenizer)
    tuned = PeftModel.from_pretrained(base, run.path / adapter.ADAPTER_FOLDER).eval()
    return Loaded(tuned, tuned, tokenizer)


def _replies(tuned: Run, examples: Sequence[data.Example], on_progress: OnProgress) -> Iterator[tuple[str, list[str]]]:
    loaded = load_tuned(tuned)
    for variant in VARIANTS:
        closed = "closed" in variant
        chats = [closed_book_messages(e.question) if closed else messages(e.question, e.passages) for e in examples]

        def on_done(done: int, variant: str = variant) -> None:
            on_progress(variant, done, len(examples))

        with loaded.as_base() if variant.startswith("base") else nullcontext(loaded.tuned) as model:
            yield variant, generate(model, loaded.tokenizer, chats, on_done)


def _row(example: data.Example) -> dict[str, Any]:
    return {"question": example.question, "truth": example.truth, "answer": example.answer, "citations": list(example.citations),
            "passages": [f"{p.title}: {p.text}" for p in example.passages]}  # fmt: skip
