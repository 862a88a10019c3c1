"""The routes that change what is served: only for an admin's key, a `llmlab keys create NAME --role admin` or LLMLAB_ADMIN_KEY.

Without such a key nothing can be changed, not on loopback either: any web page could send such a request to a local server.
"""

from __future__ import annotations

from starlette.types import Scope

from serving.access import ADMIN_VARIABLE, sends_key
from serving.problems import AdminOff, KeyWrong, NotAdmin
from serving.visit import VISIT


def check_key(scope: Scope) -> None:
    """Let a request pass whose key is an admin's.

    Raises:
        AdminOff: the server has no such key.
        KeyWrong: the request carries no valid key.
        NotAdmin: its key is a user's.
    """
    visit = VISIT.get()
    if visit.key and visit.key.role == "admin":
        return
    if visit.key:
        raise NotAdmin(f"the key {visit.key.name} is a user's", "an admin's key", "llmlab keys create NAME --role admin")
    if not visit.access.has_admin:
        raise AdminOff("nothing can be changed over the API: there is no admin key", f"an admin key, or {ADMIN_VARIABLE}",
                       f"llmlab keys create NAME --role admin, or {ADMIN_VARIABLE}=$(openssl rand -hex 32)")  # fmt: skip
    came = "the admin key is not the right one" if sends_key(scope) else "the request carries no admin key"
    raise KeyWrong(came, "the header Authorization: Bearer, with the admin key")
