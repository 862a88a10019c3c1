"""The key of those who may change what is served: the environment variable LLMLAB_ADMIN_KEY, sent as a bearer token.

Without the variable nothing can be changed, not on loopback either: any web page could send such a request to a local server.
"""

from __future__ import annotations

import hmac
import os

from starlette.types import Scope

from serving.problems import AdminOff, KeyWrong

VARIABLE = "LLMLAB_ADMIN_KEY"


def check_key(scope: Scope) -> None:
    """Let a request pass that carries the key; `AdminOff` if there is no key, `KeyWrong` if it carries another or none."""
    key = os.environ.get(VARIABLE, "")
    if not key:
        raise AdminOff("documents cannot be seen or changed over the API: no admin key is set", f"{VARIABLE} in the environment",
                       f"start the server with {VARIABLE}=$(openssl rand -hex 32)")  # fmt: skip
    sent = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, token = sent.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
        came = "the admin key is not the right one" if sent else "the request carries no admin key"
        raise KeyWrong(came, "the header Authorization: Bearer, with the admin key")
