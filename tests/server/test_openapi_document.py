"""/openapi.json describes the API as it is: every field, every status; schemathesis looks for what it does not say."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer
from scripted_engine import ScriptedEngine

from gear_server.app import create_app
from gear_server.settings import Settings

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "unsupported_method",
)  # fmt: skip


def document(engine: ScriptedEngine, **settings: Any) -> dict[str, Any]:
    openapi: dict[str, Any] = create_app(Settings(**settings), engine).openapi()
    return openapi


def test_schemathesis_finds_no_5xx_and_no_status_that_is_not_documented(engine: ScriptedEngine, tmp_path: Path) -> None:
    with LiveServer(lambda: create_app(Settings(), engine)).running() as server:
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
            "--phases", "fuzzing", "--generation-deterministic", "--max-examples", "20",
            "--checks", ",".join(CHECKS), "--no-color", "--output-truncate", "true",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr
    assert "Tested: 13" in result.stdout, "an operation was left out, or this number is to be raised"


def test_every_field_has_a_description_and_every_number_a_bound(engine: ScriptedEngine) -> None:
    schemas = document(engine)["components"]["schemas"]
    assert {"CompletionRequest", "ChatRequest", "ResponsesRequest", "MessagesRequest"} <= schemas.keys()
    for name, schema in schemas.items():
        for field, described in schema.get("properties", {}).items():
            assert described.get("description"), f"{name}.{field} says nothing"
            forms = described.get("anyOf", [described])
            for form in forms:
                if form.get("type") in ("integer", "number"):
                    assert form.keys() & {"minimum", "exclusiveMinimum"}, f"{name}.{field} has no lower bound"


def test_what_is_never_answered_is_not_documented(engine: ScriptedEngine) -> None:
    openapi = document(engine)
    for path, operations in openapi["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
    assert "HTTPValidationError" not in openapi["components"]["schemas"]


@pytest.mark.parametrize(("keys", "schemes"), [((), set()), (("a",), {"bearer", "header"})])
def test_keys_are_documented_where_they_are_asked_for(
    engine: ScriptedEngine, keys: tuple[str, ...], schemes: set[str]
) -> None:
    openapi = document(engine, api_key=keys)
    assert openapi["components"].get("securitySchemes", {}).keys() == schemes
