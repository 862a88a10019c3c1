"""Who asks, and whether he may: the one place that looks at the Authorization header. Made by `serving.launch`.

Without a file of keys everybody on this machine may ask, and nobody may change anything. With one, each request but those for
`OPEN` pages needs a key. LLMLAB_ADMIN_KEY in the environment is an admin's key beside those of the file. The file is read again
when it changes, so a revoked key is refused at the next request. If it breaks or vanishes while the server runs, nobody gets in.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
from pathlib import Path
from typing import Any

from starlette.types import Scope

from monitoring.metrics import PATHS
from pipelines.errors import ConfigError
from serving.keys import CREATE, Key, digest, read
from serving.problems import AccessBroken, KeyWrong
from serving.rates import Rates

LOG = logging.getLogger("serving")
ADMIN_VARIABLE = "LLMLAB_ADMIN_KEY"
# What says nothing of anybody: probes, the page itself (its requests carry the key), and the documentation of the API.
OPEN = ("/healthz", "/readyz", "/", "/favicon.ico", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
OPEN_FOLDERS = ("/static/", "/static-offline-docs/")
LOCAL = PATHS  # open to this machine, for its Prometheus: the counts tell when people work. Others send a key


class Access:
    """The keys of a server.

    Args:
        path: the file of keys, which need not exist; None for no file.
        host: the address that the server listens on; where other machines reach it, a key is always needed.
        rates: what each key may use.

    Raises:
        ConfigError: other machines reach the address and there is no key at all; or the file is broken.
    """

    def __init__(self, path: Path | None, host: str, rates: Rates) -> None:
        self.path, self.rates = path, rates
        self.closed = not loopback(host)
        self._state: object = None
        self._keys: tuple[Key, ...] = read(path) if path else ()
        if self.closed and not self._known():
            raise ConfigError(f"{host} is reachable from other machines, and there is no API key",
                              "a key, so that not everybody may ask", CREATE)  # fmt: skip

    def identify(self, scope: Scope) -> Key | None:
        """Return the key that a request carries, None for one without where none is needed.

        Raises:
            KeyWrong: it needs a key, and carries none that is valid.
            AccessBroken: the file of keys cannot be read.
        """
        if _is_open(scope):
            return None
        found = _matching(self._known(), _token(scope))
        if found or not self.closed:
            return found
        came = "the API key is not one of this server's" if sends_key(scope) else "the request carries no API key"
        raise KeyWrong(came, "the header Authorization: Bearer, with a key", f"a key is made by {CREATE}")

    @property
    def has_admin(self) -> bool:
        """Return whether anybody may change what is served."""
        return any(key.role == "admin" for key in self._known())

    def _known(self) -> tuple[Key, ...]:
        """Return every valid key: those of the file as it is now, and that of the environment."""
        if self.path:
            self._reload(self.path)
        token = os.environ.get(ADMIN_VARIABLE, "")
        return (*self._keys, _environment_key(token)) if token else self._keys

    def _reload(self, path: Path) -> None:
        state = _state_of(path)
        if state == self._state:
            return
        self._keys, self.closed = (), True  # until it is read, nobody gets in
        try:
            self._keys = read(path)
        except ConfigError as error:
            LOG.error("the file of keys: %s", error)
            raise AccessBroken("the server's file of keys cannot be used; its log says why") from None
        self._state = state


def loopback(host: str) -> bool:
    """Return whether an address is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def sends_key(scope: Scope) -> bool:
    """Return whether a request carries anything in the place of a key."""
    return b"authorization" in _headers(scope)


def _token(scope: Scope) -> str:
    scheme, _, token = _headers(scope).get(b"authorization", b"").partition(b" ")
    return token.strip().decode("utf-8", "surrogateescape") if scheme.lower() == b"bearer" else ""


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    if path in LOCAL:
        host = (scope.get("client") or ("",))[0]
        return loopback(host) and not {b"forwarded", b"x-forwarded-for"} & _headers(scope).keys()
    return path in OPEN or path.startswith(OPEN_FOLDERS)


def _matching(keys: tuple[Key, ...], token: str) -> Key | None:
    """Return the key of a token; takes the same time whichever it is."""
    sent, found = digest(token), None
    for key in keys if token else ():
        found = key if hmac.compare_digest(key.sha256, sent) else found
    return found


def _environment_key(token: str) -> Key:
    return Key(name="environment", sha256=digest(token), role="admin", requests_per_minute=None, tokens_per_day=None, created="")


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


def _state_of(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode
