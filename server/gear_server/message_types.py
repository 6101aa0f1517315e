"""Messages of a conversation, the tools that it offers and the calls that were made.

Names, types and bounds, as OpenAI and vLLM have them.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gear_engine.protocol import RequestError
from gear_server import unsupported
from gear_server.body import Body, Flag


def _to_text(value: Any) -> str:
    """Message content: text, or parts of type text, which are joined by line breaks as in vLLM."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"parts of type {kind[:40]!r} are not supported yet, only text")
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError('each part must look like {"type": "text", "text": "…"}')
        texts.append(part["text"])
    return "\n".join(texts)


def _to_tool_choice(value: Any) -> Any:
    """Said here, because of a union pydantic would say what each of its members lacks."""
    function = value.get("function") if isinstance(value, dict) else None
    if value in ("auto", "none", "required") or (isinstance(function, dict) and isinstance(function.get("name"), str)):
        return value
    raise RequestError(
        'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": "…"}}',
        "tool_choice",
    )


class Function(Body):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$", description="What calls name.")
    description: str | None = Field(None, max_length=1048576, description="When and how to call it, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments; left out: none.")
    strict: Flag | None = Field(None, description="Accepted; calls that are forced always validate.")


class Tool(Body):
    type: Literal["function"] = Field(description="Only functions.")
    function: Function = Field(description="The function.")


class FunctionName(Body):
    name: str = Field(min_length=1, max_length=64, description="One of the tools.")


class NamedTool(Body):
    type: Literal["function"] = Field("function", description="Only functions.")
    function: FunctionName = Field(description="The function to call.")


ToolChoice = Annotated[Literal["auto", "none", "required"] | NamedTool, BeforeValidator(_to_tool_choice)]


class CalledFunction(Body):
    name: str = Field(min_length=1, max_length=64, description="Which function was called.")
    arguments: str = Field("{}", description="Its arguments, as JSON text.")


class CalledTool(Body):
    """A call in an assistant's message."""

    id: str = Field("", max_length=256, description="The call's id, which the tool's answer repeats.")
    type: Literal["function"] = Field("function", description="Only functions.")
    function: CalledFunction = Field(description="The call.")


class Message(Body):
    UNSUPPORTED = unsupported.MESSAGE

    role: str = Field(min_length=1, max_length=64, description="system, user, assistant, or what the template knows.")
    content: Annotated[str | None, BeforeValidator(_to_text, json_schema_input_type=str | list[dict[str, str]])] = (
        Field(None, description="Text, or a list of parts of type text. Only a message with tool_calls may lack it.")
    )
    tool_calls: list[CalledTool] | None = Field(None, max_length=1024, description="Of the assistant.")
    tool_call_id: str | None = Field(None, max_length=256, description="Of a tool's answer: which call it answers.")
    reasoning_content: str | None = Field(None, description="Of the assistant, for templates that show it again.")

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise RequestError("content is required, except beside tool_calls", "content")
        return self


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]
