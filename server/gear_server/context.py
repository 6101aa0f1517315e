"""What every route needs, made once at start: settings, engine, tokenizer, template, metrics, traffic.

Knows what the server asks of an engine (`Engine`), and nothing about how one is started.
"""

from dataclasses import dataclass
from typing import Protocol

from gear_engine.client import RequestStream, StepListener
from gear_engine.protocol import EngineInfo, EngineStats, SamplingParams
from gear_server.chat_template import ChatTemplate
from gear_server.metrics import Metrics
from gear_server.settings import Settings
from gear_server.tokenizer import TextTokenizer
from gear_server.traffic import Traffic


class Engine(Protocol):
    """The part of `EngineClient` that the server uses; tests bring a scripted one."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def is_alive(self) -> bool: ...

    def add_listener(self, listener: StepListener) -> None: ...

    def submit(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> RequestStream: ...

    def abort(self, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Context:
    settings: Settings
    engine: Engine
    tokenizer: TextTokenizer
    template: ChatTemplate | None  # None: the model brings none, so it cannot chat
    metrics: Metrics
    traffic: Traffic

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.settings.model_names
