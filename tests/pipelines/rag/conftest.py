"""What the retrieval tests share: documents, the real MiniLM, and a small embedder for tests that need no meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import load, named
from pipelines.rag.embed import Embedder, load_embedder
from pipelines.rag.index import RagConfig
from pipelines.rag.load import Document
from pipelines.rag.load import load as load_documents

PAGES = {
    "claude-2.md": "# Claude 2\n\n## Origin and licence\nAnthropic launched Claude 2 in July 2023. The licence is commercial.\n\n"
    "## Context\nClaude 2 accepts 100K tokens of context.\n",
    "falcon.md": "# Falcon 40B\n\n## Origin and licence\nFalcon 40B comes from TII in Abu Dhabi. The licence is Apache 2.0.\n\n"
    "## Size\nFalcon has 40 billion parameters and 60 layers.\n",
    "cache.txt": "A KV cache keeps the keys and values of tokens that were read before.\n\nIt grows with the context.\n",
    "deep/monitor.html": "<html><head><title>Monitoring</title></head><body><h1>Prometheus</h1><p>Prometheus scrapes metrics.</p>"
    "<h2>Dashboards</h2><p>Grafana draws dashboards from them.</p></body></html>",
}


class HashEmbedder:
    """Vectors made of a hash of the text, tokens counted as words; remembers what it embedded."""

    def __init__(self, fingerprint: str = "f" * 64, dimension: int = 64) -> None:
        self.fingerprint, self.dimension, self.max_tokens = fingerprint, dimension, 256
        self.embedded: list[str] = []

    def token_count(self, text: str, *, question: bool = False) -> int:  # noqa: ARG002 - no prefix
        return len(text.split()) + 2

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed(texts)

    def embed(self, texts: Sequence[str], on_progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        self.embedded += texts
        rows = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for number, text in enumerate(texts):
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            rows[number] = np.random.default_rng(seed).normal(size=self.dimension)
            rows[number] /= np.linalg.norm(rows[number])
            if on_progress:
                on_progress(number + 1, len(texts))
        return rows


def write_pages(folder: Path, pages: dict[str, str]) -> Path:
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def read_one(folder: Path, name: str, content: str | bytes) -> Document:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (document,), skipped = load_documents(folder)
    assert not skipped
    return document


def sections(document: Document) -> list[tuple[str, str]]:
    return [(" > ".join(section.path), section.text) for section in document.sections]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Return a folder with four documents."""
    return write_pages(tmp_path / "docs", PAGES)


@pytest.fixture(autouse=True)
def index_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let indexes be written below the test's own folder."""
    monkeypatch.setenv("LLMLAB_INDEX", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def hash_embedder() -> HashEmbedder:
    return HashEmbedder()


@pytest.fixture
def other_embedder() -> HashEmbedder:
    return HashEmbedder(fingerprint="0" * 64)


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    return load_embedder("minilm")


@pytest.fixture(scope="session")
def config() -> RagConfig:
    return load(named("rag", "default"), RagConfig, ["chunk_max_tokens=48"])
