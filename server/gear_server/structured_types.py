"""How a request says what its answer looks like: OpenAI's response_format and vLLM's structured_outputs.

Names and bounds alone; `structured.py` makes grammars of them.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gear_server import unsupported
from gear_server.body import Body, Flag

Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024, fail_fast=True)]


def _to_schema(value: Any) -> Any:
    if isinstance(value, dict | str):
        return value
    raise ValueError("must be a JSON schema: an object, or its text")


Schema = Annotated[dict[str, Any] | str, BeforeValidator(_to_schema)]


class JsonSchema(Body):
    name: str = Field("answer", max_length=256, description="A name for people.")
    description: str | None = Field(None, max_length=65536, description="Accepted and not used.")
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema that the answer validates against.")
    strict: Flag | None = Field(None, description="Accepted: every schema is followed strictly.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = Field(description="What the answer is.")
    json_schema: JsonSchema | None = Field(None, description="With type json_schema.")


class StructuredOutputs(Body):
    """vLLM's field: one of these."""

    UNSUPPORTED = unsupported.STRUCTURED_OUTPUTS

    json_: Schema | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = Field(None, min_length=1, max_length=65536, description="A regular expression.")
    choice: Choices | None = Field(None, description="Texts, one of which is the answer.")
    grammar: str | None = Field(None, min_length=1, max_length=262144, description="A grammar: Lark or GBNF.")
    json_object: Flag = Field(False, description="Any JSON object.")
