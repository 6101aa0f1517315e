"""One streamed completion over HTTP, written down in its record.

Knows neither when requests start nor what their latencies mean.
"""

import os
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import aiohttp
import orjson

from gear_loadtest.event_decoder import EventDecoder
from gear_loadtest.record import Failure, RequestRecord

_MAX_ERROR_BYTES = 65536
_MAX_MESSAGE_LEN = 300


class StreamFailed(Exception):
    """The server answered 200 and then not what it promised."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(kind, message)


def open_session(timeout_s: float) -> aiohttp.ClientSession:
    """As many connections as there are requests: a limit here would be a queue that no server made."""
    key = os.environ.get("GEAR_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3),  # before uvicorn closes at 5 s, under a request
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers={"Authorization": f"Bearer {key}"} if key else None,
    )


def completion_body(model: str, prompt: str, output_len: int) -> bytes:
    return orjson.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_len,
            "ignore_eos": True,  # vLLM's extension and ours: the answer has exactly max_tokens
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


async def stream_completion(session: aiohttp.ClientSession, url: str, body: bytes, record: RequestRecord) -> None:
    """Send now and fill `record` until the stream ends. Failures are written down, not raised."""
    record.sent_at = perf_counter()
    try:
        # A redirect would carry the load, and the key, to a server that nobody named.
        async with session.post(
            url, data=body, headers={"Content-Type": "application/json"}, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise StreamFailed(f"http_{response.status}", await error_message(response))
            await _read_events(response, record)
    except StreamFailed as error:
        record.failure = error.failure
    except TimeoutError:
        record.failure = Failure("timeout", f"no complete answer within {session.timeout.total:g} s (--timeout-s)")
    except aiohttp.ClientConnectorError as error:
        record.failure = Failure("connect", printable(str(error)))
    except (aiohttp.ClientError, OSError) as error:
        name = type(error).__name__
        record.failure = Failure("disconnected", f"the connection broke after {record.num_chunks} chunks ({name})")


async def _read_events(response: aiohttp.ClientResponse, record: RequestRecord) -> None:
    """Read to the end; a stream is complete with a finish reason and `[DONE]`."""
    decoder = EventDecoder()
    done = False
    async for received in response.content.iter_any():
        now = perf_counter()
        for data in decoder.decode(received):
            done = _take(data, now, record) or done
    for data in decoder.flush():
        done = _take(data, perf_counter(), record) or done
    if record.finish_reason in ("abort", "error"):
        raise StreamFailed("aborted", f'the answer ended with finish_reason "{record.finish_reason}"')
    if record.finish_reason is None or not done:
        missing = "finish reason" if record.finish_reason is None else "[DONE]"
        raise StreamFailed("truncated", f"the stream ended after {record.num_chunks} chunks without {missing}")


def _take(data: bytes, now: float, record: RequestRecord) -> bool:
    """Note one event, received at `now`; true for `[DONE]`. Raises `StreamFailed`."""
    if data == b"[DONE]":
        return True
    try:
        event = orjson.loads(data)
        if error := event.get("error"):
            raise StreamFailed("error_event", _error_text(error))
        if usage := event.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens")
            record.completion_tokens = usage.get("completion_tokens")
        for choice in event.get("choices") or ():
            if text := choice.get("text"):
                record.chunk_times.append(now)
                if record.text is not None:
                    record.text.append(text)
            if reason := choice.get("finish_reason"):
                record.finish_reason = reason
                record.finished_at = now
    except (ValueError, TypeError, AttributeError):
        raise StreamFailed("bad_event", f"not a completion chunk: {printable(data.decode(errors='replace'))}") from None
    return False


async def error_message(response: aiohttp.ClientResponse) -> str:
    """The message in the body of an error, in OpenAI's shape or any other."""
    body = await response.content.read(_MAX_ERROR_BYTES)
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return printable(body.decode(errors="replace")) or (response.reason or "")
    if isinstance(answer, Mapping):
        answer = answer.get("error") or answer.get("message") or answer.get("detail") or answer
    return _error_text(answer)


def _error_text(error: Any) -> str:
    message = error.get("message", error) if isinstance(error, Mapping) else error
    return printable(str(message))


def printable(text: str) -> str:
    """One line for the terminal: what a server sends may hold anything, escape sequences too."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _MAX_MESSAGE_LEN else line[: _MAX_MESSAGE_LEN - 1] + "…"
