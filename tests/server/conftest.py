"""A small model on disk, an engine that follows a script, and a client on the application around them."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from scripted_engine import ScriptedEngine
from small_tokenizers import byte_level, write_model

from gear_server.app import create_app
from gear_server.settings import Settings


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small", byte_level())


@pytest.fixture
def engine(model_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(model_folder)


@pytest.fixture
def settings() -> Settings:
    return Settings(served_model_name=("small", "alias"))


@pytest.fixture
def app(settings: Settings, engine: ScriptedEngine) -> FastAPI:
    return create_app(settings, engine)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Raises what the application raises: a 500 for bad input fails the test."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
