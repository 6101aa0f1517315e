"""The page at /: a chat and what the server measures while it answers, as static files of this package.

Knows files and headers only. Everything that the page shows comes through the same routes that clients use, and
needs a key where they do; the files hold no data and are open.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gear_server.errors import ApiError

FOLDER = Path(__file__).parent / "page"

# Not the host's table, which may call a script text/plain: a browser refuses to run such a module.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PLAIN = "text/plain; charset=utf-8"  # licences

# Answers are untrusted text. The sanitiser is the first fence, this is the second: no script, style, image, frame or
# connection from elsewhere, and HTML reaches the document through DOMPurify alone.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # keep it, but ask: after an update nobody sees half of the old page
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    headers: dict[str, str]

    def answer(self, request: Request) -> Response:
        if _matches(request.headers.get("if-none-match", ""), self.headers["ETag"]):
            kept = {name: value for name, value in self.headers.items() if name != "Content-Type"}
            return Response(status_code=304, headers=kept)
        return Response(self.content, headers=self.headers)


def page_routes() -> APIRouter:
    """Files are read once: whatever a request asks for is looked up among their names, never on the disk."""
    router = APIRouter(include_in_schema=False)
    files = {path.relative_to(FOLDER).as_posix(): _read(path) for path in FOLDER.rglob("*") if path.is_file()}

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return files["index.html"].answer(request)

    @router.api_route("/page/{name:path}", methods=["GET", "HEAD"])
    async def page_file(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, f"there is no {request.scope['path']}")
        return files[name].answer(request)

    return router


def _read(path: Path) -> _File:
    content = path.read_bytes()
    headers = HEADERS | {
        "Content-Type": _TYPES.get(path.suffix, _PLAIN),
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }
    return _File(content, headers)


def _matches(if_none_match: str, etag: str) -> bool:
    """Weak comparison (RFC 9110, 13.1.2): proxies that compress mark the tag with W/."""
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in (etag, "*") for tag in tags)
