from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from serving.engines.llamacpp import SCHEMA_WORDS
from serving.json_schemas import check_schema
from serving.problems import BadRequest, Unsupported
from serving.settings import load_serve_config
from tests.serving.conftest import MODEL

LIMITS = load_serve_config().requests.schemas


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS: list[tuple[dict[str, Any], str]] = [
    (nested(60), "levels"),
    (nested(100_000), "levels"),
    ({"enum": [f"word {number}" for number in range(5000)]}, "alternatives"),
    ({"anyOf": [{"oneOf": [{"const": n} for n in range(40)]} for _ in range(40)]}, "alternatives"),
    ({"properties": {f"p{number}": {"type": "integer"} for number in range(300)}}, "properties"),
    ({"$defs": {f"a{n}": {"$ref": f"#/$defs/a{n - 1}"} for n in range(100)}}, "references"),
    ({"type": "string", "maxLength": 10**9}, "as maxLength"),
    ({"type": "array", "minItems": 5000}, "as minItems"),
    ({"type": "string", "pattern": "^" + "a?" * 300 + "$"}, "characters"),
    ({"type": "string", "pattern": "^((a{1,30}){1,30}){1,30}$"}, "repeats"),
    ({"type": "string", "pattern": "^a{99999999999999999999}$"}, "repeats"),
    ({"description": "x" * 20_000}, "bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "word"), BOMBS)
def test_bombs_are_refused_at_once(schema: dict[str, Any], word: str) -> None:
    began = time.perf_counter()
    with pytest.raises(BadRequest, match=word) as caught:
        check_schema(schema, LIMITS, None, "schema")
    assert time.perf_counter() - began < 1 and str(caught.value.param).startswith("schema")


SILENT: list[tuple[dict[str, Any], str]] = [
    ({"not": {"type": "string"}}, "'not'"),
    ({"type": "integer", "multipleOf": 7}, "'multipleOf'"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "object", "patternProperties": {"^a$": {}}}, "'patternProperties'"),
    ({"if": {}, "then": {}}, "'if'"),
    ({"type": "number", "maximum": 3}, "maximum only for integer"),
    ({"type": "string", "format": "email"}, "format 'email'"),
    ({"type": "string", "pattern": "ab+"}, "whole string"),
    ({"type": "string", "pattern": "^(?=a)b$"}, "whole string"),
]


@pytest.mark.parametrize(("schema", "word"), SILENT)
def test_what_llamacpp_would_leave_out_is_refused(schema: dict[str, Any], word: str) -> None:
    inside = {"type": "object", "properties": {"not": {"anyOf": [schema]}}}
    with pytest.raises(Unsupported, match=word) as caught:
        check_schema(inside, LIMITS, SCHEMA_WORDS, "schema")
    assert str(caught.value.param).startswith("schema.properties.not.anyOf[0]")
    check_schema(schema, LIMITS, None, "schema")


def test_what_pydantic_writes_passes() -> None:
    from pydantic import BaseModel, Field

    class Inner(BaseModel):
        count: int = Field(ge=1, le=5)
        note: str | None = None

    class Outer(BaseModel):
        items: list[Inner]
        kind: str = Field(pattern="^[a-z]+$")

    check_schema(Outer.model_json_schema(), LIMITS, SCHEMA_WORDS, "schema")
    check_schema(
        {"properties": {"if": {}, "not": {}}, "enum": [{"if": 1}], "default": {"not": 1}}, LIMITS, SCHEMA_WORDS, "schema"
    )


@pytest.mark.parametrize(
    ("schema", "obeyed"),
    [
        ({"type": "integer", "minimum": 40, "maximum": 42}, lambda reply: 40 <= int(reply) <= 42),
        ({"type": "string", "pattern": "^x[yz]$"}, lambda reply: reply in ('"xy"', '"xz"')),
        ({"type": "string", "format": "date"}, lambda reply: len(reply) == 12 and reply[5] == "-"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"enum": ["uvw"]}}}, lambda reply: reply == '"uvw"'),
    ],
)
def test_llamacpp_obeys_the_words_that_pass(http: httpx.Client, schema: dict[str, Any], obeyed: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "response_format": form, "max_tokens": 16}
    reply = http.post("/v1/chat/completions", json=body | {"temperature": 0})
    assert reply.status_code == 200 and obeyed(reply.json()["choices"][0]["message"]["content"].strip()), reply.text


def test_a_schema_over_a_bound_never_reaches_the_engine(http: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": nested(30)}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "response_format": form}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert "levels" in error["message"] and error["param"].startswith("response_format.json_schema.schema")
