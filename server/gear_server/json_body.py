"""Reads a request's body: JSON only, of bounded size, parsed by orjson (which knows no NaN and no Infinity).

A route class for FastAPI, so that models and their documentation stay FastAPI's business.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from gear_server.errors import ApiError

MAX_BODY_BYTES = 32 * 1024 * 1024


class JsonRequest(Request):
    _content: bytes | None = None

    async def body(self) -> bytes:
        """Raises 413 or 415. A browser on another site cannot send this content type without being asked first."""
        if self._content is None:
            if not _is_json(self.headers.get("content-type", "")):
                raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
            self._content = await self._read()
        return self._content

    async def json(self) -> Any:
        return orjson.loads(await self.body())

    async def _read(self) -> bytes:
        announced = self.headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > MAX_BODY_BYTES):
            raise _too_large()
        content = bytearray()
        async for piece in self.stream():
            content += piece
            if len(content) > MAX_BODY_BYTES:
                raise _too_large()
        return bytes(content)


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            json_request = JsonRequest(request.scope, request.receive)
            await json_request.body()  # refused here, where no handler of FastAPI rewrites the reason
            return await handle(json_request)

        return read_and_handle


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB")
