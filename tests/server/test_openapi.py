"""The description of the API says of every field what it means and what it may be."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

OURS = ("ChatRequest", "CompletionRequest")


def fields(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of every body that the two routes take, with its place."""
    schemas = document["components"]["schemas"]
    names, seen = list(OURS), set[str]()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for field, schema in schemas[name].get("properties", {}).items():
            yield f"{name}.{field}", schema
            names += references(schema)


def references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else []
        return own + [name for value in schema.values() for name in references(value)]
    return [name for value in schema for name in references(value)] if isinstance(schema, list) else []


def types(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a field."""
    for one in schema.get("anyOf", [schema]):
        yield one
        if one.get("type") == "array" and isinstance(one.get("items"), dict):
            yield from types(one["items"])


def test_every_field_is_described(app: FastAPI) -> None:
    nameless = [place for place, schema in fields(app.openapi()) if not schema.get("description")]
    assert not nameless


def test_every_number_that_is_asked_for_has_bounds(app: FastAPI) -> None:
    tokens = ("prompt", "stop_token_ids", "logit_bias")  # ids: bounded by the vocabulary, which the model knows
    bounds = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
    unbounded = [
        place
        for place, schema in fields(app.openapi())
        for one in types(schema)
        if one.get("type") in ("integer", "number") and not place.endswith(tokens)
        if not all(bound & one.keys() for bound in bounds)
    ]
    assert not unbounded


def test_the_routes_say_which_bodies_they_take(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    for path, name in (("/v1/completions", "CompletionRequest"), ("/v1/chat/completions", "ChatRequest")):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
