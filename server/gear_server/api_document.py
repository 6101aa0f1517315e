"""What /openapi.json says beyond the bodies of requests: which statuses a route answers with, errors, and keys.

FastAPI documents a 422 that this server never sends; it is taken out here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    message: str = Field(description="One sentence that names the parameter and the remedy.")
    type: str = Field(description="invalid_request_error, rate_limit_error, internal_error or service_unavailable.")
    param: str | None = Field(description="The parameter at fault.")
    code: str | None = Field(description="For programs: model_not_found, context_length_exceeded, queue_full …")


class Error(BaseModel):
    """OpenAI's shape."""

    error: ErrorDetail = Field(description="What went wrong.")


class AnthropicErrorDetail(BaseModel):
    type: str = Field(description="invalid_request_error, rate_limit_error, api_error, overloaded_error …")
    message: str = Field(description="One sentence that names the parameter and the remedy.")


class AnthropicError(BaseModel):
    """Anthropic's shape."""

    type: str = Field(description="Always error.")
    error: AnthropicErrorDetail = Field(description="What went wrong.")


_MEANINGS = {
    400: "The request cannot be served as it is.",
    401: "No API key, or not one of this server's.",
    404: "The model is not served here.",
    413: "The body is too large.",
    415: "The body is not announced as JSON.",
    429: "Too many requests wait: try again after Retry-After.",
    500: "The engine could not finish this answer.",
    503: "The engine has ended, or the server is shutting down.",
}
Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int, shape: type[BaseModel] = Error) -> Responses:
    return {status: {"model": shape, "description": _MEANINGS[status]} for status in statuses}


def generating(shape: type[BaseModel] = Error) -> Responses:
    """Of a route that generates, whole or as a stream."""
    whole = {"schema": {"type": "object"}}
    content: dict[str, Any] = {"application/json": whole, "text/event-stream": {}}
    answer = {"description": "The answer, as server-sent events if stream is true.", "content": content}
    return {200: answer, **errors(400, 401, 404, 413, 415, 429, 500, 503, shape=shape)}


def document(app: FastAPI, *, with_keys: bool) -> None:
    """Let `app` describe itself as it is."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes, tags=None
            )
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            if with_keys:
                schema["components"]["securitySchemes"] = {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                }
                schema["security"] = [{"bearer": []}, {"header": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
