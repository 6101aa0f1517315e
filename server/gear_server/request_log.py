"""Every request has an id, in X-Request-Id and in its line of the log; the caller's own if it is a decent one.

Plain ASGI middleware. Probes and scrapes are logged at debug level only, because they never end.
"""

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("gear_server.requests")

SCOPE_KEY = "gear_request_id"
_DECENT = re.compile(rb"[!-~]{1,128}")  # visible ASCII: it goes into a header and into logs
_PROBES = frozenset({"/health", "/ready", "/metrics"})


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
            level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
            took_s = time.perf_counter() - began_s
            logger.log(level, "%s %s %d %.3f s %s", scope["method"], path, status, took_s, scope[SCOPE_KEY])


def _request_id(scope: Scope) -> bytes:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given if _DECENT.fullmatch(given) else uuid.uuid4().hex.encode()
