"""Every refusal in the OpenAI shape, {"error": {"message", "type", "param", "code"}}; to Anthropic's clients in theirs.

    ApiError            has a status
    ├── Draining        503: the server is shutting down
    └── GenerationFailed    the request had been accepted: not a refusal

The engine's exceptions become ApiErrors here, and so do bodies that pydantic refuses.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Scope

from gear_engine.protocol import EngineDead, PromptTooLong, QueueFull, RequestError

_TYPE_OF_STATUS = {429: "rate_limit_error", 500: "internal_error", 503: "service_unavailable"}
_ANTHROPIC_TYPE_OF_STATUS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
ANTHROPIC_PREFIX = "/v1/messages"


class ApiError(Exception):
    """Answered with `status`; without a status of its own an error is the caller's fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPE_OF_STATUS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        kind = _ANTHROPIC_TYPE_OF_STATUS.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


class Draining(ApiError):
    """The server finishes what it has and takes nothing new."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down: send the request to another one", code="draining")


class GenerationFailed(ApiError):
    """The request was accepted and could not be finished."""


def to_api_error(error: Exception) -> ApiError:
    """What the engine raised, as an answer."""
    match error:
        case ApiError():
            return error
        case PromptTooLong():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), param=error.param)
        case QueueFull():
            wait = {"Retry-After": str(error.retry_after_s)}
            return ApiError(429, str(error), code="queue_full", headers=wait)
        case EngineDead():
            return ApiError(503, str(error), code="engine_dead")
    raise TypeError(f"not an error of a request: {error!r}")


def describe(error: Any) -> tuple[str, str | None]:
    """One of pydantic's errors as a sentence that names the parameter, and the parameter."""
    steps = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
    path = tuple(step for step in steps if not str(step).startswith("<"))  # <text>: which of several kinds it is
    name, kind, context = _path_text(path), error["type"], error.get("ctx", {})
    raised = context.get("error")
    if isinstance(raised, RequestError):
        nested = name is not None and raised.param is not None and name != raised.param
        return str(raised), f"{name}.{raised.param}" if nested else raised.param or name
    if kind == "json_invalid":
        return f"the body is not valid JSON (which has no NaN or Infinity): {raised}", None
    if name is None:
        if kind == "missing":
            return "the body is missing: send a JSON object", None
        return "the body must be a JSON object", None
    if kind == "missing":
        return f"{name} is required", name
    if kind == "extra_forbidden":
        return f"{name} is not known", name
    text = error["msg"].removeprefix("Value error, ")
    if text.startswith("Input should be "):
        return f"{name} must be {text.removeprefix('Input should be ')}{_got(error.get('input'))}", name
    return f"{name}: {text}", name


def _path_text(path: tuple[int | str, ...]) -> str | None:
    """("messages", 0, "content") is messages[0].content."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or None


def _got(value: Any) -> str:
    """Short values only: a body may hold megabytes."""
    if isinstance(value, str):
        return f", got {value[:40]!r}{'…' if len(value) > 40 else ''}"
    if isinstance(value, bool | int | float):
        return f", got {value!r:.40}"
    return ""


def error_response(error: ApiError, scope: Scope) -> Response:
    """In the shape of the API that was called."""
    body = error.anthropic_body if scope["path"].startswith(ANTHROPIC_PREFIX) else error.body
    return Response(orjson.dumps(body), error.status, error.headers, media_type="application/json")


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """For a body that was translated to another one: errors name the field that the caller sent."""
    try:
        yield
    except ValidationError as error:
        message, param = describe(error.errors()[0])
        raise RequestError(message, names.get(param or "", param)) from error
    except RequestError as error:
        error.param = names.get(error.param or "", error.param)
        raise
