"""The bodies of Anthropic's Messages API: names, types, bounds and defaults.

What cannot be served (images, documents, tools that run on Anthropic's side) is refused by name; `cache_control` asks
for what the prefix cache does anyway. What a body means is the business of `messages.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from gear_server import unsupported
from gear_server.body import Body, Flag, Int, Int32, Int64, Number


class TextBlock(Body):
    type: Literal["text"] = Field(description="A piece of text.")
    text: str = Field(description="The text.")


class ThinkingBlock(Body):
    type: Literal["thinking", "redacted_thinking"] = Field(description="From an earlier answer; models do not see it.")


class ToolUseBlock(Body):
    type: Literal["tool_use"] = Field(description="A call that the assistant made.")
    id: str = Field(min_length=1, max_length=256, description="What the result refers to.")
    name: str = Field(min_length=1, max_length=256, description="The tool.")
    input: dict[str, Any] = Field(description="Its arguments.")


class ToolResultBlock(Body):
    type: Literal["tool_result"] = Field(description="What a tool answered.")
    tool_use_id: str = Field(min_length=1, max_length=256, description="The call that it answers.")
    content: "TextBlocks" = Field([], description="Text, or a list of blocks of type text.")
    is_error: Flag = Field(False, description="Whether the tool failed.")


def _to_blocks(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of blocks")
    for block in value:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise ValueError('each block must be an object with a type, like {"type": "text", "text": "…"}')
        if kind not in _KINDS:
            raise ValueError(f"blocks of type {kind[:40]!r} are not supported, only text and tool use")
    return value


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(lambda block: f"<{_KINDS[block['type']]}>"),  # errors.py leaves <…> out of a field's path
]
_KINDS = {kind: kind for kind in ("text", "thinking", "tool_use", "tool_result")} | {"redacted_thinking": "thinking"}
Blocks = Annotated[list[Block], BeforeValidator(_to_blocks, json_schema_input_type=str | list[Block])]
TextBlocks = Annotated[list[TextBlock], BeforeValidator(_to_blocks, json_schema_input_type=str | list[TextBlock])]


class AnthropicMessage(Body):
    role: Literal["user", "assistant", "system"] = Field(description="Who speaks.")
    content: Blocks = Field(description="Text, or a list of blocks.")


class AnthropicTool(Body):
    type: Literal["custom"] = Field("custom", description="Tools that Anthropic runs are not served.")
    name: str = Field(min_length=1, max_length=256, description="What the model calls it.")
    description: str = Field("", description="What the model is told about it.")
    input_schema: dict[str, Any] = Field(description="JSON schema of its arguments.")


class AnthropicToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"] = Field(description="Whether tools may or must be called.")
    name: str | None = Field(None, description="The tool, with type tool.")
    disable_parallel_tool_use: Flag = Field(False, description="At most one call in an answer.")


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"] = Field(description="Adaptive leaves it to the model.")
    budget_tokens: Int | None = Field(None, ge=1, description="Accepted and not used: max_tokens limits both.")


class OutputFormat(Body):
    type: Literal["json_schema"] = Field(description="The only format there is.")
    json_schema: dict[str, Any] = Field(alias="schema", description="What the answer's JSON satisfies.")


class OutputConfig(Body):
    format: OutputFormat | None = Field(None, description="Left out: free text.")
    effort: Any = Field(None, description="Accepted and not used.")


class CountTokensRequest(Body):
    """What makes a prompt."""

    UNSUPPORTED = unsupported.MESSAGES

    model: str | None = Field(None, description="A served model; left out, it is the only one.")
    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True, min_length=1)] = Field(
        description="The conversation so far; the answer goes on from a last message of the assistant."
    )
    system: TextBlocks = Field([], description="The system prompt: text, or blocks of type text.")
    tools: list[AnthropicTool] = Field([], max_length=128, description="What the model may call.")
    tool_choice: AnthropicToolChoice | None = Field(None, description="Left out: the model decides.")
    thinking: Thinking | None = Field(None, description="Whether a model that can think does; left out: its default.")


class MessagesRequest(CountTokensRequest):
    max_tokens: Int = Field(ge=1, description="The longest answer, in tokens.")
    stream: Flag = Field(False, description="Answer with server-sent events.")
    temperature: Number = Field(1.0, ge=0, le=100, description="0 always takes the likeliest token.")
    top_p: Number = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens that make up this share.")
    top_k: Int = Field(0, ge=-1, le=2**31 - 1, description="Draw from that many likeliest tokens; 0 or -1: all.")
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=1024)]] = Field(
        [], max_length=16, description="Texts that end the answer; it is cut before them."
    )
    output_config: OutputConfig | None = Field(None, description="The form of the answer.")
    metadata: dict[str, Any] = Field({}, description="Accepted and not used.")
    seed: Int64 | None = Field(None, description="The same seed draws the same answer. Not in Anthropic's API.")
    priority: Int32 = Field(0, description="Lower runs first. Not in Anthropic's API.")
    cache_salt: str = Field(
        "", max_length=1024, description="Share cached prompts only with this salt. Not in Anthropic's API."
    )
