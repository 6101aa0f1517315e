"""The body of OpenAI's Responses API: names, types, bounds and defaults.

The server keeps no conversations: what refers to an earlier response is refused by name. What a body means is the
business of `responses.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from gear_server import unsupported
from gear_server.body import Body, Flag, Int, Int32, Int64, Number


class TextPart(Body):
    type: Literal["input_text", "output_text", "text"] = Field(description="A piece of text.")
    text: str = Field(description="The text.")


def _to_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise ValueError('each part must be an object with a type, like {"type": "input_text", "text": "…"}')
        if kind not in ("input_text", "output_text", "text"):
            raise ValueError(f"parts of type {kind[:40]!r} are not supported, only text")
    return value


TextParts = Annotated[list[TextPart], BeforeValidator(_to_parts, json_schema_input_type=str | list[TextPart])]


class MessageItem(Body):
    type: Literal["message"] = Field("message", description="A message; left out, an item is one.")
    role: Literal["user", "assistant", "system", "developer"] = Field(description="Who speaks.")
    content: TextParts = Field(description="Text, or a list of parts.")


class FunctionCallItem(Body):
    type: Literal["function_call"] = Field(description="A call that the assistant made.")
    call_id: str = Field(min_length=1, max_length=256, description="What the result refers to.")
    name: str = Field(min_length=1, max_length=256, description="The function.")
    arguments: str = Field(description="Its arguments, as JSON.")


class FunctionOutputItem(Body):
    type: Literal["function_call_output"] = Field(description="What a function answered.")
    call_id: str = Field(min_length=1, max_length=256, description="The call that it answers.")
    output: TextParts = Field(description="Text, or a list of parts.")


class ReasoningItem(Body):
    type: Literal["reasoning"] = Field(description="From an earlier answer; models do not see it.")


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(lambda item: f"<{item['type']}>"),  # errors.py leaves <…> out of a field's path
]
_KINDS = frozenset({"message", "function_call", "function_call_output", "reasoning"})


def _to_items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of items")
    items: list[Any] = []
    for item in value:
        if not isinstance(item, dict):
            raise ValueError('each item must be an object, like {"role": "user", "content": "…"}')
        kind = item.get("type") or "message"
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"items of type {str(kind)[:40]!r} are not supported, only messages and function calls")
        items.append(item | {"type": kind})
    return items


Items = Annotated[
    list[Item],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_to_items, json_schema_input_type=str | Annotated[list[Item], Field(min_length=1)]),
]


class FunctionTool(Body):
    type: Literal["function"] = Field(description="Tools that OpenAI runs are not served.")
    name: str = Field(min_length=1, max_length=256, description="What the model calls it.")
    description: str = Field("", description="What the model is told about it.")
    parameters: dict[str, Any] = Field({}, description="JSON schema of its arguments.")
    strict: Flag = Field(False, description="Let the arguments satisfy the schema.")


class NamedFunction(Body):
    type: Literal["function"] = Field(description="The only kind there is.")
    name: str = Field(min_length=1, max_length=256, description="The function that must be called.")


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = Field(description="Free text, JSON, or JSON of a schema.")
    name: str = Field("answer", min_length=1, max_length=256, description="A name for the schema.")
    json_schema: dict[str, Any] | None = Field(None, alias="schema", description="With type json_schema.")
    strict: Flag = Field(False, description="Accepted: the answer always satisfies the schema.")


class TextConfig(Body):
    format: TextFormat | None = Field(None, description="Left out: free text.")
    verbosity: Any = Field(None, description="Accepted and not used.")


class ResponsesRequest(Body):
    UNSUPPORTED = unsupported.RESPONSES

    model: str | None = Field(None, description="A served model; left out, it is the only one.")
    input: Items = Field(description="Text, or the conversation so far as a list of items.")
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: Int | None = Field(None, ge=1, description="The longest answer, in tokens.")
    stream: Flag = Field(False, description="Answer with server-sent events.")
    temperature: Number = Field(1.0, ge=0, le=100, description="0 always takes the likeliest token.")
    top_p: Number = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens that make up this share.")
    text: TextConfig | None = Field(None, description="The form of the answer.")
    tools: list[FunctionTool] = Field([], max_length=128, description="What the model may call.")
    tool_choice: Literal["auto", "none", "required"] | NamedFunction = Field(
        "auto", description="Whether functions may or must be called, or which."
    )
    parallel_tool_calls: Flag = Field(True, description="Allow several calls in one answer.")
    metadata: dict[str, Any] = Field({}, description="Given back with the response.")
    user: Any = Field(None, description="Accepted and not used.")
    store: Any = Field(None, description="Accepted; nothing is ever stored.")
    reasoning: Any = Field(None, description="Accepted and not used.")
    truncation: Literal["auto", "disabled"] = Field("disabled", description="An input that is too long is refused.")
    top_k: Int = Field(0, ge=-1, le=2**31 - 1, description="Of that many likeliest tokens. Not in OpenAI's API.")
    seed: Int64 | None = Field(None, description="The same seed draws the same answer. Not in OpenAI's API.")
    priority: Int32 = Field(0, description="Lower runs first. Not in OpenAI's API.")
    cache_salt: str = Field(
        "", max_length=1024, description="Share cached prompts only with this salt. Not in OpenAI's API."
    )
