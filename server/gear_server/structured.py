"""What an answer must look like, as a grammar for llguidance: JSON schemas, regular expressions, choices, grammars and
forced tool calls. Refuses here, before anything is submitted, what the engine could not follow.

Knows the fields of requests and how models mark their thoughts and calls; the masks are the engine's business.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from gear_engine.protocol import RequestError
from gear_server.answer_reader import CLOSE, OPEN
from gear_server.message_types import Tool
from gear_server.openai_types import SamplingBody
from gear_server.tool_calls import MISTRAL, ToolStyle

MAX_GRAMMAR_CHARS = 256 * 1024
MAX_CALLS = 16  # in one answer that must call tools, lest a small model calls until its tokens are used up
# A model may indent; unlimited white space would let a small one indent for ever.
_WHITESPACE = r"[ \n\r\t]{0,40}"

SpecialId = Callable[[str], int | None]
"""The id of a text that is a special token, which grammars must name by id; None for any other text."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One rule of Lark that the answer must follow, and the field that asked for it."""

    rule: str
    param: str
    side: str = ""  # a whole grammar that the rule names as @side


def wanted_shape(body: SamplingBody) -> Shape | None:
    """What the request asks its answer to look like; None: anything. Raises `RequestError`."""
    shapes = [shape for shape in (_of_response_format(body), *_of_structured_outputs(body)) if shape is not None]
    if len(shapes) > 1:
        first, second = shapes[0].param, shapes[1].param
        raise RequestError(f"{first} and {second} both say what the answer looks like: send one of them", second)
    return shapes[0] if shapes else None


def grammar_of(shape: Shape, *, special_id: SpecialId, thinks: bool = False, is_thinking: bool = False) -> str:
    """The whole grammar: an answer that begins with reasoning is free until that ends. Raises `RequestError`."""
    close = special_id(CLOSE)
    rules = [f"body: {shape.rule}"]
    if is_thinking or thinks:
        rules.append("blank: /[ \\n\\r\\t]{0,8}/")
        if close is None:
            rules.append("think[lazy]: /(.|\\n)*" + CLOSE.replace("/", "\\/") + "/")
        else:
            rules.append(f"think: /(.|\\n)*/ <[{close}]>")
    if is_thinking:
        rules.insert(0, "start: think blank body")
    elif thinks:
        rules.insert(0, f"start: ({_literal(OPEN, special_id)} think blank)? body")
    else:
        rules.insert(0, "start: body")
    lark = "\n".join(rules)
    grammar = lark
    if shape.side:
        grammars = [{"lark_grammar": lark}, {"name": "side", "lark_grammar": shape.side}]
        grammar = json.dumps({"grammars": grammars})
    _check(grammar, shape.param)
    return grammar


def calls_shape(
    style: ToolStyle, tools: Sequence[Tool], *, several: bool, named_form: bool, special_id: SpecialId
) -> Shape:
    """Calls of these tools, and nothing else, as the model writes them."""
    if style == MISTRAL and not named_form:
        call = "(" + " | ".join(_object(style, tool) for tool in tools) + ")"
        more = f' (", " {call}){{0,{MAX_CALLS - 1}}}' if several else ""
        return Shape(f'{_literal(style.opener, special_id)} "[" {call}{more} "]"', "tools")
    if style == MISTRAL:
        forms = [f"{_quoted(tool.function.name)} {_literal('[ARGS]', special_id)} {_arguments(tool)}" for tool in tools]
        between = ""
    else:
        forms = [_object(style, tool) for tool in tools]
        between = _quoted("; " if style.bare else "\n") + " "
    call = "(" + " | ".join(forms) + ")"
    if not style.bare:
        gap = _quoted("\n") if style.closer else ""
        closer = f"{gap} {_literal(style.closer, special_id)}" if style.closer else ""
        call = f"{_literal(style.opener, special_id)} {gap} {call} {closer}"
    more = f" ({between}{call}){{0,{MAX_CALLS - 1}}}" if several else ""
    return Shape(call + more, "tools")


def either(shape: Shape, calls: Shape) -> Shape:
    """An answer in its shape, or calls."""
    return Shape(f"({shape.rule}) | ({calls.rule})", shape.param, shape.side)


def _object(style: ToolStyle, tool: Tool) -> str:
    head = f'{{"name": {json.dumps(tool.function.name, ensure_ascii=False)}, "{style.arguments}": '
    return f"{_quoted(head)} {_arguments(tool)} {_quoted('}')}"


def _arguments(tool: Tool) -> str:
    return _json_rule(tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False})


def _of_response_format(body: SamplingBody) -> Shape | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Shape(_json_rule({"type": "object"}), "response_format")
    if form.json_schema is None:
        raise RequestError("response_format of type json_schema needs json_schema", "response_format")
    return Shape(_json_rule(form.json_schema.schema_), "response_format")


def _of_structured_outputs(body: SamplingBody) -> list[Shape]:
    """vLLM's field, and the names that it had before."""
    asked = body.structured_outputs
    fields: list[tuple[str, str, Any]] = []
    if asked is not None:
        fields += [
            ("json", "structured_outputs", asked.json_),
            ("json", "structured_outputs", {"type": "object"} if asked.json_object else None),
            ("regex", "structured_outputs", asked.regex),
            ("choice", "structured_outputs", asked.choice),
            ("grammar", "structured_outputs", asked.grammar),
        ]
    for kind in ("json", "regex", "choice", "grammar"):
        fields.append((kind, f"guided_{kind}", getattr(body, f"guided_{kind}")))
    return [_shape(kind, param, value) for kind, param, value in fields if value is not None]


def _shape(kind: str, param: str, value: Any) -> Shape:
    if kind == "regex":
        return Shape(f"/{regex_to_lark(value)}/", param)
    if kind == "choice":
        return Shape(" | ".join(map(_quoted, value)), param)
    if kind == "grammar":
        try:
            return Shape("@side", param, any_to_lark(value))
        except Exception as error:  # the translator of GBNF raises its own kinds
            raise RequestError(f"{param}: the grammar cannot be read: {error}", param) from error
    return Shape(_json_rule(_schema_of(value, param)), param)


def _schema_of(value: Any, param: str) -> dict[str, Any]:
    """A schema, or its text as vLLM takes it too."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RequestError(f"{param}: the schema is not valid JSON: {error}", param) from error
    if not isinstance(value, dict):
        raise RequestError(f"{param}: the schema must be an object", param)
    return value


def _json_rule(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps(schema | {"x-guidance": {"whitespace_pattern": _WHITESPACE}})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _literal(text: str, special_id: SpecialId) -> str:
    token_id = special_id(text)
    return _quoted(text) if token_id is None else f"<[{token_id}]>"


def _check(grammar: str, param: str) -> None:
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise RequestError(f"{param} is too large: its grammar has {len(grammar)} of at most 262144 characters", param)
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        reason = " ".join(messages[0].split("\n   1 |")[0].split())
        raise RequestError(f"{param} cannot be followed: {reason}", param)
