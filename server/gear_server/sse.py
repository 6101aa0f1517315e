"""Server-sent events: the bytes of an event, and the response that streams a generation.

A started stream cannot change its status, so a failure in it is one last event with the error, and no [DONE].
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gear_server.disconnect import ClientGone, unless_disconnected
from gear_server.errors import ApiError, GenerationFailed
from gear_server.generate import Delta, Generation

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect events
}

Chunk = dict[str, Any]


def event(data: Chunk) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def named_event(data: Chunk) -> bytes:
    """Named after its `type`, as OpenAI's responses and Anthropic's messages have them."""
    return b"event: " + data["type"].encode() + b"\n" + event(data)


class Events(Protocol):
    """What one API says while an answer grows, as bytes; none says nothing."""

    def opening(self) -> bytes: ...

    def of(self, deltas: list[Delta]) -> bytes: ...

    def ending(self) -> bytes: ...

    def failure(self, error: ApiError) -> bytes: ...


class ChunkEvents:
    """Chunks of completions and chat, without names and with [DONE]."""

    def __init__(self, to_chunks: Callable[[Delta], Iterable[Chunk]], last_chunk: Callable[[], Chunk] | None) -> None:
        self._to_chunks = to_chunks
        self._last_chunk = last_chunk

    def opening(self) -> bytes:
        return b""

    def of(self, deltas: list[Delta]) -> bytes:
        return b"".join(event(chunk) for delta in deltas for chunk in self._to_chunks(delta))

    def ending(self) -> bytes:
        return DONE if self._last_chunk is None else event(self._last_chunk()) + DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body)


class EventStream(Response):
    """Owns its generation: whatever ends the response ends the generation too."""

    def __init__(self, generation: Generation, events: Events) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await unless_disconnected(receive, self._send_events(send))
        except ClientGone:
            pass  # nobody is there to be told
        finally:
            self._generation.close()

    async def _send_events(self, send: Send) -> None:
        events = self._events
        if opening := events.opening():
            await send({"type": "http.response.body", "body": opening, "more_body": True})
        try:
            while (deltas := await self._generation.next_deltas()) is not None:
                if body := events.of(deltas):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            end = events.ending()
        except GenerationFailed as failure:
            end = events.failure(failure)
        await send({"type": "http.response.body", "body": end})
