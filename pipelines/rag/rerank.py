"""The best candidates in a better order: each is read together with the question, which vectors made beforehand cannot do.

    maxsim          every word of the question looks for its nearest word in the passage, by the states of MiniLM's last layer
                    (late interaction, Khattab & Zaharia 2020, arXiv 2004.12832); rare words count more. Nothing to download.
    cross-encoder   a model that reads question and passage as one text and says how well they fit (Nogueira & Cho 2019,
                    arXiv 1901.04085); an entry of configs/rerankers says which

What a reranker says is blended with the score that the candidates came with. It costs a run of the model over each candidate,
so it is off unless `reranker` of configs/rag names one; what it brings is measured by: llmlab bench rag
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from pipelines.errors import ConfigError
from pipelines.rag.embed import PUBLISHED, load_model
from pipelines.weights import quiet_loading

if TYPE_CHECKING:
    from pipelines.rag.lexical import Lexical

NONE = "none"
KEPT_PASSAGES = 1000  # whose states stay in memory, about 75 kB each
TEXTS_AT_ONCE = 8


class Reranker(Protocol):
    """Says how well passages fit a question; safe to use from several threads."""

    def scores(self, question: str, passages: Sequence[str], words: Lexical) -> np.ndarray:
        """Return a score for each passage, float32 [passages], 0..1, higher for a better fit.

        Args:
            question: what is asked.
            passages: candidates.
            words: of the index, which say how rare a word is.
        """


class MaxSim:
    """Late interaction over the token states of MiniLM.

    Args:
        folder: of MiniLM's weights and tokenizer.
        max_tokens: of a text; of a longer one, as of another embedder, the beginning is read.

    Raises:
        ConfigError: a file is broken.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises no narrower one
            raise ConfigError(f"{folder / 'tokenizer.json'} is not a tokenizer ({error})", PUBLISHED) from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self._model = load_model(folder)
        self._states: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def scores(self, question: str, passages: Sequence[str], words: Lexical) -> np.ndarray:
        """Return the mean, over the question's tokens, of the cosine of the nearest token of each passage; see `Reranker`."""
        asked = self._tokenizer.encode(question)
        (states,) = self._run([asked.ids])
        states, spans = states[1:-1], asked.offsets[1:-1]  # without [CLS] and [SEP]
        rarity = words.rarity([_word_at(question, start, end) for start, end in spans])
        total = float(rarity.sum())
        weights = rarity / total if total > 0 else np.full(len(spans), 1 / max(len(spans), 1), np.float32)
        nearest = [(states @ passage.T.astype(np.float32)).max(axis=1) for passage in self._states_of(passages)]
        return np.array([max(0.0, float(best @ weights)) for best in nearest], dtype=np.float32)

    def _states_of(self, passages: Sequence[str]) -> list[np.ndarray]:
        """Return the states of each passage, float16 [tokens, 384]; those of late are kept."""
        with self._lock:
            known = {text: self._states[text] for text in passages if text in self._states}
        new = [text for text in dict.fromkeys(passages) if text not in known]
        made = self._run([encoding.ids for encoding in self._tokenizer.encode_batch(new)])
        known |= {text: states.astype(np.float16) for text, states in zip(new, made, strict=True)}
        with self._lock:
            for text in passages:
                self._states[text] = known[text]
                self._states.move_to_end(text)
            while len(self._states) > KEPT_PASSAGES:
                self._states.popitem(last=False)
        return [known[text] for text in passages]

    def _run(self, tokens: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the states of the last layer, each of length 1, float32 [tokens, 384] for each text."""
        import torch

        found: list[np.ndarray] = [np.empty(0)] * len(tokens)
        by_length = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        for first in range(0, len(tokens), TEXTS_AT_ONCE):
            rows = by_length[first : first + TEXTS_AT_ONCE]
            width = len(tokens[rows[0]])
            ids = torch.tensor([[*tokens[row], *[0] * (width - len(tokens[row]))] for row in rows])
            mask = torch.tensor([[1] * len(tokens[row]) + [0] * (width - len(tokens[row])) for row in rows])
            with torch.inference_mode():
                states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
                states = torch.nn.functional.normalize(states, dim=-1).numpy()
            for place, row in enumerate(rows):
                found[row] = states[place, : len(tokens[row])]
        return found


class CrossEncoder:
    """A sequence classifier with one output over question and passage, read from a local folder.

    Args:
        folder: of its weights and tokenizer.
        max_tokens: of question and passage together; of what is longer, the beginning is read.

    Raises:
        ConfigError: the files are no such model, or lack some of its weights, which would be random then.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            with quiet_loading():
                model, found = AutoModelForSequenceClassification.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"{folder} holds no cross-encoder ({error})".splitlines()[0], PUBLISHED) from None
        missing = sorted(found["missing_keys"])
        if missing or model.config.num_labels != 1:
            came = f"lacks {len(missing)} of its weights" if missing else f"has {model.config.num_labels} outputs"
            raise ConfigError(f"the model in {folder} {came}", "a cross-encoder with one output")
        self._model = model.eval()
        self._max_tokens, self._lock = max_tokens, threading.Lock()

    def scores(self, question: str, passages: Sequence[str], words: Lexical) -> np.ndarray:  # noqa: ARG002 - of the protocol
        """Return the sigmoid of the model's output for each passage; see `Reranker`."""
        import torch

        found = np.empty(len(passages), dtype=np.float32)
        for first in range(0, len(passages), TEXTS_AT_ONCE):
            texts = list(passages[first : first + TEXTS_AT_ONCE])
            with self._lock:  # truncation and padding are a state of the tokenizer
                batch: Any = self._tokenizer(
                    [question] * len(texts), texts, padding=True, truncation=True, max_length=self._max_tokens,
                    return_tensors="pt",
                )  # fmt: skip
            with torch.inference_mode():
                found[first : first + len(texts)] = torch.sigmoid(self._model(**batch).logits[:, 0]).numpy()
        return found


def load_reranker(name: str) -> Reranker | None:
    """Return a reranker, ready to use; None for "none".

    Raises:
        UnknownName: configs/rerankers has no such entry.
        WeightsMissing: its weights are not on this machine.
        ConfigError: the files are not those of such a model.
    """
    if name == NONE:
        return None
    from pipelines.rag import places, rerankers

    entry = rerankers.find(name)
    folder = places.obtain(entry, pull=False, say=str)
    return (MaxSim if entry.kind == "maxsim" else CrossEncoder)(folder, entry.max_tokens)


def blended(before: np.ndarray, reranked: np.ndarray, weight: float) -> np.ndarray:
    """Return scores 0..1: both kinds as shares of their largest, the reranker's with a weight, the other with the rest.

    Args:
        before: scores that the candidates came with, [candidates], at least 0.
        reranked: of the reranker, [candidates], at least 0.
        weight: 0..1.
    """
    return (1 - weight) * _shares(before) + weight * _shares(reranked)


def _shares(scores: np.ndarray) -> np.ndarray:
    largest = float(scores.max(initial=0.0))
    return cast("np.ndarray", np.maximum(scores, 0) / largest if largest > 0 else np.zeros_like(scores))


def _word_at(text: str, start: int, end: int) -> str:
    """Return the whole word that a token is a piece of."""
    while start > 0 and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    while end < len(text) and text[end].isalnum() and text[end - 1].isalnum():
        end += 1
    return text[start:end]
