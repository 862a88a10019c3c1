"""Texts to vectors, with an embedder of the catalogue (pipelines.rag.embedders); three kinds, one contract.

    transformers   a model as sentence-transformers defines them, by plain transformers, which starts in about half the time
                   (3.7 s against 6.4 s for MiniLM; a test holds their vectors together)
    int8           the same weights in 8 bits (pipelines.rag.int8): faster, above all for one question
    static         a table of vectors for tokens (pipelines.rag.static): much faster, and finds less

A text longer than the embedder reads is an error, never cut. No reranking.
Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.errors import ConfigError, DataError
from pipelines.rag import embedders
from pipelines.rag.embedders import EmbedderConfig
from pipelines.weights import quiet_loading

if TYPE_CHECKING:
    import numpy as np
    import torch

PUBLISHED = "the files as their maker published them"
EmbedProgress = Callable[[int, int], None]
_POOLING = {"mean": "mean over tokens", "cls": "the first token"}
_UNSAID_TOKENS = 256  # the limit of the first indexes, whose fingerprints do not name it


class Embedder(Protocol):
    """What an index needs of an embedder; safe to use from several threads.

    Attributes:
        fingerprint: sha256 over everything that decides a vector; an index fits no embedder but its own.
        dimension: length of a vector.
        max_tokens: the longest text it reads, in its own tokens.
    """

    fingerprint: str
    dimension: int
    max_tokens: int

    def embed(self, texts: Sequence[str], on_progress: EmbedProgress | None = None) -> np.ndarray:
        """Return the float32 vectors of passages, shape [texts, dimension], of length 1.

        Args:
            texts: each at most `max_tokens` long.
            on_progress: called after each batch with the texts done and the texts in all.

        Raises:
            DataError: a text is longer than the embedder reads.
        """

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of questions, as `embed` does of passages; some models want another prefix before them."""

    def token_count(self, text: str, *, question: bool = False) -> int:
        """Return the length of a text in tokens, with the prefix and the special tokens that the embedder adds."""


def load_embedder(name: str, device: str = "cpu", threads: int | None = None) -> Embedder:
    """Return an embedder, ready to use; nothing is fetched.

    Args:
        name: of the catalogue.
        device: a torch device, for the kind `transformers`.
        threads: CPU threads of torch in this whole process; None leaves them alone. A process that embeds only
            questions wants 1: beside a busy engine on 2 cores a question took 16 ms with one thread, 490 ms with two.

    Raises:
        UnknownName: there is no such embedder.
        WeightsMissing: its weights are not on this machine.
        ConfigError: the entry and the files of the model contradict each other, or a file is broken.
    """
    entry = embedders.find(name)
    folder = embedders.folder_of(entry)
    if threads is not None and entry.kind != "static":
        import torch

        torch.set_num_threads(threads)
    match entry.kind:
        case "transformers":
            return Transformer(entry, folder, device)
        case "int8":
            from pipelines.rag.int8 import Int8

            return Int8(entry, folder, threads)
        case "static":
            from pipelines.rag.static import Static

            return Static(entry, folder)


def load_counter(name: str) -> Callable[[str], int]:
    """Return `token_count` of an embedder without its model, which takes seconds to load; errors as of `load_embedder`."""
    entry = embedders.find(name)
    counter = TokenEmbedder(entry, embedders.folder_of(entry), "")
    counter.special_tokens = entry.kind != "static"
    return counter.token_count


class TokenEmbedder:
    """What all kinds have in common: a tokenizer, prefixes, and a limit that refuses instead of cutting.

    Args:
        entry: of the catalogue.
        folder: of its files.
        fingerprint: see `Embedder`.

    Attributes:
        texts_at_once: of more, less stays in the caches of a CPU.
        batches_at_once: that many threads call `run`.
        special_tokens: whether the tokenizer adds its own.
    """

    texts_at_once = 8
    batches_at_once = 1
    special_tokens = True

    def __init__(self, entry: EmbedderConfig, folder: Path, fingerprint: str) -> None:
        from tokenizers import Tokenizer

        self.fingerprint, self.dimension, self.max_tokens = fingerprint, entry.dimension, entry.max_tokens
        self._query_prefix, self._passage_prefix = entry.query_prefix, entry.passage_prefix
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / entry.tokenizer_file))
        except Exception as error:  # the library raises no narrower one
            raise ConfigError(f"{folder / entry.tokenizer_file} is not a tokenizer ({error})", PUBLISHED) from None
        self._tokenizer.no_truncation()  # set once: changing it later is not safe with threads
        self._tokenizer.no_padding()

    def token_count(self, text: str, *, question: bool = False) -> int:
        """Return the length of a text in tokens, prefix and special tokens included."""
        whole = self._prefix(question) + text
        return len(self._tokenizer.encode(whole, add_special_tokens=self.special_tokens).ids)

    def embed(self, texts: Sequence[str], on_progress: EmbedProgress | None = None) -> np.ndarray:
        """Return the vectors of passages, float32 [texts, dimension]; see `Embedder`."""
        return self._vectors(self._tokens(texts, question=False), on_progress)

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of questions, float32 [texts, dimension]; see `Embedder`."""
        return self._vectors(self._tokens(texts, question=True), None)

    def _tokens(self, texts: Sequence[str], question: bool) -> list[list[int]]:
        whole = [self._prefix(question) + text for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch(whole, add_special_tokens=self.special_tokens)]

    def _prefix(self, question: bool) -> str:
        return self._query_prefix if question else self._passage_prefix

    def _vectors(self, tokens: list[list[int]], on_progress: EmbedProgress | None) -> np.ndarray:
        import numpy as np

        longest = max(map(len, tokens), default=0)
        if longest > self.max_tokens:
            raise DataError(f"a text to embed has {longest} tokens", f"at most {self.max_tokens} tokens")
        vectors = np.zeros((len(tokens), self.dimension), dtype=np.float32)
        by_length = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))  # so that little is padding
        batches = [by_length[first : first + self.texts_at_once] for first in range(0, len(tokens), self.texts_at_once)]
        done = 0
        with closing(self._run_all([[tokens[row] for row in rows] for rows in batches])) as found:
            for rows, some in zip(batches, found, strict=True):
                vectors[rows] = some
                done += len(rows)
                if on_progress:
                    on_progress(done, len(tokens))
        return vectors

    def _run_all(self, batches: list[list[list[int]]]) -> Generator[np.ndarray, None, None]:
        """Yield the vectors of each batch, in order; closed early, it waits only for those that have begun."""
        if self.batches_at_once == 1 or len(batches) < 2:
            yield from map(self.run, batches)
            return
        with ThreadPoolExecutor(self.batches_at_once, thread_name_prefix="embed") as pool:
            try:
                yield from pool.map(self.run, batches)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def run(self, tokens: list[list[int]]) -> np.ndarray:
        """Return the vectors of a batch, float32 [texts, dimension].

        Args:
            tokens: token ids of each text, the longest first.
        """
        raise NotImplementedError


class Transformer(TokenEmbedder):
    """A model by transformers, read from a local folder; nothing is looked up on a hub."""

    def __init__(self, entry: EmbedderConfig, folder: Path, device: str = "cpu") -> None:
        super().__init__(entry, folder, fingerprint_of(entry, folder))
        self._model, self._device, self._pooling = load_model(folder).to(device), device, entry.pooling

    def run(self, tokens: list[list[int]]) -> np.ndarray:
        """Return the vectors of a batch; see `TokenEmbedder`."""
        import torch

        ids, mask = (torch.from_numpy(part).to(self._device) for part in padded(tokens))
        with torch.inference_mode():
            vectors: np.ndarray = pooled(self._model, ids, mask, self._pooling).cpu().numpy()
        return vectors


def padded(tokens: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and where there is a token (1, else 0), both int64 [texts, length of the first, which is the longest]."""
    import numpy as np

    missing = [[0] * (len(tokens[0]) - len(text)) for text in tokens]
    ids = np.array([text + rest for text, rest in zip(tokens, missing, strict=True)])
    mask = np.array([[1] * len(text) + rest for text, rest in zip(tokens, missing, strict=True)])
    return ids, mask


def pooled(model: Any, ids: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return the vectors of texts at length 1, [texts, dimension]: the mean of their last states, or the first of them."""
    import torch

    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    found = states[:, 0] if pooling == "cls" else (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(found, dim=1)


def load_model(folder: Path) -> Any:
    """Return the model for inference, in float32.

    Raises:
        ConfigError: the files are not a model, or lack some of its weights, which would be random then.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        with quiet_loading():
            model, found = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32,
                                                     output_loading_info=True)  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} holds no model ({error})".splitlines()[0], PUBLISHED) from None
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))  # of which no vector is made
    if missing:
        raise ConfigError(f"{folder} lacks {len(missing)} weights of its model, {missing[0]} among them", PUBLISHED)
    return model.eval()


def fingerprint_of(entry: EmbedderConfig, folder: Path) -> str:
    """Return the sha256 over all that decides a vector of an embedder, before anything that its kind adds."""
    how = f"{_POOLING[entry.pooling]}, L2-normalised"
    if entry.max_tokens != _UNSAID_TOKENS:
        how += f", at most {entry.max_tokens} tokens"
    if entry.query_prefix or entry.passage_prefix:
        how += f", {entry.query_prefix!r} before questions, {entry.passage_prefix!r} before passages"
    digest = hashlib.sha256(how.encode())
    for name in entry.files:
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
