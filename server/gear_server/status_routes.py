"""What operators and their tools ask: is it alive, is it ready, what does it measure, which version is it.

/health is about the engine; /ready also says no while the server drains.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from gear_server import version
from gear_server.api_document import errors
from gear_server.context import Context
from gear_server.errors import ApiError
from gear_server.respond import json_response


def status_routes(context: Context) -> APIRouter:
    router = APIRouter(tags=["Status"])

    @router.get("/ready", summary="Does it take new requests?", responses=errors(503))
    async def ready() -> Response:
        _check_alive(context)
        context.traffic.refuse_if_draining()
        return json_response({"status": "ok"})

    @router.get("/version", summary="The version that runs", responses=errors(401))
    async def get_version() -> Response:
        return json_response({"version": version()})

    return router


def operator_routes(context: Context) -> APIRouter:
    """On the public port, or on the metrics port if there is one."""
    router = APIRouter(tags=["Status"])

    @router.get("/health", summary="Is the engine alive?", responses=errors(503))
    async def health() -> Response:
        _check_alive(context)
        return json_response({"status": "ok"})

    @router.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse, responses=errors(401))
    async def metrics(request: Request) -> Response:
        content, content_type = context.metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    return router


def moved_routes() -> APIRouter:
    """In their place on the public port."""
    router = APIRouter()

    @router.get("/health", include_in_schema=False)
    @router.get("/metrics", include_in_schema=False)
    async def moved(request: Request) -> Response:
        raise ApiError(404, f"{request.scope['path']} is on the metrics port (--metrics-port), not on this one")

    return router


def _check_alive(context: Context) -> None:
    if not context.engine.is_alive:
        raise ApiError(503, "the engine process has ended: restart the server", code="engine_dead")
