"""The server under test: its base URL and how far away it is.

Knows no aiohttp; nothing here touches the network.
"""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from gear_loadtest.errors import UsageError

_EXAMPLE = "give a base such as http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Target:
    base_url: str  # no trailing slash, no /v1
    is_loopback: bool
    is_encrypted: bool

    def url(self, path: str) -> str:
        return self.base_url + path


def parse_target(url: str) -> Target:
    """Accepts a base with or without a trailing `/v1`. Raises `UsageError`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # .port raises for what is not a port
    except ValueError as error:
        raise UsageError(f"cannot read the URL {url!r} ({error}): {_EXAMPLE}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"the URL {url!r} is not http:// or https:// with a host: {_EXAMPLE}")
    if "@" in parts.netloc:  # it would end up in the report
        raise UsageError("the URL holds a user name or password: set GEAR_API_KEY in the environment instead")
    if parts.query or parts.fragment:
        raise UsageError(f"the URL {url!r} has a query or fragment: {_EXAMPLE}")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return Target(f"{parts.scheme}://{parts.netloc}{path}", _is_loopback(host), parts.scheme == "https")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
