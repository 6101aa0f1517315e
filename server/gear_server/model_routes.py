"""GET /v1/models: the names that requests may use.

One model is served; each of its names is an entry.
"""

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from gear_server.api_document import errors
from gear_server.context import Context
from gear_server.respond import json_response, resolve_model


def model_routes(context: Context) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "gearserve",
            "root": name,
            "parent": None,
            "max_model_len": context.engine.info.max_model_len,
        }

    @router.get("/v1/models", summary="The served models", responses=errors(401))
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [card(name) for name in context.model_names]})

    @router.get("/v1/models/{model:path}", summary="One served model", responses=errors(401, 404))
    async def get_model(model: str) -> Response:
        return json_response(card(resolve_model(context, model)))

    return router
