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

    def check_alive() -> None:
        if not context.engine.is_alive:
            raise ApiError(503, "the engine process has ended: restart the server", code="engine_dead")

    @router.get("/health", summary="Is the engine alive?", responses=errors(503))
    async def health() -> Response:
        check_alive()
        return json_response({"status": "ok"})

    @router.get("/ready", summary="Does it take new requests?", responses=errors(503))
    async def ready() -> Response:
        check_alive()
        context.traffic.refuse_if_draining()
        return json_response({"status": "ok"})

    @router.get("/version", summary="The version that runs", responses=errors(401))
    async def get_version() -> Response:
        return json_response({"version": version()})

    @router.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse, responses=errors(401))
    async def metrics(request: Request) -> Response:
        content, content_type = context.metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    return router
