"""Vector stores behind one protocol: a store holds the chunks of an index, their vectors, and facts about the index.

    qdrant:FOLDER                                      Qdrant in a folder, for one process at a time
    qdrant+http://HOST:6333/COLLECTION                 a Qdrant server; the key in QDRANT_API_KEY
    milvus:FILE.db                                     Milvus Lite
    milvus+http://HOST:19530/COLLECTION                a Milvus server; the token in MILVUS_TOKEN
    postgresql://USER@HOST/DATABASE?table=TABLE        PostgreSQL with pgvector; the password in PGPASSWORD
    weaviate+http://HOST:8080/COLLECTION               Weaviate (gRPC at ?grpc=50051); the key in WEAVIATE_API_KEY
    pinecone:INDEX                                     Pinecone; the key in PINECONE_API_KEY, another host in PINECONE_HOST

+https is there wherever +http is. No URL holds a secret. Used by: llmlab index copy knowledge --to qdrant:folder
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import cast
from urllib.parse import SplitResult, parse_qs, urlsplit

from pipelines.errors import ConfigError
from pipelines.rag.stores.contract import Store

_MODULES = {
    "qdrant": "qdrant", "qdrant+http": "qdrant", "qdrant+https": "qdrant",
    "milvus": "milvus", "milvus+http": "milvus", "milvus+https": "milvus",
    "postgresql": "pgvector", "postgres": "pgvector",
    "weaviate+http": "weaviate", "weaviate+https": "weaviate",
    "pinecone": "pinecone",
}  # fmt: skip
_SECRETS = {
    "qdrant": "QDRANT_API_KEY", "milvus": "MILVUS_TOKEN", "pgvector": "PGPASSWORD",
    "weaviate": "WEAVIATE_API_KEY", "pinecone": "PINECONE_API_KEY",
}  # fmt: skip
_SECRET_WORDS = re.compile(r"pass|key|token|secret", re.IGNORECASE)


def open_store(url: str) -> Store:
    """Open a store; nothing is made before something is put into it.

    Args:
        url: see the module; secrets come from the environment.

    Raises:
        ConfigError: the URL is none of these, holds a secret, or names a collection with characters that none may have.
        StoreMissing: the client library is not installed.
        StoreError: the store does not answer.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises if it is not a number
    except ValueError:
        raise ConfigError("the store's URL cannot be read", "a URL with a port from 1 to 65535") from None
    module = _MODULES.get(parts.scheme)
    if module is None:
        raise ConfigError(f"{parts.scheme or 'no scheme'!r} begins the store's URL", f"one of {', '.join(_MODULES)}")
    _check_no_secret(parts, _SECRETS[module])
    return cast("Store", import_module(f"pipelines.rag.stores.{module}").opened(parts))


def _check_no_secret(parts: SplitResult, variable: str) -> None:
    asked = parse_qs(parts.query, keep_blank_values=True)
    if parts.password is not None or any(_SECRET_WORDS.search(name) for name in asked):
        raise ConfigError("the store's URL holds a secret, which would be written into files and logs",
                          "a URL without one", f"export {variable}=... and leave it out of the URL")  # fmt: skip
