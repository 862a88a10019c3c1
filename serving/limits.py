"""What a request may ask for; each check either passes or says the limit.

Nothing is cut to fit: a value outside its limit is an error. The size of a body is checked in `serving.edge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config import unknown
from serving.problems import BadRequest
from serving.settings import ServeConfig

LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")


def check_question(question: str, config: ServeConfig) -> None:
    """Raise `BadRequest` unless the question is text of a fair length."""
    if not question.strip():
        raise BadRequest("the question is blank", "a question", "")
    if len(question) > config.max_question_chars:
        raise BadRequest(
            f"the question has {len(question)} characters", f"at most {config.max_question_chars}", "ask a shorter question"
        )
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"the question is not valid Unicode at character {error.start}", "text") from None


def check_k(k: int | None, usual: int, config: ServeConfig) -> int:
    """Return how many passages to retrieve, `usual` for None; `BadRequest` outside 1..max_k."""
    if k is None:
        return min(usual, config.max_k)
    if not 1 <= k <= config.max_k:
        raise BadRequest(f"k is {k}", f"1 to {config.max_k}", f"leave k out for {usual}")
    return k


def check_max_tokens(asked: int | None, config: ServeConfig) -> int:
    """Return the length of the reply; `BadRequest` outside 1..max_tokens."""
    if asked is None:
        return config.default_max_tokens
    if not 1 <= asked <= config.max_tokens:
        raise BadRequest(f"max_tokens is {asked}", f"1 to {config.max_tokens}", f"leave it out for {config.default_max_tokens}")
    return asked


def check_model(name: str, valid: tuple[str, ...]) -> str:
    """Return the name; `UnknownName` with the valid ones if it is none of them."""
    if name not in valid:
        raise unknown("served model", name[:80], valid)
    return name


def bounded_chat(body: Mapping[str, Any], config: ServeConfig, choices: int) -> dict[str, Any]:
    """Return a chat request with its length set; `BadRequest` for too many tokens or more than `choices` replies."""
    asked = [body[field] for field in LENGTH_FIELDS if body.get(field) is not None]
    for value in asked or [None]:
        length = check_max_tokens(value, config)
    if not 1 <= (body.get("n") or 1) <= choices:
        raise BadRequest(f"n is {body['n']}", f"1 to {choices}")
    rest = {key: value for key, value in body.items() if key not in LENGTH_FIELDS}
    return rest | {"max_tokens": length}
