"""Tool calls as models write them (Hermes and Qwen, Llama 3, Mistral), read from text that arrives in pieces.

Knows text alone: pieces of content and of calls come out as soon as they are certain, so that a streamed answer and a
whole one are read by the same code.
"""

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field

from gear_server.call_object import CallObject

_WORD = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How calls look in a model's text."""

    opener: str  # before the first call, or before each
    closer: str  # after each; "": nothing
    arguments: str  # the key of the arguments in a call's object
    separators: str  # characters that may stand between calls, besides white space
    bare: bool = False  # an answer that begins with "{" is a call even without the opener
    named: bool = False  # or the name stands before the arguments' object: name[ARGS]{…}

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens, whose text must be seen nevertheless."""
        return tuple(marker for marker in (self.opener, self.closer, "[ARGS]" if self.named else "") if marker)


HERMES = ToolStyle("<tool_call>", "</tool_call>", "arguments", "")
LLAMA3 = ToolStyle("<|python_tag|>", "", "parameters", ";", bare=True)
MISTRAL = ToolStyle("[TOOL_CALLS]", "", "arguments", "[,]", named=True)


def tool_style(template: str) -> ToolStyle:
    """By what the model's chat template says; a model that was taught no style is asked for Hermes'."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or '"parameters": ' in template:
        return LLAMA3
    return HERMES


@dataclass(slots=True)
class ToolCall:
    """A call, or what a piece of text adds to it: `id` and `name` come once, first; arguments are JSON text."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


def merge(calls: list[ToolCall], new: list[ToolCall]) -> None:
    """Add pieces of calls to what is known of them."""
    for piece in new:
        if piece.index == len(calls):
            calls.append(ToolCall(piece.index, piece.id, piece.name))
        calls[piece.index].arguments += piece.arguments


@dataclass(slots=True)
class Read:
    """What a piece of an answer turned out to be."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class ToolCallReader:
    """Feed it an answer piece by piece, then `flush`. What looks like a call and is none comes out as content."""

    def __init__(self, style: ToolStyle, names: Collection[str], max_calls: int | None = None) -> None:
        self.num_complete = 0
        self._style = style
        self._names = names
        self._max_calls = max_calls
        self._num_begun = 0
        self._text = ""  # not read yet
        self._blank = ""  # white space before content, which a call would make meaningless
        self._in_text = True
        self._began = False  # content or a call has been seen
        self._pending = ""  # as written: the opener and what belongs to it, to be given back if no call follows
        self._call: CallObject | None = None

    def feed(self, text: str) -> Read:
        self._text += text
        read = Read()
        while self._advance(read):
            pass
        return read

    def flush(self) -> Read:
        """The answer has ended: what could have become a call has not."""
        read = Read()
        if self._call is not None and not self._call.announced:
            self._text = self._call.raw + self._text
        left = self._pending + self._text
        if not self._in_text and self._num_begun and self._is_between(left):
            left = ""
        if self._call is None or not self._call.announced:
            self._content(read, left)
        if not self._began:
            read.content += self._blank
        self._text = self._pending = self._blank = ""
        self._call = None
        return read

    def _is_between(self, left: str) -> bool:
        """Nothing but what stands between calls, or the beginning of it."""
        rest = left.strip(" \n\r\t" + self._style.separators)
        return not rest or self._style.closer.startswith(rest)

    def _advance(self, read: Read) -> bool:
        """Read on by one state; False when more text is needed."""
        if not self._text:
            return False
        if self._call is not None:
            return self._read_call(self._call, read)
        return self._read_text(read) if self._in_text else self._read_between(read)

    def _read_text(self, read: Read) -> bool:
        style = self._style
        if style.bare and not self._began and (self._blank + self._text).lstrip().startswith("{"):
            self._text, self._blank = (self._blank + self._text).lstrip(), ""
            self._in_text = False
            return True
        before, opener, after = self._text.partition(style.opener)
        if opener:
            self._content(read, before)
            self._text, self._pending, self._in_text = after, opener, False
            self._blank = ""
            return True
        held = overlap(self._text, style.opener)
        self._content(read, self._text[: len(self._text) - held])
        self._text = self._text[len(self._text) - held :]
        return False

    def _read_between(self, read: Read) -> bool:
        """After an opener or a call: the next call, the closer, or text after all."""
        style = self._style
        rest = self._text.lstrip()
        while rest[:1] and rest[0] in style.separators and not style.opener.startswith(rest[: len(style.opener)]):
            rest = rest[1:].lstrip()
        skipped = self._text[: len(self._text) - len(rest)]
        if not rest:
            return False
        if rest.startswith("{"):
            self._pending += skipped
            self._text, self._call = rest, CallObject(style.arguments)
            return True
        if style.closer and not self._pending and style.closer.startswith(rest[: len(style.closer)]):
            if len(rest) < len(style.closer):
                return False
            self._text, self._in_text = rest[len(style.closer) :], True
            return True
        if rest.startswith(style.opener):
            self._text, self._pending = rest[len(style.opener) :], self._pending + skipped + style.opener
            return True
        if style.opener.startswith(rest):
            return False
        if style.named and self._pending and (word := _WORD.match(rest)):
            return self._read_name(read, word[0], skipped, rest)
        return self._give_up(read, skipped, rest)

    def _give_up(self, read: Read, skipped: str, rest: str) -> bool:
        """Whatever begins with `rest`, it is no call: what led up to it is content."""
        self._content(read, self._pending + skipped)
        self._text, self._pending, self._in_text = rest, "", True
        return True

    def _read_name(self, read: Read, name: str, skipped: str, rest: str) -> bool:
        """name[ARGS]{…} or name{…}: as if it were an object."""
        after = rest[len(name) :]
        body = after.removeprefix("[ARGS]").lstrip()
        if body.startswith("{"):
            self._call = CallObject(self._style.arguments, name)
            self._text = body
            return True
        if not body or "[ARGS]".startswith(after):
            return False
        return self._give_up(read, skipped, rest)

    def _read_call(self, call: "CallObject", read: Read) -> bool:
        used = call.feed(self._text)
        self._text = self._text[used:]
        bare = self._style.bare and not self._pending  # any JSON would do: only a known name makes it a call
        if call.name and not call.announced and (not bare or call.name in self._names):
            self._begin(call, read)
        if call.announced and (arguments := call.take_arguments()):
            self._emit(read, ToolCall(call.index, arguments=arguments))
        if not call.ended:
            return False
        self._call = None
        if call.announced:
            self.num_complete += self._is_wanted(call.index)
        else:
            self._in_text = True
            self._content(read, self._pending + call.raw)
        self._pending = ""
        return True

    def _begin(self, call: "CallObject", read: Read) -> None:
        call.announced, call.index = True, self._num_begun
        self._num_begun += 1
        self._began = True
        self._emit(read, ToolCall(call.index, f"call_{uuid.uuid4().hex[:24]}", call.name))

    def _emit(self, read: Read, piece: ToolCall) -> None:
        if self._is_wanted(piece.index):
            read.calls.append(piece)

    def _is_wanted(self, index: int) -> bool:
        return self._max_calls is None or index < self._max_calls

    def _content(self, read: Read, text: str) -> None:
        """White space comes out with what follows it, and not at all before a call or between calls."""
        if text.strip():
            read.content += self._blank + text
            self._blank, self._began = "", True
        elif self._began and not self._num_begun:
            read.content += text
        else:
            self._blank += text


def overlap(text: str, marker: str) -> int:
    """The longest end of `text` that the marker begins with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
