"""The application: routes, middleware and error handlers around one engine.

Brought an engine, it starts and stops nothing; `serving.py` does.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gear_engine.protocol import EngineDead, QueueFull, RequestError
from gear_server import version
from gear_server.api_document import document
from gear_server.auth import RequireKey
from gear_server.chat import chat_routes
from gear_server.chat_template import load_chat_template
from gear_server.completions import completion_routes
from gear_server.context import Context, Engine
from gear_server.disconnect import ClientGone
from gear_server.errors import ApiError, GenerationFailed, describe, error_response, to_api_error
from gear_server.messages import message_routes
from gear_server.metrics import Metrics
from gear_server.model_routes import model_routes
from gear_server.page_routes import page_routes
from gear_server.request_log import SCOPE_KEY, RequestLog
from gear_server.responses import response_routes
from gear_server.settings import Settings
from gear_server.status_routes import moved_routes, operator_routes, status_routes
from gear_server.tokenize_routes import tokenize_routes
from gear_server.tokenizer import TextTokenizer
from gear_server.tracing import Trace
from gear_server.traffic import CountTraffic, Traffic
from gear_server.unsupported import unserved

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})


def create_context(settings: Settings, engine: Engine) -> Context:
    """Around a started engine. Raises `TokenizerError` if the model's files cannot be used."""
    folder = Path(engine.info.model_path)
    tokenizer = TextTokenizer(folder)
    metrics = Metrics(settings.model_names[0], engine.info, lambda: engine.stats, lambda: engine.is_alive)
    engine.add_listener(metrics.on_step)
    return Context(
        settings=settings,
        engine=engine,
        tokenizer=tokenizer,
        template=load_chat_template(folder, tokenizer.config, tokenizer.special_tokens),
        metrics=metrics,
        traffic=Traffic(),
    )


def create_app(settings: Settings, engine: Engine, tracer_provider: "TracerProvider | None" = None) -> FastAPI:
    """`app.state.context` is what serves it."""
    context = create_context(settings, engine)
    model = settings.model_names[0]
    tracing = [] if tracer_provider is None else [Middleware(Trace, provider=tracer_provider, model=model)]
    app = FastAPI(
        title="GearServe",
        version=version(),
        description="LLM inference from a compressed KV cache, with OpenAI's API and Anthropic's.",
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(CountTraffic, traffic=context.traffic),
            Middleware(RequestLog),
            *tracing,
            Middleware(RequireKey, api_keys=settings.api_key),
        ],
    )
    app.state.context = context
    for routes in (
        completion_routes,
        chat_routes,
        response_routes,
        message_routes,
        tokenize_routes,
        model_routes,
        status_routes,
    ):
        app.include_router(routes(context))
    app.include_router(moved_routes() if settings.metrics_port is not None else operator_routes(context))
    app.include_router(page_routes())
    document(app, with_keys=bool(settings.api_key))
    _handle_errors(app, context)
    return app


def create_metrics_app(context: Context) -> FastAPI:
    """What the metrics port serves, to whoever reaches it: no keys, no lines in the log."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.include_router(operator_routes(context))
    app.include_router(status_routes(context))
    _handle_errors(app, context)
    return app


def _handle_errors(app: FastAPI, context: Context) -> None:
    def refuse(request: Request, error: ApiError) -> Response:
        generating = request.method == "POST" and request.scope["path"] in GENERATING_PATHS
        if generating and not isinstance(error, GenerationFailed):
            context.metrics.count("rejected")
        return error_response(error, request.scope)

    async def on_error(request: Request, error: Exception) -> Response:
        return refuse(request, to_api_error(error))

    async def on_invalid_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = describe(error.errors()[0])
        return refuse(request, ApiError(400, message, param=param))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"]
        if error.status_code == 404 and (what := unserved(path)) is not None:
            message = f"{what} are not served here: this server generates text (/docs lists its routes)"
            return error_response(ApiError(404, message, code="not_supported"), request.scope)
        known = {404: f"there is no {path}", 405: f"{path} does not take {request.method}"}
        text = known.get(error.status_code, str(error.detail))
        headers = dict(error.headers) if error.headers else None
        return error_response(ApiError(error.status_code, text, headers=headers), request.scope)

    async def on_client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; logs know the number from nginx

    async def on_bug(request: Request, error: Exception) -> Response:
        request_id = request.scope.get(SCOPE_KEY, "")
        message = f"internal error: the server's log has the reason (X-Request-Id {request_id})"
        return error_response(ApiError(500, message, headers={"X-Request-Id": request_id}), request.scope)

    for kind in (ApiError, RequestError, QueueFull, EngineDead):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
