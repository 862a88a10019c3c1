"""BM25 over the passages of an index (Robertson & Zaragoza 2009), through bm25s (Lù 2024, arXiv 2407.03618).

Scores of every word in every passage are computed when the index is built, so a question adds up a few columns. Words are
compared in lower case and by their stems. Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import bm25s
import numpy as np
import Stemmer
from safetensors.numpy import load, save

from pipelines.config import unknown

NO_STEMMER = "none"
_WORD = r"(?u)\w+"  # also of one character: "Claude 2" is not "Claude"
_VOCABULARY = "vocabulary"


class Lexical:
    """BM25 scores of all passages; safe to use from several threads.

    Args:
        scores: of bm25s: a sparse matrix [passages, words] by columns, as `data`, `indices`, `indptr`.
        vocabulary: the words, in the order of the columns.
        stemmer: a Snowball language, or "none".
    """

    def __init__(self, scores: dict[str, np.ndarray], vocabulary: Sequence[str], stemmer: str) -> None:
        self._arrays, self._vocabulary, self._language = scores, list(vocabulary), stemmer
        self._columns = {word: column for column, word in enumerate(vocabulary)}
        self._bm25 = bm25s.BM25()
        self._bm25.scores = {**scores, "num_docs": int(scores["passages"][0])}
        self._bm25.nonoccurrence_array = None  # of other variants of BM25

    @classmethod
    def of(cls, passages: Sequence[str], stemmer: str) -> Lexical:
        """Return the scores of some passages.

        Raises:
            UnknownName: Snowball has no stemmer for the language.
        """
        words = words_of(passages, stemmer)
        vocabulary = sorted({word for passage in words for word in passage})
        columns = {word: column for column, word in enumerate(vocabulary)}
        if not vocabulary:
            nothing = {"data": np.zeros(0, np.float32), "indices": np.zeros(0, np.int32), "indptr": np.zeros(1, np.int32)}
            return cls(nothing | {"passages": np.array([len(passages)])}, vocabulary, stemmer)
        bm25 = bm25s.BM25()
        numbers = [[columns[word] for word in passage] for passage in words]
        bm25.index((numbers, columns | {"": len(columns)}), show_progress=False)
        arrays = {name: np.asarray(bm25.scores[name]) for name in ("data", "indices", "indptr")}
        return cls(arrays | {"passages": np.array([len(passages)])}, vocabulary, stemmer)

    def scores(self, question: str) -> np.ndarray:
        """Return the BM25 score of every passage for a question, float32, shape [passages]; 0 where no word is shared."""
        (words,) = words_of([question], self._language)
        columns = [self._columns[word] for word in words if word in self._columns]
        if not columns:
            return np.zeros(self._bm25.scores["num_docs"], dtype=np.float32)
        return cast("np.ndarray", self._bm25.get_scores_from_ids(columns))

    def rarity(self, words: Sequence[str]) -> np.ndarray:
        """Return how much each word tells about a passage: ln(1 + (n - d + 0.5) / (d + 0.5)) for a word in d of n passages.

        Args:
            words: of a question, as they are written; one that no passage has is the rarest, and what is no word tells nothing.

        Returns:
            float32 [words].
        """
        stems = words_of(words, self._language)
        return np.array([self._rarity_of(found).max(initial=0.0) for found in stems], dtype=np.float32)

    def shares(self, question: str, rows: Sequence[int]) -> np.ndarray:
        """Return how much of a question each passage says: the rarity of the words that it has over that of all, 0..1.

        Args:
            question: whose words are counted once each.
            rows: the passages.

        Returns:
            float32 [rows]; 0 for a question without words.
        """
        (found,) = words_of([question], self._language)
        words = list(dict.fromkeys(found))
        rarity = self._rarity_of(words)
        starts, columns = self._arrays["indptr"], [self._columns.get(word) for word in words]
        spans = [slice(0, 0) if c is None else slice(starts[c], starts[c + 1]) for c in columns]
        holders = np.concatenate([self._arrays["indices"][span] for span in spans]) if spans else np.zeros(0, dtype=np.int32)
        tells = np.repeat(rarity, [span.stop - span.start for span in spans])
        total = float(rarity.sum()) or 1.0
        return np.array([tells[holders == row].sum() for row in rows], dtype=np.float32) / total

    def serialised(self) -> bytes:
        """Return it as the content of a safetensors file."""
        return cast("bytes", save(self._arrays, {_VOCABULARY: json.dumps(self._vocabulary), "stemmer": self._language}))

    def _rarity_of(self, stems: Sequence[str]) -> np.ndarray:
        count, starts = self._bm25.scores["num_docs"], self._arrays["indptr"]
        columns = [self._columns.get(stem) for stem in stems]
        holders = np.array([0 if c is None else starts[c + 1] - starts[c] for c in columns], dtype=np.float32)
        return cast("np.ndarray", np.log1p((count - holders + 0.5) / (holders + 0.5)))


def read(content: bytes) -> Lexical:
    """Return what `Lexical.serialised` wrote."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return Lexical(load(content), json.loads(header[_VOCABULARY]), header["stemmer"])


def words_of(texts: Sequence[str], stemmer: str) -> list[list[str]]:
    """Return the words of each text as they are compared: in lower case, their stems in place of them."""
    return cast("list[list[str]]", bm25s.tokenize(list(texts), token_pattern=_WORD, stopwords=None, stemmer=_stemmer(stemmer),
                                                   return_ids=False, show_progress=False))  # fmt: skip


def _stemmer(language: str) -> Any:
    if language == NO_STEMMER:
        return None
    if language not in Stemmer.algorithms():
        raise unknown("stemmer", language, (NO_STEMMER, *Stemmer.algorithms()))
    return Stemmer.Stemmer(language)
