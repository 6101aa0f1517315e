"""OpenTelemetry, if the environment asks for it: a server span for every request, with what the engine did as events.

Needs the extra `gearserve[otel]`; the standard OTEL_ variables say where spans go, which are kept and what the service
is called. Neither prompts nor answers are in them.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gear_server import version
from gear_server.account import Account, account_of
from gear_server.request_log import PROBES, SCOPE_KEY, TRACE_KEY

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

logger = logging.getLogger("gear_server")

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}  # OpenTelemetry's names


def provider_from(environment: Mapping[str, str] = os.environ) -> "TracerProvider | None":
    """None where no traces are wanted, or cannot be sent: the log says so, since answers matter more than traces."""
    endpoint = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp")
    if not endpoint or off or exporter == "none":
        return None
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if exporter != "otlp" or protocol not in (None, "", "http/protobuf"):
        logger.warning(
            "no traces: only OTEL_TRACES_EXPORTER=otlp with OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf is known"
        )
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        logger.warning("no traces, though OTEL_EXPORTER_OTLP_ENDPOINT is set: pip install 'gearserve[otel]'")
        return None
    resource = Resource.create({SERVICE_VERSION: version()})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "gearserve"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Trace:
    """ASGI middleware, within `RequestLog`. Probes and scrapes have no span, because they never end."""

    def __init__(self, app: ASGIApp, provider: "TracerProvider", model: str) -> None:
        self._app = app
        self._model = model
        self._tracer = provider.get_tracer("gear_server", version())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        span = self._start(scope)
        scope[TRACE_KEY] = format(span.get_span_context().trace_id, "032x")
        status = 500  # unless an answer says otherwise

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        finally:
            if span.is_recording():
                self._describe(span, scope, status)
            span.end()

    def _start(self, scope: Scope) -> "Span":
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            "gear.request.id": scope[SCOPE_KEY],
        }
        return self._tracer.start_span(
            scope["method"], context=extract(headers), kind=SpanKind.SERVER, attributes=attributes
        )

    def _describe(self, span: "Span", scope: Scope, status: int) -> None:
        span.set_attribute("http.response.status_code", status)
        route = getattr(scope.get("route"), "path", None)
        if route is not None:  # of which there are few, unlike paths
            span.update_name(f"{scope['method']} {route}")
            span.set_attribute("http.route", route)
        account = account_of(scope)
        if status >= 500 or (account is not None and "error" in account.finish_reasons):
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        if account is not None:
            span.set_attributes(_attributes(account, self._model, _OPERATIONS.get(scope["path"], "text_completion")))
            _add_events(span, account)


def _attributes(account: Account, model: str, operation: str) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "gearserve",
        "gen_ai.request.model": model,
        "gen_ai.response.id": account.response_id,
        "gen_ai.response.finish_reasons": account.finish_reasons,
        "gen_ai.usage.input_tokens": account.num_prompt_tokens,
        "gen_ai.usage.output_tokens": account.num_completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": account.num_cached_tokens,
    }


def _add_events(span: "Span", account: Account) -> None:
    """queue: handed to the engine; prefill: its first step begins; decode: its first token is there."""
    offset_s = time.time() - time.perf_counter()
    for name, at_s in (
        ("queue", account.submitted_s), ("prefill", account.scheduled_s), ("decode", account.first_token_s)
    ):  # fmt: skip
        if at_s is not None:
            span.add_event(name, timestamp=int((at_s + offset_s) * 1e9))
