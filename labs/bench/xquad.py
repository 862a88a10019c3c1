"""XQuAD English as a reading task: a paragraph and a question in, a short answer out; rows to learn from, and test scores.

The set is read from the folder in `LLMLAB_DATA`, in SQuAD's form. Articles in file order: the first 36 are learnt from, the
last 12 are for testing only. `score` asks a model in memory; questions of one paragraph share the computation of it, and the
replies are those of `generate` with greedy search, question by question (a test compares them).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import ROOT
from pipelines.errors import DataError
from pipelines.evaluate.scores import normalise, token_f1
from pipelines.tune.packing import common_prefix
from pipelines.tune.rows import Message, Row

if TYPE_CHECKING:
    import torch

FILE = "xquad.en.json"
TRAINING_ARTICLES = 36
SAMPLE_SEED = 11
MAX_NEW_TOKENS = 24
QUESTIONS_AT_ONCE = 32


@dataclass(frozen=True)
class Question:
    """A test question; `answers` are the accepted ones."""

    id: str
    paragraph: str
    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> list[Message]:
        """Return the chat that asks it."""
        return [{"role": "user", "content": prompt_text(self.paragraph, self.question)}]


@dataclass(frozen=True)
class Scores:
    """Means over the questions, 0..1, as SQuAD defines them."""

    f1: float
    exact_match: float


def data_folder() -> Path:
    """Return the folder of data sets: `LLMLAB_DATA`, or `../shared/data` beside the repository."""
    return Path(os.environ.get("LLMLAB_DATA") or ROOT.parent / "shared" / "data")


def prompt_text(paragraph: str, question: str) -> str:
    """Return the user's turn; the paragraph comes first, so that its questions begin alike."""
    return f"{paragraph}\n\n{question}"


def train_rows() -> list[Row]:
    """Return the rows to learn from: every question of the first 36 articles with its first answer, no system turn.

    Raises:
        DataError: the file is absent or not in SQuAD's form.
    """
    return [
        Row((*q.prompt, {"role": "assistant", "content": q.answers[0]}), None, f"{FILE}:{q.id}")
        for article in _articles()[:TRAINING_ARTICLES] for paragraph in article for q in paragraph
    ]  # fmt: skip


def paragraphs() -> dict[str, list[Question]]:
    """Return the questions about each paragraph of all articles, by a name for it.

    Raises:
        DataError: the file is absent or not in SQuAD's form.
    """
    every = [paragraph for article in _articles() for paragraph in article]
    return {f"paragraph-{number:04}": paragraph for number, paragraph in enumerate(every)}


def held_out_questions(sample: int | None) -> list[Question]:
    """Return questions of the last 12 articles, all of them or the same `sample` each time.

    A sample takes whole paragraphs, one of each article in turn, since a paragraph's second question costs little.

    Raises:
        DataError: the file is absent or not in SQuAD's form.
    """
    articles = [list(article) for article in _articles()[TRAINING_ARTICLES:]]
    if sample is None:
        return [q for article in articles for paragraph in article for q in paragraph]
    drawn = random.Random(SAMPLE_SEED)
    for article in articles:
        drawn.shuffle(article)
    rounds = max((len(article) for article in articles), default=0)
    questions = [q for i in range(rounds) for article in articles if i < len(article) for q in article[i]]
    return questions[:sample]


def score(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Scores:
    """Ask a model in memory and score its replies; the model's mode and weights are as before afterwards.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        tokenizer: its tokenizer.
        questions: in any order.
    """
    import torch

    was_training = model.training
    model.eval()
    with torch.inference_mode():
        replies = replies_to(model, tokenizer, [q.prompt for q in questions])
    model.train(was_training)
    return scored(questions, replies)


def scored(questions: Sequence[Question], replies: Sequence[str]) -> Scores:
    """Return the scores of some replies, in the order of the questions; of the accepted answers the best one counts."""
    pairs = list(zip(questions, replies, strict=True))
    return Scores(
        f1=_mean([max(token_f1(reply, answer) for answer in q.answers) for q, reply in pairs]),
        exact_match=_mean([float(any(normalise(reply) == normalise(answer) for answer in q.answers)) for q, reply in pairs]),
    )


def replies_to(model: Any, tokenizer: Any, chats: Sequence[Sequence[Message]]) -> list[str]:
    """Return the greedy replies to some chats, in their order; call it in inference mode, with the model in eval mode."""
    prompts = [
        list(tokenizer.apply_chat_template(list(c), add_generation_prompt=True, return_dict=True)["input_ids"]) for c in chats
    ]
    replies: dict[int, list[int]] = {}
    groups = sorted(_families(prompts), key=lambda group: len(prompts[group[0]]))  # neighbours pad each other little
    for part in _parts(groups):
        replies |= _greedy(model, prompts, part, tokenizer.eos_token_id)
    return [tokenizer.decode(replies[i], skip_special_tokens=True).strip() for i in range(len(prompts))]


def _articles() -> list[list[list[Question]]]:
    """Return article -> paragraph -> questions, in file order."""
    path = data_folder() / FILE
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        return [[_questions(paragraph) for paragraph in article["paragraphs"]] for article in articles]
    except FileNotFoundError:
        raise DataError(f"{path} is absent", f"XQuAD English in SQuAD's form, as {FILE} in the folder named by LLMLAB_DATA",
                        "LLMLAB_DATA=folder make bench") from None  # fmt: skip
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path} is not in SQuAD's form ({type(error).__name__}: {error})", "data > paragraphs > context, qas"
        ) from None


def _questions(paragraph: dict[str, Any]) -> list[Question]:
    context = str(paragraph["context"])
    found = []
    for item in paragraph["qas"]:
        answers = tuple(str(a["text"]) for a in item["answers"])
        found.append(Question(str(item["id"]), context, str(item["question"]).strip(), (answers[0], *answers[1:])))
    return found


def _families(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group prompts that have most of their tokens in common, up to `QUESTIONS_AT_ONCE` in a group."""
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        first = prompts[groups[-1][0]] if groups else []
        alike = bool(groups) and len(groups[-1]) < QUESTIONS_AT_ONCE
        if alike and 2 * common_prefix([first, prompts[i]]) >= max(len(first), len(prompts[i])):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _parts(groups: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Yield some groups at a time, at most `QUESTIONS_AT_ONCE` prompts."""
    part: list[list[int]] = []
    for group in groups:
        if part and sum(map(len, part)) + len(group) > QUESTIONS_AT_ONCE:
            yield part
            part = []
        part.append(group)
    if part:
        yield part


def _greedy(model: Any, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], end: int) -> dict[int, list[int]]:
    """Return the reply tokens of each prompt: prefixes once for each group, then all prompts side by side."""
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows = [i for group in groups for i in group]
    shared = [min(common_prefix([prompts[i] for i in group]), min(len(prompts[i]) for i in group) - 1) for group in groups]
    group_of = torch.tensor([g for g, group in enumerate(groups) for _ in group])
    prefixes, seen = _padded([prompts[group[0]][:n] for group, n in zip(groups, shared, strict=True)])
    cache = causal.get_decoder()(input_ids=prefixes, attention_mask=seen, use_cache=True).past_key_values
    cache.batch_select_indices(group_of)
    lengths = torch.tensor([shared[g] for g in group_of])
    tokens, fed = _padded([prompts[i][shared[g] :] for i, g in zip(rows, group_of.tolist(), strict=True)])
    mask = torch.cat([seen[group_of], fed], dim=1)
    replies: dict[int, list[int]] = {i: [] for i in rows}
    for _ in range(MAX_NEW_TOKENS):
        positions = lengths[:, None] + torch.arange(tokens.shape[1])
        hidden = causal.get_decoder()(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                      use_cache=True).last_hidden_state  # fmt: skip
        last = hidden[torch.arange(len(rows)), fed.sum(dim=1) - 1]
        chosen = causal.get_output_embeddings()(last).argmax(dim=-1)
        lengths = lengths + fed.sum(dim=1)
        going = (chosen != end).nonzero().flatten()
        if not len(going):
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
            rows, chosen, lengths, mask = [rows[i] for i in going.tolist()], chosen[going], lengths[going], mask[going]
        for i, token in zip(rows, chosen.tolist(), strict=True):
            replies[i].append(token)
        tokens, fed = chosen[:, None], torch.ones(len(rows), 1, dtype=torch.long)
        mask = torch.cat([mask, fed], dim=1)
    return replies


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, 1 where there is one), both [B, T], padded on the right, where nothing looks."""
    import torch

    length = max(map(len, sequences))
    tokens = torch.tensor([[*s, *[0] * (length - len(s))] for s in sequences])
    return tokens, torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
