"""What a request may ask for; each check either passes or says the limit.

Nothing is cut to fit: a value outside its limit is an error. The size of a body is checked in `serving.edge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config import unknown
from serving.problems import BadRequest, UnknownModel
from serving.settings import RequestLimits, ServeConfig

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
        way_on = f"leave it out for {config.default_max_tokens}"
        raise BadRequest(f"max_tokens is {asked}", f"1 to {config.max_tokens}", way_on, param="max_tokens")
    return asked


def check_model(name: str, valid: tuple[str, ...]) -> str:
    """Return the name; `UnknownModel` with the valid ones if it is none of them."""
    if name not in valid:
        known = unknown("served model", name[:80], valid)
        raise UnknownModel(known.came, known.expected, known.next_command, param="model")
    return name


def check_generation(asked: Mapping[str, Any], limits: RequestLimits, prompts: int = 1) -> None:
    """Raise `BadRequest` for a chat or completion that asks for more than one request may, or for what contradicts itself.

    Args:
        asked: the fields that came, of serving.requests.
        limits: of one request.
        prompts: how many the request holds.
    """
    n, stop = asked.get("n", 1), asked.get("stop", [])
    _at_most("n", n * prompts, limits.max_choices, "replies" if prompts == 1 else f"replies, {n} to each of {prompts} prompts")
    stops = [stop] if isinstance(stop, str) else stop
    _at_most("stop", len(stops), limits.max_stop_sequences, "sequences")
    _at_most("stop", max(map(len, stops), default=0), limits.max_stop_chars, "characters in a sequence")
    if "" in stops:
        raise BadRequest("a stop sequence is empty", "text at which the reply ends", param="stop")
    _at_most("logit_bias", len(asked.get("logit_bias", ())), limits.max_logit_biases, "tokens")
    _at_most("top_logprobs", asked.get("top_logprobs", 0), limits.max_top_logprobs, "as its value")
    _at_most("top_k", asked.get("top_k", 0), limits.max_top_k, "as its value")
    for field, other in (("stream_options", "stream"), ("top_logprobs", "logprobs"), ("tool_choice", "tools"),
                         ("parallel_tool_calls", "tools")):  # fmt: skip
        if field in asked and not asked.get(other) and asked[field] not in ("none", False):
            raise BadRequest(f"{field} came without {other}", f"both, or neither of {field} and {other}", param=field)


def check_messages(asked: Mapping[str, Any], limits: RequestLimits) -> None:
    """Raise `BadRequest` for a chat with too many messages, too much text, or too many tools."""
    _at_most("messages", len(asked["messages"]), limits.max_messages, "messages")
    _at_most("messages", sum(map(_chars, asked["messages"])), limits.max_prompt_chars, "characters")
    _at_most("tools", len(asked.get("tools", ())), limits.max_tools, "tools")
    _at_most("tools", sum(len(tool["function"].get("description", "")) for tool in asked.get("tools", ())),
             limits.max_prompt_chars, "characters in descriptions")  # fmt: skip


def check_prompts(prompts: Sequence[str | list[int]], limits: RequestLimits, param: str) -> None:
    """Raise `BadRequest` for prompts that are empty, or together too long."""
    if not all(prompts) or not prompts:
        raise BadRequest(f"{param} is empty", "text", param=param)
    _at_most(param, sum(map(len, prompts)), limits.max_prompt_chars, "characters")


def bounded_length(body: Mapping[str, Any], config: ServeConfig) -> dict[str, Any]:
    """Return a request with the length of its reply set; `BadRequest` for too many tokens."""
    asked = [body[field] for field in LENGTH_FIELDS if body.get(field) is not None]
    for value in asked or [None]:
        length = check_max_tokens(value, config)
    rest = {key: value for key, value in body.items() if key not in LENGTH_FIELDS}
    return rest | {"max_tokens": length}


def _chars(message: Mapping[str, Any]) -> int:
    content = message.get("content", "")
    text = len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
    return text + sum(len(call["function"]["arguments"]) for call in message.get("tool_calls", ()))


def _at_most(field: str, came: int, limit: int, of_what: str) -> None:
    if came > limit:
        raise BadRequest(f"{field} has {came} {of_what}", f"at most {limit}", param=field)
