"""The file of API keys: make one, list them, revoke one. Who asks, and how much he may, is `serving.access`'s.

    llmlab keys create alice --requests-per-minute 60 --tokens-per-day 200000

A key is 256 random bits and shown once; the file holds its SHA-256. A slow hash protects passwords, which can be guessed; nobody
guesses 256 bits, and a slow one would cost each request milliseconds. The file takes the place of the one before in one rename.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pipelines.config import ROOT, Config, unknown
from pipelines.errors import ConfigError
from pipelines.runs import disk_trouble_is_explained

VARIABLE = "LLMLAB_KEYS"
PREFIX = "llmlab-"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
CREATE = "llmlab keys create NAME"

Role = Literal["user", "admin"]


class Key(Config):
    """What is known of a key; not the key itself.

    Attributes:
        sha256: of the key, in hexadecimal digits.
        requests_per_minute: None for any number.
        tokens_per_day: prompt and reply together, from midnight to midnight in UTC; None for any number.
        created: date and time in UTC.
    """

    name: str = Field(pattern=f"^{NAME.pattern}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    role: Role
    requests_per_minute: int | None = Field(ge=1)
    tokens_per_day: int | None = Field(ge=1)
    created: str


class KeyFile(Config):
    """The whole file."""

    keys: tuple[Key, ...]


def key_path(configured: str | None) -> Path | None:
    """Return the file of keys: the one that LLMLAB_KEYS names, else the configured one, below the project; None for none."""
    return ROOT / os.environ.get(VARIABLE, configured) if configured else None


def digest(key: str) -> str:
    """Return what the file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read(path: Path) -> tuple[Key, ...]:
    """Return the keys of a file; none if it does not exist.

    Raises:
        ConfigError: others may write it, or it is not a file of keys.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            if os.fstat(stream.fileno()).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(f"{path.name} can be changed by other users", "mode 0600", f"chmod 600 {path}")
            return KeyFile.model_validate_json(stream.read()).keys
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} cannot be read ({type(error).__name__})", "a file of keys", f"ls -l {path}") from None
    except ValidationError as error:
        where = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)[:3])
        raise ConfigError(f"{path.name} is not a file of keys: {where}", "what llmlab keys create writes", CREATE) from None


def create(path: Path, name: str, role: Role, requests_per_minute: int | None, tokens_per_day: int | None) -> str:
    """Add a key and return it; nobody can tell it again.

    Raises:
        ConfigError: the name cannot be one, or is taken; or the file is broken.
        NotWritable: the folder takes no file.
        DiskFull: there is no room for it.
    """
    before = read(path)
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name[:80]!r} is no name of a key", "1 to 64 of a-z, 0-9 and . _ -, a letter or digit first", CREATE)
    if name in {key.name for key in before}:
        raise ConfigError(f"there is a key named {name} already", "another name", f"llmlab keys revoke {name}")
    made = PREFIX + secrets.token_urlsafe(32)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    key = Key(name=name, sha256=digest(made), role=role, requests_per_minute=requests_per_minute,
              tokens_per_day=tokens_per_day, created=now)  # fmt: skip
    _write(path, (*before, key))
    return made


def revoke(path: Path, name: str) -> None:
    """Remove a key; a server that runs refuses it from its next request on. `UnknownName` if there is none of that name."""
    before = read(path)
    if name not in {key.name for key in before}:
        raise unknown("key", name[:80], [key.name for key in before])
    _write(path, tuple(key for key in before if key.name != name))


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    with disk_trouble_is_explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(KeyFile(keys=keys).model_dump_json(indent=2) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
