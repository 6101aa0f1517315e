"""The grammars that requests become let through what they should and nothing else."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from small_tokenizers import EOS, byte_level
from tokenizers import AddedToken

from gear_server.message_types import Tool
from gear_server.openai_types import CompletionRequest
from gear_server.structured import calls_shape, either, grammar_of, wanted_shape
from gear_server.tool_calls import HERMES, LLAMA3, MISTRAL, ToolStyle

SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "</think>", "<think>")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "add", "parameters": SCHEMA}}),
    Tool.model_validate({"type": "function", "function": {"name": "now"}}),
]

SpecialId = Callable[[str], int | None]


@pytest.fixture(scope="module", params=[(), SPECIAL], ids=["plain markers", "special markers"])
def vocabulary(request: pytest.FixtureRequest) -> tuple[LLTokenizer, SpecialId]:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in request.param])
    ids: dict[str, int] = {text: tokenizer.token_to_id(text) for text in request.param}
    return LLTokenizer(tokenizer.to_str(), eos_token=[tokenizer.token_to_id(EOS)]), ids.get


def accepts(vocabulary: tuple[LLTokenizer, SpecialId], grammar: str, text: str) -> bool:
    """Whether an answer may be that text and end there."""
    tokenizer, _ = vocabulary
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text, parse_special=True)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, ['{"b": [1]}', "{\n  }"],
         ["[1]", '{"a": 1} x', "{" + " " * 60 + "}"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, ['{"a": 1}'],
         ['{"a": "x"}', "{}"]),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ['{"a":1}'], ['{"b": 1}']),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["1"]),
        ({"guided_json": SCHEMA}, ['{"a":1}'], ["1"]),
        ({"guided_regex": r"\d+/\w+"}, ["12/ab"], ["12", "/ab"]),
        ({"guided_choice": ['say "hi"', "naïve\n"]}, ['say "hi"', "naïve\n"], ["say", ""]),
        ({"guided_grammar": 'start: "x" y\ny: "1" | "2"'}, ["x1"], ["x3"]),
        ({"guided_grammar": 'root ::= "x" y\ny ::= "1" | "2"'}, ["x2"], ["x"]),
    ],
)  # fmt: skip
def test_what_a_request_asks_for(
    vocabulary: tuple[LLTokenizer, SpecialId], asked: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    shape = wanted_shape(CompletionRequest.model_validate({"prompt": "x"} | asked))
    assert shape is not None
    assert shape.param == next(iter(asked))
    grammar = grammar_of(shape, special_id=vocabulary[1])
    assert [accepts(vocabulary, grammar, text) for text in good] == [True] * len(good)
    assert [accepts(vocabulary, grammar, text) for text in bad] == [False] * len(bad)


ADD, NOW = '{"name": "add", "arguments": {"a": 1}}', '{"name": "now", "arguments": {}}'
ADD3, NOW3 = ADD.replace("arguments", "parameters"), NOW.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("style", "named_form", "one", "two"),
    [
        (HERMES, False, f"<tool_call>\n{ADD}\n</tool_call>",
         f"<tool_call>\n{NOW}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>"),
        (LLAMA3, False, ADD3, f"{NOW3}; {ADD3}"),
        (MISTRAL, False, f"[TOOL_CALLS][{ADD}]", f"[TOOL_CALLS][{NOW}, {ADD}]"),
        (MISTRAL, True, '[TOOL_CALLS]add[ARGS]{"a": 1}', '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]add[ARGS]{"a": 1}'),
    ],
)  # fmt: skip
def test_forced_calls_are_written_in_the_models_style(
    vocabulary: tuple[LLTokenizer, SpecialId], style: ToolStyle, named_form: bool, one: str, two: str
) -> None:
    for several in (True, False):
        shape = calls_shape(style, TOOLS, several=several, named_form=named_form, special_id=vocabulary[1])
        grammar = grammar_of(shape, special_id=vocabulary[1])
        assert accepts(vocabulary, grammar, one)
        assert accepts(vocabulary, grammar, two) == several
        assert not accepts(vocabulary, grammar, one.replace("1", '"x"'))
        assert not accepts(vocabulary, grammar, one.replace("add", "sub"))
        assert not accepts(vocabulary, grammar, "It is one.")


def test_an_answer_may_be_json_or_a_call_where_both_were_offered(vocabulary: tuple[LLTokenizer, SpecialId]) -> None:
    shape = wanted_shape(CompletionRequest.model_validate({"prompt": "x", "guided_json": SCHEMA}))
    assert shape is not None
    calls = calls_shape(HERMES, TOOLS, several=True, named_form=False, special_id=vocabulary[1])
    grammar = grammar_of(either(shape, calls), special_id=vocabulary[1])
    assert accepts(vocabulary, grammar, '{"a": 5}')
    assert accepts(vocabulary, grammar, f"<tool_call>\n{ADD}\n</tool_call>")
    assert not accepts(vocabulary, grammar, "Hello")


@pytest.mark.parametrize(
    ("is_thinking", "good", "bad"),
    [
        (True, ["Hm.</think>\n\nyes", "</think>no"], ["yes", "<think>Hm.</think>", "Hm.</think>maybe"]),
        (False, ["<think>\nHm.\n</think>\n\nyes", "no"], ["Hm.</think>yes", "<think>Hm.", "maybe"]),
    ],
)
def test_a_model_may_think_before_it_follows_the_grammar(
    vocabulary: tuple[LLTokenizer, SpecialId], is_thinking: bool, good: list[str], bad: list[str]
) -> None:
    shape = wanted_shape(CompletionRequest.model_validate({"prompt": "x", "guided_choice": ["yes", "no"]}))
    assert shape is not None
    grammar = grammar_of(shape, special_id=vocabulary[1], thinks=True, is_thinking=is_thinking)
    assert [accepts(vocabulary, grammar, text) for text in good] == [True] * len(good)
    assert [accepts(vocabulary, grammar, text) for text in bad] == [False] * len(bad)
