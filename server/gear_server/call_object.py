"""The JSON object of one tool call, read character by character: its name, and its arguments as they are written.

Knows JSON and the keys of a call; what stands around it is the reader's business (`tool_calls.py`).
"""

import json


class CallObject:
    """{"name": …, "arguments": {…}} read character by character; `arguments` of a named call are the object itself."""

    def __init__(self, arguments_key: str, name: str = "") -> None:
        self.name = name
        self.raw = ""
        self.ended = False
        self.announced = False
        self.index = 0
        self._whole = bool(name)
        self._keys = {"arguments", "parameters", arguments_key}
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None
        self._token = ""  # the key or value being read, as written
        self._reads_value = False
        self._streams = False  # the value is an object of arguments, given out as it comes
        self._arguments = ""  # not given out yet
        self._gave_any = False

    def feed(self, text: str) -> int:
        """How many characters of it belong to the object."""
        for i, char in enumerate(text):
            self.raw += char
            self._step(char)
            if self.ended:
                return i + 1
        return len(text)

    def take_arguments(self) -> str:
        """What has become known of them. An object is given out as it comes, text in quotes when it is whole."""
        if self.ended and not self._gave_any and not self._arguments:
            self._arguments = "{}"
        arguments, self._arguments = self._arguments, ""
        self._gave_any |= bool(arguments)
        return arguments

    def _step(self, char: str) -> None:
        if self._whole:
            self._arguments += char
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            self._keep(char)
            return
        closes_value = self._depth == 1 and self._reads_value and char in ",}"
        if closes_value:
            self._end_value()
        if char == '"':
            self._in_string = True
        if char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.ended = self._depth == 0
        if self._depth == 1 and char == ":" and not self._reads_value:
            self._key, self._token, self._reads_value = _text_of(self._token), "", True
        elif closes_value or len(self.raw) == 1:
            self._token = ""
        else:
            self._keep(char)

    def _keep(self, char: str) -> None:
        if self._reads_value and char == "{" and self._depth == 2 and not self._token.strip():
            self._streams = self._key in self._keys and not self._whole
        if not self._streams:
            self._token += char
        elif self._depth > 1 or char == "}":  # and not the white space after it
            self._arguments += char

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _text_of(self._token) or ""
        elif self._key in self._keys and not self._streams and not self._whole:
            self._arguments += _text_of(self._token) or ""  # a model that wrote its arguments as text
        self._key, self._token, self._reads_value, self._streams = None, "", False, False


def _text_of(token: str) -> str | None:
    """The text that a JSON string stands for; None for anything else."""
    try:
        value = json.loads(token)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
