"""Who may call what: with API keys set, everything but the open routes wants one, as a bearer token or X-API-Key.

Plain ASGI middleware, so that unknown routes and the documentation are behind the key too.
"""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gear_server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # "/": the static page holds no data and asks for the key
OPEN_PREFIX = "/page/"  # its files


class RequireKey:
    def __init__(self, app: ASGIApp, api_keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]) or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        await error_response(_refusal(scope), scope)(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if not self._digests:
            return True
        given = _digest(_key_of(scope) or b"")
        # Digests have one length, and every key is compared: time tells nothing about any of them.
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def cache_salt(request: Request, salt: str, *, isolate_keys: bool) -> str:
    """What the prefix cache keeps apart: a request's own salt, and with `isolate_keys` who sent it."""
    if not isolate_keys:
        return salt
    return f"{_digest(_key_of(request.scope) or b'').hex()} {salt}"  # of one length: no salt imitates a key


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key_of(scope: Scope) -> bytes | None:
    """From Authorization: Bearer, as OpenAI's clients send it, or else X-API-Key, as Anthropic's do."""
    headers = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key")


def _refusal(scope: Scope) -> ApiError:
    message = (
        "no API key was sent: send the header Authorization: Bearer YOUR_KEY (or X-API-Key: YOUR_KEY)"
        if _key_of(scope) is None
        else "the API key is not one of this server's"
    )
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
