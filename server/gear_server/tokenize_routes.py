"""POST /tokenize and /detokenize, as vLLM has them: how many tokens a prompt has, and what ids say.

Special tokens are part of both directions, so that a round trip shows what the model sees.
"""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from gear_engine.protocol import RequestError
from gear_server.api_document import errors
from gear_server.context import Context
from gear_server.encoding import encode_chat
from gear_server.json_body import JsonRoute
from gear_server.openai_types import DetokenizeRequest, TokenizeRequest
from gear_server.respond import json_response, log_unknown, resolve_model

READING = errors(400, 401, 404, 413, 415)


def tokenize_routes(context: Context) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["Tokens"])

    @router.post("/tokenize", summary="Encode a text or a conversation", responses=READING)
    async def tokenize(body: TokenizeRequest) -> Response:
        resolve_model(context, body.model)
        log_unknown(body)
        tokens = await asyncio.to_thread(_encode, context, body)
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": context.engine.info.max_model_len,
                "tokens": tokens,
                "token_strs": [context.tokenizer.token_text(token) for token in tokens]
                if body.return_token_strs
                else None,
            }
        )

    @router.post("/detokenize", summary="Decode token ids", responses=READING)
    async def detokenize(body: DetokenizeRequest) -> Response:
        resolve_model(context, body.model)
        log_unknown(body)
        return json_response({"prompt": await asyncio.to_thread(_decode, context, body.tokens)})

    return router


def _encode(context: Context, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return encode_chat(context, body, body.messages)
    assert body.prompt is not None, "the model checks that one of the two is there"
    add_special_tokens = body.add_special_tokens is not False
    return context.tokenizer.encode(body.prompt, add_special_tokens=add_special_tokens)


def _decode(context: Context, token_ids: list[int]) -> str:
    for token_id in token_ids:
        if not context.tokenizer.has_token(token_id):
            raise RequestError(f"token id {token_id} is not in the tokenizer's vocabulary", "tokens")
    return context.tokenizer.decode(token_ids, skip_special_tokens=False)
