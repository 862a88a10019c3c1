"""Each field of OpenAI's API through the real gateway and engine: it has its effect, or it is a 400 that names it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from serving.launch import Running
from serving.requests import HINTS, NOT_SERVED, ChatRequest, CompletionRequest
from tests.serving.conftest import MODEL

CHAT = [{"role": "user", "content": "Write the numbers from one to ten."}]
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT, "max_tokens": 5, "temperature": 0} | fields)


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "One, two,", "max_tokens": 4, "temperature": 0} | fields
    return http.post("/v1/completions", json=body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def refused(response: httpx.Response, param: str | None) -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    return str(error["message"])


def test_every_field_of_openais_client_is_known() -> None:
    """What the client can send, the gateway either takes or refuses with a reason, never as unknown."""
    from openai.types import completion_create_params as texts
    from openai.types.chat import completion_create_params as chats

    assert set(chats.CompletionCreateParamsBase.__annotations__) <= set(ChatRequest.model_fields)
    assert set(texts.CompletionCreateParamsBase.__annotations__) <= set(CompletionRequest.model_fields)


def test_what_narrows_the_choice_to_the_best_token_gives_the_greedy_text(http: httpx.Client) -> None:
    greedy = text(chat(http))
    for field, value in {"top_k": 1, "top_p": 1e-6, "min_p": 1.0}.items():
        assert text(chat(http, temperature=2, seed=1, **{field: value})) == greedy, field
    texts = {seed: text(chat(http, temperature=2, seed=seed)) for seed in (1, 2)}
    assert len({*texts.values(), greedy}) == 3 and text(chat(http, temperature=2, seed=1)) == texts[1]


def test_stop_bias_and_penalties_change_the_text(http: httpx.Client) -> None:
    best = chat(http, logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"][0]
    assert best["top_logprobs"] == [] and best["logprob"] <= 0
    assert text(chat(http, logit_bias={str(best["id"]): -100})) != text(chat(http))
    whole = text(chat(http))
    last = " " + whole.split()[-1]
    stopped = chat(http, stop=[last, "zzz"])
    assert stopped.json()["choices"][0]["finish_reason"] == "stop" and text(stopped) == whole[: whole.index(last)]
    same = text(chat(http, logit_bias={str(best["id"]): 20}))
    assert len(set(same.split(best["token"]))) == 1, "the bias makes it one token again and again"
    weak = [{"logit_bias": {str(best["id"]): bias}, "max_tokens": 12} for bias in range(0, 20, 2)]  # one of them barely repeats
    for penalty in ("frequency_penalty", "presence_penalty"):
        assert any(text(chat(http, **asked, **{penalty: 2})) != text(chat(http, **asked)) for asked in weak), penalty


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_with_as_many_alternatives_as_asked(http: httpx.Client, stream: bool) -> None:
    response = chat(http, logprobs=True, top_logprobs=3, max_tokens=2, stream=stream)
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")] if stream else [response.text]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    tokens = [token for choice in choices for token in (choice.get("logprobs") or {}).get("content", [])]
    assert [len(token["top_logprobs"]) for token in tokens] == [3, 3]


def test_logprobs_of_texts_have_the_older_form(http: httpx.Client) -> None:
    found = complete(http, logprobs=2).json()["choices"][0]
    logprobs = found["logprobs"]
    assert "".join(logprobs["tokens"]) == found["text"] and len(logprobs["token_logprobs"]) == 4
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    assert all(token in best for token, best in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    assert complete(http, logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 4


@pytest.mark.parametrize(
    "form", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}, {"type": "text"}]
)
def test_the_reply_has_the_form_that_was_asked_for(http: httpx.Client, form: dict[str, Any]) -> None:
    ask = [{"role": "user", "content": 'Reply with {"a": 1} and nothing else.'}]
    reply = text(chat(http, messages=ask, response_format=form, max_tokens=5 if form["type"] == "text" else 32))
    if form["type"] == "json_schema":
        assert json.loads(reply) == {"a": 1}
    elif form["type"] == "json_object":
        assert reply.lstrip().startswith("{")


def test_ignore_eos_and_both_names_of_the_length(http: httpx.Client) -> None:
    hi = [{"role": "user", "content": "Say hi."}]
    assert chat(http, messages=hi, max_tokens=24, ignore_eos=True).json()["usage"]["completion_tokens"] == 24
    del_length = {"model": MODEL, "messages": CHAT, "max_completion_tokens": 3, "temperature": 0}
    assert http.post("/v1/chat/completions", json=del_length).json()["usage"]["completion_tokens"] == 3


def test_an_assistants_last_message_is_answered_not_gone_on_with(lab: Running, http: httpx.Client) -> None:
    turns = [*CHAT, {"role": "assistant", "content": "One two", "refusal": None, "audio": None, "annotations": []}]
    prompt = http.post(f"{lab.engine_url}/apply-template", json={"messages": turns}).json()["prompt"]
    assert prompt.endswith("One two<|im_end|>\n<|im_start|>assistant\n")
    assert text(chat(http, messages=turns))


def test_messages_in_parts_and_hints_are_taken(http: httpx.Client) -> None:
    hints = {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "safety_identifier": "s",
             "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {}}  # fmt: skip
    assert set(hints) == HINTS
    parts = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert text(chat(http, messages=parts, modalities=["text"], n=None, **hints))


def test_several_prompts_and_replies_count_every_token(http: httpx.Client) -> None:
    one, two = (complete(http, prompt=prompt).json() for prompt in ("One, two,", "A, B, C,"))
    both = complete(http, prompt=["One, two,", "A, B, C,"], n=2).json()
    texts = [one["choices"][0]["text"]] * 2 + [two["choices"][0]["text"]] * 2
    assert [choice["text"] for choice in both["choices"]] == texts and [c["index"] for c in both["choices"]] == [0, 1, 2, 3]
    prompt = one["usage"]["prompt_tokens"] + two["usage"]["prompt_tokens"]
    assert both["usage"] == {"prompt_tokens": prompt, "completion_tokens": 16, "total_tokens": prompt + 16}
    asked = {"prompt": ["One, two,", "A, B, C,"], "stream": True, "stream_options": {"include_usage": True}}
    chunks = [json.loads(line[6:]) for line in complete(http, **asked).text.splitlines() if line.startswith("data: {")]
    for index in (0, 1):
        assert "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index) == texts[2 * index]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_seeded_replies_differ_and_come_again(http: httpx.Client) -> None:
    first, again = ([c["message"]["content"] for c in chat(http, n=2, seed=5, temperature=2).json()["choices"]] for _ in range(2))
    assert first == again and first[0] != first[1]


def test_token_ids_are_a_prompt_too(http: httpx.Client) -> None:
    assert text(complete(http, prompt=[504, 2705])) and len(complete(http, prompt=[[504], [2705]]).json()["choices"]) == 2
    refused(complete(http, prompt=[10**8]), None)


TOO_MUCH: list[tuple[dict[str, Any], str]] = [
    ({"n": 5}, "n"),
    ({"n": 0}, "n"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"messages": CHAT * 300}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 140_000}]}, "messages"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": "x" * 200}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": 10**6}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"logit_bias": {str(token): 1 for token in range(400)}}, "logit_bias"),
    ({"logit_bias": {"yes": 1}}, "logit_bias.yes"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**40}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}]},
     "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"store": True}, "store"),
    ({"service_tier": "priority"}, "service_tier"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), TOO_MUCH, ids=[f"{number}-{param}" for number, (_, param) in enumerate(TOO_MUCH)])
def test_what_is_over_a_bound_is_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    refused(chat(http, **fields), param)


@pytest.mark.parametrize("field", sorted(NOT_SERVED))
def test_what_nothing_here_does_is_refused_with_its_reason(http: httpx.Client, field: str) -> None:
    ask = complete if field in ("suffix", "best_of") else chat
    assert NOT_SERVED[field] in refused(ask(http, **{field: {"any": 1}}), field)
    assert ask(http, max_tokens=1, **{field: None}).status_code == 200, "a client's own empty field"


def test_what_the_engine_cannot_do_is_refused(http: httpx.Client) -> None:
    assert "does not repeat the prompt" in refused(complete(http, echo=True), "echo")
    assert "shows no tools" in refused(chat(http, tools=[TOOL]), "tools")
    for choice in ("required", "none"):
        refused(chat(http, tools=[TOOL], tool_choice=choice), "tool_choice")
    named = {"type": "function", "function": {"name": "get"}}
    assert "by name" in refused(chat(http, tools=[TOOL], tool_choice=named), "tool_choice")
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    refused(chat(http, messages=[*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}]), "messages")
    refused(complete(http, prompt=["a"] * 5), "n")
    refused(complete(http, prompt=""), "prompt")
    refused(complete(http, prompt=[]), "prompt")
    refused(complete(http, prompt=[1, "a"]), "prompt")


OWN_FIELDS: list[str] = [
    "lora", "id_slot", "n_predict", "cache_prompt", "grammar", "json_schema", "samplers", "n_probs", "n_keep", "t_max_predict_ms",
    "chat_template", "chat_template_kwargs", "add_generation_prompt", "slot_id", "speculative.n_max", "min_tokens", "priority",
    "guided_regex", "structured_outputs", "prompt_logprobs", "truncate_prompt_tokens", "kv_transfer_params", "reasoning_format",
    "__verbose", "timings_per_token", "post_sampling_probs", "prompt", "dry_multiplier", "mirostat",
]  # fmt: skip


@pytest.mark.parametrize("field", OWN_FIELDS)
def test_no_field_of_an_engine_gets_through(http: httpx.Client, field: str) -> None:
    for value in (1, None):
        response = chat(http, **{field: value})
        assert field.partition(".")[0] in refused(response, field if field.isidentifier() else None)
        assert response.json()["error"]["code"] == "unknown_parameter"
