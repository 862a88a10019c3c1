"""Texts to vectors by a table: the mean of the vectors of a text's tokens, at length 1. No layers run, so it is very fast.

The order of words counts for nothing. Such tables are made of larger models, as WordLlama and Model2Vec do; a file holds one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError
from pipelines.rag.embed import PUBLISHED, TokenEmbedder, fingerprint_of
from pipelines.rag.embedders import EmbedderConfig

if TYPE_CHECKING:
    import numpy as np


class Static(TokenEmbedder):
    """A table of token vectors. A text without tokens has the vector 0.

    Raises:
        ConfigError: the file does not hold one table of the entry's dimension, with a row for each token.
    """

    texts_at_once = 256
    special_tokens = False

    def __init__(self, entry: EmbedderConfig, folder: Path) -> None:
        super().__init__(entry, folder, hashlib.sha256(f"{fingerprint_of(entry, folder)} table".encode()).hexdigest())
        self._table = _table(entry, folder / entry.weights_file, self._tokenizer.get_vocab_size())

    def run(self, tokens: list[list[int]]) -> np.ndarray:
        """Return the vectors of a batch; see `TokenEmbedder`."""
        import numpy as np

        means = np.zeros((len(tokens), self.dimension), dtype=np.float32)
        for row, ids in enumerate(tokens):
            if ids:
                means[row] = self._table[ids].mean(0)
        lengths: np.ndarray = np.linalg.norm(means, axis=1, keepdims=True)
        return means / np.where(lengths > 0, lengths, 1)


def _table(entry: EmbedderConfig, path: Path, tokens: int) -> np.ndarray:
    """Return the table, float32 [tokens or more, dimension]."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        held = list(load_file(path).values())
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a file of weights ({error})", PUBLISHED) from None
    if len(held) != 1 or held[0].ndim != 2 or held[0].shape[0] < tokens or held[0].shape[1] != entry.dimension:
        shapes = ", ".join(str(list(one.shape)) for one in held) or "nothing"
        raise ConfigError(f"the weights of the embedder {entry.name} hold {shapes}",
                          f"one table of {tokens} tokens and {entry.dimension} dimensions",
                          f"edit configs/embedders/{entry.name}.yaml")  # fmt: skip
    table: np.ndarray = held[0].astype(np.float32)
    return table
