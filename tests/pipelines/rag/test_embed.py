"""The embedder: same vectors as sentence-transformers, no network, nothing cut off."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import ROOT
from pipelines.errors import DataError
from pipelines.rag import embedders
from pipelines.rag.embed import Embedder, TokenEmbedder, Transformer, load_embedder

MINILM = embedders.find("minilm")
TEXTS = ["Which licence?", "", "Ünïcode 模型 🙂", "A longer text about retrieval. " * 30, "one", "KV cache " * 10]


@pytest.fixture(scope="module")
def int8() -> Embedder:
    return load_embedder("minilm-int8")


def test_vectors_equal_those_of_sentence_transformers(minilm: Embedder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports, not ours
        reference = pytest.importorskip("sentence_transformers").SentenceTransformer(
            str(embedders.folder_of(MINILM)), device="cpu", local_files_only=True
        )
        expected = reference.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    vectors = minilm.embed(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), minilm.dimension)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_batches_do_not_change_the_order(minilm: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, progress = minilm.embed(TEXTS), list[tuple[int, int]]()
    monkeypatch.setattr(minilm, "texts_at_once", 4)
    np.testing.assert_allclose(minilm.embed(TEXTS, lambda *step: progress.append(step)), expected, atol=1e-5)
    assert progress == [(4, 6), (6, 6)]
    assert minilm.embed([]).shape == (0, minilm.dimension)


def test_a_text_that_would_be_cut_is_an_error(minilm: Embedder) -> None:
    assert minilm.token_count("word " * 254) == minilm.max_tokens == 256
    minilm.embed(["word " * 254])
    with pytest.raises(DataError, match="257 tokens"):
        minilm.embed(["short", "word " * 255])


def test_loading_needs_no_network(minilm: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_embedder("minilm").fingerprint == minilm.fingerprint


def test_threads_are_set_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    load_embedder("minilm")
    assert not asked
    load_embedder("minilm", threads=1)
    assert asked == [1]


def test_indexes_of_before_fit_their_embedders(minilm: Embedder, int8: Embedder) -> None:
    assert minilm.fingerprint == "1f7a0e553aa8b27b0b0e1a1e1858e7fb8885689ce277ffab33fc50a8d86f8c56"
    assert int8.fingerprint == "aec065e00dba9f0d9a2e0435ee8d6cef53bed77fb3b82d004bdf15f14cafe5c0"


def test_the_fingerprint_covers_the_content_of_the_files(minilm: Embedder, tmp_path: Path) -> None:
    for path in embedders.folder_of(MINILM).glob("*.*"):
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    assert Transformer(MINILM, tmp_path).fingerprint == minilm.fingerprint
    tokenizer = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(tokenizer + "\n", encoding="utf-8")
    assert Transformer(MINILM, tmp_path).fingerprint != minilm.fingerprint


def test_eight_bits_say_nearly_the_same(minilm: Embedder, int8: Embedder) -> None:
    texts = ["Which licence does Falcon have?", "A KV cache keeps keys and values of tokens.", "Paris lies on the Seine.", *TEXTS]
    wide, narrow = minilm.embed(texts), int8.embed(texts)
    assert narrow.dtype == np.float32 and narrow.shape == wide.shape
    np.testing.assert_allclose(np.linalg.norm(narrow, axis=1), 1, atol=1e-5)
    assert (wide * narrow).sum(1).min() > 0.97
    assert int8.fingerprint != minilm.fingerprint and int8.max_tokens == minilm.max_tokens


def test_eight_bits_hold_from_threads_and_refuse_what_is_too_long(int8: Embedder) -> None:
    expected = [int8.embed([text])[0] for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: int8.embed([text])[0], TEXTS * 5))
    for number, vector in enumerate(found):
        np.testing.assert_allclose(vector, expected[number % len(TEXTS)], atol=1e-5)
    with pytest.raises(DataError, match="257 tokens"):
        int8.embed(["word " * 255])


@pytest.mark.slow
def test_a_changed_file_of_eight_bits_is_made_again(int8: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLAB_MODELS", str(tmp_path))
    made = load_embedder("minilm-int8")
    (path,) = tmp_path.glob("minilm-int8-*/model.onnx")
    content = path.read_bytes()
    np.testing.assert_allclose(made.embed(TEXTS), int8.embed(TEXTS), atol=1e-6)
    path.write_bytes(content[:-100] + bytes(100))
    assert load_embedder("minilm-int8").fingerprint == int8.fingerprint
    assert path.read_bytes() == content and not list(tmp_path.glob("*/.making-*"))


def test_importing_the_modules_loads_nothing_heavy() -> None:
    code = (
        "import sys, pipelines.rag.retrieve\n"
        "heavy = {'torch', 'transformers', 'faiss', 'langchain_core', 'pypdf', 'bs4', 'tokenizers', 'numpy', 'onnxruntime'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'{heavy} were imported' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_batches_at_once_give_the_same_vectors_and_stop_early(int8: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Passage {n} says {'more ' * (n % 40)}." for n in range(80)]
    assert isinstance(int8, TokenEmbedder)
    alone, together = copy(int8), copy(int8)
    alone.batches_at_once, together.batches_at_once = 1, 4
    told: list[tuple[int, int]] = []
    np.testing.assert_array_equal(together.embed(texts, lambda *now: told.append(now)), alone.embed(texts))
    assert told == [(done, 80) for done in range(8, 81, 8)]

    begun: list[int] = []

    def slowly(tokens: list[list[int]]) -> np.ndarray:
        begun.append(len(tokens))
        time.sleep(0.01)
        return np.zeros((len(tokens), 384), dtype=np.float32)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(together, "run", slowly)
    with pytest.raises(KeyboardInterrupt):
        together.embed(texts * 50, interrupt)
    assert 1 <= len(begun) < 50
