"""Server-sent events, decoded as bytes arrive: only the `data` field, which is all that OpenAI's protocol uses.

Knows nothing of JSON.
"""


class EventDecoder:
    """Feed it bytes cut anywhere; it returns the data of the events that are complete."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def decode(self, received: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]

    def flush(self) -> list[bytes]:
        """What the stream ended with, should its last line lack a line end."""
        return self.decode(b"\n")
