"""What is in flight and whether more may come: the drain of a server that was asked to stop.

Counts HTTP requests as ASGI middleware, from the first byte of the head to the last of the answer.
"""

import asyncio
from typing import TYPE_CHECKING

from gear_server.errors import Draining

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from gear_server.generate import Generation


class Traffic:
    def __init__(self) -> None:
        self.draining = False
        self.generations: set[Generation] = set()
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse_if_draining(self) -> None:
        if self.draining:
            raise Draining

    def enter(self) -> None:
        self._num_active += 1
        self._idle.clear()

    def leave(self) -> None:
        self._num_active -= 1
        if self._num_active == 0:
            self._idle.set()

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests, wait for those in flight; after `limit_s` abort what still runs."""
        self.draining = True
        if await self._is_idle_within(limit_s):
            return
        for generation in list(self.generations):
            generation.abort()
        await self._is_idle_within(2.0)  # their last words: an abort takes the engine two steps

    async def _is_idle_within(self, limit_s: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), limit_s)
        except TimeoutError:
            return False
        return True


class CountTraffic:
    """ASGI middleware: tells `Traffic` when a request begins and ends."""

    def __init__(self, app: "ASGIApp", traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._traffic.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._traffic.leave()
