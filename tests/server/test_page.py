"""The page at /: its files arrive with the right headers, without a key, and nothing else does."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from live_server import LiveServer
from scripted_engine import ScriptedEngine

from gear_server.app import create_app
from gear_server.page_routes import FOLDER
from gear_server.settings import Settings

FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())


async def test_the_root_is_the_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text.startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("vendor/marked.esm.js", "text/javascript; charset=utf-8"),
        ("vendor/uPlot.min.css", "text/css; charset=utf-8"),
        ("vendor/purify.LICENSE", "text/plain; charset=utf-8"),
    ],
)
async def test_files_carry_their_types(client: httpx.AsyncClient, name: str, kind: str) -> None:
    assert (await client.get(f"/page/{name}")).headers["content-type"] == kind


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
async def test_every_file_is_fenced_and_kept_until_it_changes(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    for tag in (response.headers["etag"], f'"other", W/{response.headers["etag"]}', "*"):
        again = await client.get(path, headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == response.headers["etag"]
    assert (await client.get(path, headers={"If-None-Match": '"other"'})).status_code == 200


async def test_what_is_not_a_file_of_the_page_is_a_404(client: httpx.AsyncClient) -> None:
    for name in ("", "none.js", "vendor", "%2e%2e/app.py", "vendor%2f..%2fapp.js", "/etc/passwd", "a%00"):
        response = await client.get(f"/page/{name}")
        assert response.status_code == 404, name
        assert response.json()["error"]["message"].startswith("there is no /page/")
    assert (await client.post("/")).status_code == 405


def test_head_answers_with_the_length_and_no_body(app: FastAPI) -> None:
    with LiveServer(lambda: app).running() as server:
        whole, head = httpx.get(server.url), httpx.head(server.url)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-length"] == str(len(whole.content))
        assert head.headers["etag"] == whole.headers["etag"]


async def test_files_need_no_key_and_what_they_ask_does(locked: httpx.AsyncClient) -> None:
    for path in ("/", "/page/app.js", "/page/vendor/purify.min.js"):
        assert (await locked.get(path)).status_code == 200
    for path in ("/metrics", "/v1/models", "/page", "/pages/app.js"):
        assert (await locked.get(path)).status_code == 401


@pytest.fixture
async def locked(engine: ScriptedEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(api_key=("key",)), engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


def test_addresses_are_relative_and_lead_to_files() -> None:
    html = (FOLDER / "index.html").read_text()
    addresses = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert len(addresses) > 5
    assert all(address == "docs" or address.removeprefix("page/") in FILES for address in addresses)
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", html)
    for module in FOLDER.glob("*.js"):
        for address in re.findall(r'from "([^"]+)"', module.read_text()):
            assert (module.parent / address).is_file(), f"{module.name} imports {address}"
        assert not re.search(r"""(?:request|fetch)\(["'`]/""", module.read_text())


def test_vendored_files_name_their_version_and_licence() -> None:
    table = (FOLDER / "vendor" / "README.md").read_text()
    scripts = [path for path in (FOLDER / "vendor").iterdir() if path.suffix in (".js", ".css")]
    assert len(scripts) == 4
    for script in scripts:
        assert f"`{script.name}`" in table
        assert Path(script.parent, f"{script.name.split('.')[0]}.LICENSE").is_file()
