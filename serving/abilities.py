"""Refuses what the engine cannot do: with a 400 that names the field, where an engine would leave it out without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.json_schemas import check_schema
from serving.problems import BadRequest, Unsupported
from serving.service import Service


async def check(asked: Mapping[str, Any], service: Service) -> None:
    """Let a chat or completion pass that the engine can do.

    Raises:
        Unsupported: names the field and says why not.
        BadRequest: a schema is larger than it may be, or a token is none of the model's.
    """
    engine = service.upstream.engine
    for lack in engine.lacks:
        if lack.field in asked and lack.asks(asked[lack.field]):
            raise Unsupported(lack.reason, param=lack.field)
    _check_schemas(asked, service)
    if asked.get("logit_bias"):
        await _check_tokens(asked, service)
    if asked.get("tools") or any(_is_of_tools(message) for message in asked.get("messages", ())):
        await _check_tools(asked, service)


def _check_schemas(asked: Mapping[str, Any], service: Service) -> None:
    words, limits = service.upstream.engine.schema_words, service.config.requests.schemas
    if schema := asked.get("response_format", {}).get("json_schema"):
        check_schema(schema["schema"], limits, words, "response_format.json_schema.schema")
    for number, tool in enumerate(asked.get("tools", ())):
        check_schema(tool["function"].get("parameters", {}), limits, words, f"tools[{number}].function.parameters")


async def _check_tokens(asked: Mapping[str, Any], service: Service) -> None:
    vocabulary = (await service.upstream.abilities()).vocabulary
    largest = max(map(int, asked["logit_bias"]))
    if vocabulary is not None and largest >= vocabulary:
        raise BadRequest(f"logit_bias names the token {largest}", f"token ids below {vocabulary}", param="logit_bias")


async def _check_tools(asked: Mapping[str, Any], service: Service) -> None:
    able = await service.upstream.abilities()
    choice = asked.get("tool_choice", "auto" if "tools" in asked else "none")
    kind = "named" if isinstance(choice, dict) else choice
    if kind not in able.tool_choices:
        field = next((name for name in ("tool_choice", "tools") if name in asked), "messages")
        raise Unsupported(f"{field}: {able.tools_reason}", param=field)
    if asked.get("parallel_tool_calls") and not able.parallel_tools:
        raise Unsupported("the served model calls one tool at a time", "parallel_tool_calls: false", param="parallel_tool_calls")


def _is_of_tools(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or "tool_calls" in message
