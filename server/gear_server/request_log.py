"""Every request has an id, in X-Request-Id and in its line of the log; the caller's own if it is a decent one.

Plain ASGI middleware. Probes and scrapes are logged at debug level only, because they never end.
"""

import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gear_server.account import account_of

logger = logging.getLogger("gear_server.requests")

SCOPE_KEY = "gear_request_id"
TRACE_KEY = "gear_trace_id"  # set by tracing.py
_DECENT = re.compile(rb"[!-~]{1,128}")  # visible ASCII: it goes into a header and into logs
PROBES = frozenset({"/health", "/ready", "/metrics"})


class RequestLog:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        request_id = _request_id(scope)
        scope[SCOPE_KEY] = request_id.decode()
        status = 500  # unless an answer says otherwise

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            path = quote(scope["path"])  # no line breaks in a line of the log
            level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
            if logger.isEnabledFor(level):
                took_s = time.perf_counter() - began_s
                words = (scope["method"], path, status, took_s, scope[SCOPE_KEY])
                logger.log(level, "%s %s %d %.3f s %s", *words, extra={"fields": _fields(scope, status, took_s)})


def _fields(scope: Scope, status: int, took_s: float) -> dict[str, Any]:
    """Of the line in JSON."""
    fields = {
        "request_id": scope[SCOPE_KEY],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_s": round(took_s, 6),
    }
    if TRACE_KEY in scope:
        fields["trace_id"] = scope[TRACE_KEY]
    account = account_of(scope)
    if account is None:
        return fields
    fields |= {
        "response_id": account.response_id,
        "prompt_tokens": account.num_prompt_tokens,
        "completion_tokens": account.num_completion_tokens,
        "cached_tokens": account.num_cached_tokens,
        "finish_reasons": account.finish_reasons,
    }
    for name, at_s in (("queue_time_s", account.scheduled_s), ("first_token_s", account.first_token_s)):
        if at_s is not None:
            fields[name] = round(at_s - account.submitted_s, 6)
    return fields


def _request_id(scope: Scope) -> bytes:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given if _DECENT.fullmatch(given) else uuid.uuid4().hex.encode()
