"""What a chat model's text is made of: its reasoning, its content, and calls of tools.

Reads pieces as they come and gives out what is certain; the same for streams and for whole answers.
"""

from dataclasses import dataclass, field
from typing import Literal

from gear_server.tool_calls import Read, ToolCall, ToolCallReader, overlap

OPEN, CLOSE = "<think>", "</think>"


@dataclass(slots=True)
class Parts:
    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class ReasoningReader:
    """<think>…</think> at the beginning of an answer, which the prompt may have opened already.

    White space around the reasoning belongs to nobody.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._state: Literal["beginning", "thinking", "closed", "answering"] = "thinking" if is_open else "beginning"
        self._text = ""  # not read yet
        self._told_any = False

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, the rest of the answer)"""
        self._text += text
        if self._state == "beginning":
            self._look_for_opening()
        reasoning = self._read_thought() if self._state == "thinking" else ""
        if self._state == "closed" and self._text.strip():
            self._text, self._state = self._text.lstrip(), "answering"
        return reasoning, self._take_rest() if self._state == "answering" else ""

    def flush(self) -> tuple[str, str]:
        """The answer has ended."""
        if self._state == "thinking":
            return self._told(self._take_rest().rstrip()), ""
        return "", "" if self._state == "closed" else self._take_rest()

    def _look_for_opening(self) -> None:
        begun = self._text.lstrip()
        if begun.startswith(OPEN):
            self._text, self._state = begun[len(OPEN) :], "thinking"
        elif not OPEN.startswith(begun):
            self._state = "answering"

    def _read_thought(self) -> str:
        thought, close, after = self._text.partition(CLOSE)
        if close:
            self._text, self._state = after, "closed"
            return self._told(thought.rstrip())
        certain = thought[: len(thought) - overlap(thought, CLOSE)].rstrip()
        self._text = thought[len(certain) :]
        return self._told(certain)

    def _told(self, thought: str) -> str:
        told = thought if self._told_any else thought.lstrip()
        self._told_any |= bool(told)
        return told

    def _take_rest(self) -> str:
        text, self._text = self._text, ""
        return text


class AnswerReader:
    """Reasoning first, if the model thinks; then content and calls, if tools were offered."""

    def __init__(self, reasoning: ReasoningReader | None, tools: ToolCallReader | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def num_calls(self) -> int:
        """Complete ones."""
        return 0 if self._tools is None else self._tools.num_complete

    def feed(self, text: str) -> Parts:
        reasoning, rest = ("", text) if self._reasoning is None else self._reasoning.feed(text)
        read = Read(rest) if self._tools is None else self._tools.feed(rest)
        return Parts(reasoning, read.content, read.calls)

    def flush(self) -> Parts:
        reasoning, rest = ("", "") if self._reasoning is None else self._reasoning.flush()
        if self._tools is None:
            return Parts(reasoning, rest)
        read, last = self._tools.feed(rest), self._tools.flush()
        return Parts(reasoning, read.content + last.content, read.calls + last.calls)
