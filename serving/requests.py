"""The requests of OpenAI's API that the gateway reads, field by field: what is not here is refused by its name.

An engine has many more fields (slots, adapters, lengths, grammars of its own); none of them gets through. Beyond OpenAI's
there are three that both engines know: `top_k`, `min_p` and `ignore_eos`. How much of each a request may ask for is in
`serving.limits`, what an engine cannot do in its own module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

DEEPEST = 64
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
TOKEN_ID = r"^[0-9]{1,9}$"
NOT_SERVED = {
    "audio": "no served model speaks",
    "prediction": "no engine here takes a predicted output",
    "web_search_options": "nothing here searches the web",
    "moderation": "nothing here moderates",
    "reasoning_effort": "no served model reasons before it answers",
    "verbosity": "no served model was trained to obey it; max_tokens bounds the reply",
    "functions": "they were replaced by tools",
    "function_call": "it was replaced by tool_choice",
    "suffix": "no engine here fills in before a suffix",
    "best_of": "no engine here ranks its own replies; n returns all of them",
}
HINTS = {  # for OpenAI's own caches, bills and records: valid here, and without a meaning
    "user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options",
}  # fmt: skip


class Asked(BaseModel):
    """A part of a request: no field but its own, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Asked):
    """A whole request."""

    @model_validator(mode="before")
    @classmethod
    def _is_flat(cls, body: Any) -> Any:
        """Refuse what is nested so deeply that later readers would run out of stack; this one does not."""
        level = [body]
        for _ in range(DEEPEST):
            level = [each for value in level for each in _inside(value)]
        if level:
            raise ValueError(f"the request is nested more than {DEEPEST} levels deep")
        return body


class TextPart(Asked):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class Call(Asked):
    """Which function a model called, and with what, as JSON in a string."""

    name: str = Field(pattern=NAME)
    arguments: str


class ToolCall(Asked):
    """A call of a tool, as the reply before carried it."""

    id: str
    type: Literal["function"] = "function"
    function: Call
    index: int | None = None


class Message(Asked):
    """One turn of a chat. Clients send replies back as they came, so the empty fields of a reply are valid too."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, description="goes to the chat template, and few templates show it to the model")
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"a part is of the type {kind[:40]!r}; the served models read text only")
        return content

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError("a message without content")
        return self


class Function(Asked):
    """A function that the model may call."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict, description="JSON schema of its arguments")
    strict: bool | None = None


class Tool(Asked):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Asked):
    """The function of a choice."""

    name: str = Field(pattern=NAME)


class ToolChoice(Asked):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Asked):
    """A named JSON schema."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    body: dict[str, Any] = Field(alias="schema", min_length=1)
    strict: bool | None = None


class ResponseFormat(Asked):
    """The form of the reply."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to no other")
        return self


class StreamOptions(Asked):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(Body):
    """The fields that chats and completions share."""

    model: str = Field(description="the base, or its name with -tuned for the adapter")
    max_tokens: int | None = Field(None, description="length of the reply")
    n: int | None = Field(None, ge=1, description="replies")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern=TOKEN_ID)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    top_k: int | None = Field(None, ge=0, description="beyond OpenAI's API: only so many tokens are candidates; 0 for all")
    min_p: float | None = Field(None, ge=0, le=1, description="beyond OpenAI's API: least share of the best token's probability")
    ignore_eos: bool | None = Field(None, description="beyond OpenAI's API: generate max_tokens, whatever the model says")
    user: str | None = None

    @field_validator(*NOT_SERVED, mode="before", check_fields=False)
    @classmethod
    def _not_served(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            raise ValueError(NOT_SERVED[str(info.field_name)])
        return value

    def for_engine(self) -> dict[str, Any]:
        """Return the fields that came and mean something, as the engine takes them."""
        return self.model_dump(by_alias=True, exclude_unset=True, exclude_none=True, exclude=HINTS)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class ChatRequest(Generation):
    """A chat to complete."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, min_length=1)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = Field(None, description="nothing is stored here")
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    moderation: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    functions: Any = None
    function_call: Any = None

    def for_engine(self) -> dict[str, Any]:
        """Return the fields as the engine takes them; `modalities` can only be text."""
        asked = super().for_engine()
        asked.pop("modalities", None)
        return asked


Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(Generation):
    """A text to go on with: one, several, or already as token ids."""

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    suffix: Any = None
    best_of: Any = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return each prompt by itself."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type, list-item]


class EmbeddingRequest(Body):
    """Texts to make vectors of."""

    model: str = Field(description="the embedder that /v1/models names")
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, description="the embedder's own; vectors are not shortened")
    user: str | None = None

    @property
    def texts(self) -> list[Any]:
        """Return each text by itself; token ids stay what they are."""
        return [self.input] if isinstance(self.input, str) else list(self.input)
