"""Fields and routes that other servers know and this one does not: refused by name.

Ignoring such a field would change the answer. Each comes with the values that ask for nothing and are therefore fine.
"""

from collections.abc import Mapping
from typing import Any

from gear_engine.protocol import RequestError

_OFF: tuple[Any, ...] = (False,)
_EMPTY: tuple[Any, ...] = ([], {}, "")

BOTH: dict[str, tuple[Any, ...]] = {
    "guided_whitespace_pattern": (),
    "use_beam_search": _OFF,
    "length_penalty": (1, 1.0),
    "bad_words": _EMPTY,
    "allowed_token_ids": (),
    "logits_processors": _EMPTY,
    "lora_request": (),
}
STRUCTURED_OUTPUTS: dict[str, tuple[Any, ...]] = {
    "structural_tag": (),
    "whitespace_pattern": (),
    "disable_any_whitespace": _OFF,
    "disable_additional_properties": _OFF,
}
COMPLETIONS = BOTH | {
    "suffix": _EMPTY,
    "prompt_embeds": (),
}
CHAT = BOTH | {
    "functions": _EMPTY,
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "documents": _EMPTY,
    "chat_template": (),
    "echo": _OFF,
}
MESSAGE: dict[str, tuple[Any, ...]] = {"function_call": (), "audio": ()}

MESSAGES: dict[str, tuple[Any, ...]] = {"mcp_servers": _EMPTY, "container": ()}  # Anthropic's
RESPONSES: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (),  # nothing is kept here: the caller sends the conversation
    "conversation": (),
    "background": _OFF,
    "prompt": (),
    "include": ([], ["reasoning.encrypted_content"]),
    "top_logprobs": (0,),
}

ROUTES = {
    "/v1/embeddings": "embeddings",
    "/v1/images": "images",
    "/v1/audio": "audio",
    "/v1/videos": "videos",
    "/v1/realtime": "realtime sessions",
    "/v1/moderations": "moderations",
    "/v1/files": "files",
    "/v1/uploads": "uploads",
    "/v1/batches": "batches",
    "/v1/messages/batches": "batches",
    "/v1/fine_tuning": "fine-tuning jobs",
    "/v1/vector_stores": "vector stores",
    "/v1/containers": "containers",
    "/v1/evals": "evals",
    "/v1/assistants": "assistants",
    "/v1/threads": "threads",
    "/v1/conversations": "conversations",
    "/v1/responses/": "stored responses",
    "/v1/complete": "Anthropic's text completions",
    "/v1/rerank": "rankings",
    "/v2/rerank": "rankings",
    "/rerank": "rankings",
    "/v1/score": "scores",
    "/score": "scores",
    "/pooling": "poolings",
    "/classify": "classifications",
}


def unserved(path: str) -> str | None:
    """What a route of another server's would give."""
    named = (what for route, what in ROUTES.items() if path == route or path.startswith(f"{route.rstrip('/')}/"))
    return next(named, None)


def refuse_unsupported(fields: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise `RequestError` for the first that asks for something; null asks for nothing."""
    for name, harmless in unsupported.items():
        value = fields.get(name)
        if value is not None and not any(_same(value, fine) for fine in harmless):
            raise RequestError(f"{name} is not supported yet: leave it out", name)


def _same(value: Any, fine: Any) -> bool:
    """In JSON 0 is not false, though in Python they are equal: logprobs=0 asks for something."""
    return type(value) is type(fine) and value == fine
