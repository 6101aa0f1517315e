"""docs/api.md says of every parameter what the code does with it: supported, refused, or accepted without effect."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from gear_server import unsupported
from gear_server.anthropic_types import MessagesRequest
from gear_server.openai_types import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gear_server.responses_types import ResponsesRequest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def column(section: str, name: str) -> dict[str, str]:
    """What a section's table says under `name` of each parameter that has something there."""
    text = DOCUMENT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = rows
    found = {}
    for row in rows:
        parameter = re.fullmatch(r"`(\w+)`", row[0])
        assert parameter, row
        if row[head.index(name)]:
            found[parameter[1]] = row[head.index(name)]
    return found


@pytest.mark.parametrize(
    ("section", "name", "body", "refused"),
    [
        ("Completions and chat", "completions", CompletionRequest, unsupported.COMPLETIONS),
        ("Completions and chat", "chat", ChatRequest, unsupported.CHAT),
        ("Responses", "here", ResponsesRequest, unsupported.RESPONSES),
        ("Messages", "here", MessagesRequest, unsupported.MESSAGES),
        ("Tokens", "tokenize", TokenizeRequest, {}),
        ("Tokens", "detokenize", DetokenizeRequest, {}),
    ],
)
def test_the_table_says_what_the_code_does(
    section: str, name: str, body: type[BaseModel], refused: Mapping[str, tuple[Any, ...]]
) -> None:
    said = column(section, name)
    assert set(said.values()) <= {"✓", "✗", "○"}
    taken = {field.alias or field_name for field_name, field in body.model_fields.items()}
    assert {parameter for parameter, mark in said.items() if mark == "✗"} == set(refused)
    assert {parameter for parameter, mark in said.items() if mark != "✗"} == taken
    idle = {
        field_name for field_name, field in body.model_fields.items() if "not used" in (field.description or "")
    } | ({"store", "truncation"} & taken)
    assert {parameter for parameter, mark in said.items() if mark == "○"} == idle
