"""The catalogue of rerankers: one file for each in configs/rerankers; how they score is in pipelines.rag.rerank."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.config import load_entry
from pipelines.rag.places import Entry


class RerankerConfig(Entry):
    """A catalogue entry."""

    catalogue = "rerankers"
    kind: Literal["maxsim", "cross-encoder"] = Field(description="token by token, or both texts read as one")


def find(name: str) -> RerankerConfig:
    """Return the entry called `name`.

    Raises:
        UnknownName: with the valid names and the nearest one.
        ConfigError: the file does not fit the schema.
    """
    return load_entry(RerankerConfig.catalogue, name, RerankerConfig)
