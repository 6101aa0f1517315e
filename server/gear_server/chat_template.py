"""The model's own chat template, rendered in a sandbox: messages in, the text of the prompt out.

Offers templates what `transformers` offers them; knows nothing of tokens or HTTP.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import orjson
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gear_engine.protocol import RequestError

RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; when serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value: Any, indent: int | None = None, sort_keys: bool = False, **options: Any) -> str:
    """jinja2's own filter escapes HTML, which a prompt must not be."""
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys, **options)


class ChatTemplate:
    """Safe to use from several threads at once."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens
        self.source = source
        self.uses_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))

    def mentions(self, text: str) -> bool:
        return text in self.source

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Raises `RequestError` with the template's own message when it does not take these messages."""
        extra = template_kwargs or {}
        if reserved := RESERVED & extra.keys():
            raise RequestError(f"chat_template_kwargs may not set {sorted(reserved)[0]}", "chat_template_kwargs")
        variables = {"tools": tools, "documents": None, **self._special_tokens, **extra}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:  # a template is a program: messages that it did not expect can raise anything
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error


def load_chat_template(
    folder: Path, tokenizer_config: dict[str, Any], special_tokens: dict[str, str]
) -> ChatTemplate | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json; None when the model has none."""
    source = _find_source(folder, tokenizer_config)
    return None if source is None else ChatTemplate(source, special_tokens)


def _find_source(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    found = tokenizer_config.get("chat_template")
    if found is None and (path := folder / "chat_template.json").is_file():
        found = orjson.loads(path.read_bytes()).get("chat_template")
    if isinstance(found, list):  # [{"name": "default", "template": …}, {"name": "tool_use", …}]
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default")
    return found if isinstance(found, str) else None
