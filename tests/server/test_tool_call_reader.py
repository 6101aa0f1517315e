"""Calls and reasoning in a model's text, read alike however it is cut into pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gear_server.answer_reader import AnswerReader, ReasoningReader
from gear_server.tool_calls import HERMES, LLAMA3, MISTRAL, ToolCall, ToolCallReader, ToolStyle, merge, tool_style

NAMES = ["get_weather", "add"]
STYLES = {"hermes": HERMES, "llama": LLAMA3, "mistral": MISTRAL}
Calls = list[tuple[str, str]]

PARIS = '{"city": "Paris"}'
CASES: list[tuple[str, str, str, Calls]] = [
    ("hermes", "Hello {world} <tool", "Hello {world} <tool", []),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "",
     [("get_weather", PARIS)]),
    ("hermes", 'Let me see.\n<tool_call>{"name":"add","arguments":{"a":[1,{"b":"}\\""}]}}</tool_call>',
     "Let me see.\n", [("add", '{"a":[1,{"b":"}\\""}]}')]),
    ("hermes", '<tool_call>{"arguments": {"city": "Paris"} , "name": "get_weather"}</tool_call>\n'
     '<tool_call>\n{"name": "add"}\n</tool_call>\n\nDone.', "\n\nDone.", [("get_weather", PARIS), ("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", "<tool_call>never mind</tool_call>", "<tool_call>never mind</tool_call>", []),
    ("hermes", '<tool_call>{"no": "name"}</tool_call> ok', '<tool_call>{"no": "name"}</tool_call> ok', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ("hermes", '<tool_call>{"na', '<tool_call>{"na', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}\n</tool', "", [("add", "{}")]),
    ("hermes", "  \n", "  \n", []),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [("get_weather", PARIS)]),
    ("llama", '\n<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}', "",
     [("add", '{"a": 1}'), ("add", '{"a": 2}')]),
    ("llama", '{"name": "Ada", "age": 5} is JSON', '{"name": "Ada", "age": 5} is JSON', []),
    ("llama", 'An object: {"name": "add", "parameters": {}}', 'An object: {"name": "add", "parameters": {}}', []),
    ("llama", "<|python_tag|>search.call()", "<|python_tag|>search.call()", []),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": '
     '{"city": "Paris"}}]', "", [("add", '{"a": 1}'), ("get_weather", PARIS)]),
    ("mistral", 'Sure.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add{"a": 1}', "Sure.",
     [("get_weather", PARIS), ("add", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS]nothing of the kind", "[TOOL_CALLS]nothing of the kind", []),
    ("mistral", "[1, 2] is a list", "[1, 2] is a list", []),
]  # fmt: skip


def read(style: ToolStyle, pieces: list[str], max_calls: int | None = None) -> tuple[str, Calls, int]:
    reader = ToolCallReader(style, NAMES, max_calls)
    content, calls = "", list[ToolCall]()
    for part in [*(reader.feed(piece) for piece in pieces), reader.flush()]:
        content += part.content
        merge(calls, part.calls)
    assert all(call.id.startswith("call_") for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return content, [(call.name, call.arguments) for call in calls], reader.num_complete


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_calls_are_told_from_content(style: str, text: str, content: str, calls: Calls) -> None:
    for pieces in ([text], list(text)):
        assert read(STYLES[style], pieces)[:2] == (content, calls)


@given(st.sampled_from(CASES), st.data())
def test_how_a_text_is_cut_changes_nothing(case: tuple[str, str, str, Calls], data: st.DataObject) -> None:
    style, text, content, calls = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(STYLES[style], pieces)[:2] == (content, calls)


@given(st.text(st.sampled_from('<tool_call>/{}[]",: \nnamearguts1'), max_size=60), st.sampled_from(list(STYLES)))
def test_any_text_is_read_alike_whole_and_letter_by_letter(text: str, style: str) -> None:
    assert read(STYLES[style], [text]) == read(STYLES[style], list(text))


def test_only_complete_calls_count_as_calls() -> None:
    assert read(HERMES, [CASES[1][1]])[2] == 1
    assert read(HERMES, ['<tool_call>{"name": "add", "arguments": {"a": 1'])[2] == 0


def test_one_call_at_a_time_drops_the_others() -> None:
    content, calls, complete = read(MISTRAL, [CASES[17][1]], max_calls=1)
    assert (content, calls, complete) == ("", [("add", '{"a": 1}')], 1)


def test_arguments_come_out_while_they_are_written() -> None:
    reader = ToolCallReader(HERMES, NAMES)
    pieces = ["<tool_call>", '{"name": "add", ', '"arguments": {"te', 'xt": "one', " two", '"}}', "</tool_call>"]
    calls = [[(call.name, call.arguments) for call in reader.feed(piece).calls] for piece in pieces]
    assert calls == [[], [("add", "")], [("", '{"te')], [("", 'xt": "one')], [("", " two")], [("", '"}')], []]


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8) | st.lists(st.booleans()), max_size=4))
def test_arguments_are_the_json_that_was_written(arguments: dict[str, object]) -> None:
    written = json.dumps({"name": "add", "arguments": arguments})
    _, calls, _ = read(HERMES, [f"<tool_call>{written}</tool_call>"])
    assert [json.loads(text) for _, text in calls] == [arguments]


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ '[TOOL_CALLS]' }}", MISTRAL),
        ("<tool_call>{{ tool_call }}</tool_call>", HERMES),
        ('{"name": "x", "parameters": {} }', LLAMA3),
        ("<|im_start|>{{ content }}", HERMES),
    ],
)
def test_a_template_tells_its_style(template: str, style: ToolStyle) -> None:
    assert tool_style(template) == style


THOUGHTS = [
    (False, "<think>\nFirst this.\n\nThen that.\n</think>\n\nHello", "First this.\n\nThen that.", "Hello"),
    (False, "\n<think></think>Hello", "", "Hello"),
    (False, "Hello <think>no</think>", "", "Hello <think>no</think>"),
    (False, "  <th", "", "  <th"),
    (True, "First.\n</think>\nHello", "First.", "Hello"),
    (True, "Cut </thin", "Cut </thin", ""),
    (True, "a < b </ c", "a < b </ c", ""),
]


@pytest.mark.parametrize(("is_open", "text", "reasoning", "content"), THOUGHTS)
def test_reasoning_is_told_from_content(is_open: bool, text: str, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        reader = AnswerReader(ReasoningReader(is_open=is_open), None)
        parts = [*(reader.feed(piece) for piece in pieces), reader.flush()]
        assert ("".join(p.reasoning for p in parts), "".join(p.content for p in parts)) == (reasoning, content)


def test_a_model_may_think_and_then_call() -> None:
    reader = AnswerReader(ReasoningReader(is_open=False), ToolCallReader(HERMES, NAMES))
    text = f"<think>Weather.</think>\n{CASES[1][1]}"
    parts = [*(reader.feed(char) for char in text), reader.flush()]
    assert "".join(part.reasoning for part in parts) == "Weather."
    assert "".join(part.content for part in parts) == ""
    assert reader.num_calls == 1
