"""A span for every request, with what the engine did; sent by the standard variables, and never with what was asked."""

import gzip
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from scripted_engine import ScriptedEngine
from test_serving_process import scripted_server, wait_for_url

from gear_server.app import create_app
from gear_server.settings import Settings
from gear_server.tracing import provider_from

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(engine: ScriptedEngine, settings: Settings, spans: InMemorySpanExporter) -> httpx.AsyncClient:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    transport = httpx.ASGITransport(create_app(settings, engine, provider), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


@pytest.mark.parametrize("stream", [False, True])
async def test_a_span_tells_a_requests_way_through_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, spans: InMemorySpanExporter, stream: bool
) -> None:
    engine.step_s = 0.01
    before_ns = time.time_ns()
    chat = {"messages": [{"role": "user", "content": "a secret"}], "stream": stream, "n": 2}
    answer = await client.post("/v1/chat/completions", json=chat, headers={"X-Request-Id": "mine"})
    assert answer.status_code == 200
    span = only(spans)
    assert (span.name, span.kind) == ("POST /v1/chat/completions", SpanKind.SERVER)
    assert span.attributes is not None
    expected = {
        "http.response.status_code": 200, "http.route": "/v1/chat/completions", "gear.request.id": "mine",
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "small",
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.usage.input_tokens": len(engine.submitted[0].token_ids), "gen_ai.usage.output_tokens": 6,
    }  # fmt: skip
    assert {name: span.attributes[name] for name in expected} == expected
    assert [event.name for event in span.events] == ["queue", "prefill", "decode"]
    assert span.end_time is not None
    times = [before_ns, *(event.timestamp for event in span.events), span.end_time]
    assert all(later - earlier > -1e6 for earlier, later in itertools.pairwise(times)), times
    assert times[3] - times[1] >= 0.009e9, "a step lies between queue and the first token"
    assert "secret" not in span.to_json()


async def test_a_callers_trace_goes_on_here(client: httpx.AsyncClient, spans: InMemorySpanExporter) -> None:
    await client.post("/v1/completions", json={"prompt": "a"}, headers={"traceparent": TRACEPARENT})
    span = only(spans)
    assert format(span.context.trace_id, "032x") == TRACE_ID
    assert span.parent is not None
    assert format(span.parent.span_id, "016x") == "00f067aa0ba902b7"


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01"])
async def test_a_broken_context_begins_a_new_trace(
    client: httpx.AsyncClient, spans: InMemorySpanExporter, header: str
) -> None:
    assert (await client.get("/v1/models", headers={"traceparent": header})).status_code == 200
    assert only(spans).parent is None


async def test_refusals_are_spans_and_failures_are_marked(
    client: httpx.AsyncClient, engine: ScriptedEngine, spans: InMemorySpanExporter
) -> None:
    await client.post("/v1/completions", json={"prompt": "a", "temperature": -1})
    assert only(spans).status.status_code is StatusCode.UNSET, "the caller's fault is no error of the server"
    spans.clear()
    engine.error_after = 1
    await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert only(spans).status.status_code is StatusCode.ERROR
    spans.clear()
    await client.get("/no/such/route/4711")
    assert only(spans).name == "GET", "names are few"


async def test_probes_and_scrapes_have_no_spans(client: httpx.AsyncClient, spans: InMemorySpanExporter) -> None:
    for path in ("/health", "/ready", "/metrics"):
        await client.get(path)
    assert not spans.get_finished_spans()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_being_asked_nothing_is_traced(environment: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert provider_from(environment) is None
    assert not caplog.records


def test_a_protocol_that_cannot_be_spoken_is_said(caplog: pytest.LogCaptureFixture) -> None:
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    assert provider_from(asked) is None
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf" in caplog.text


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP receiver on the loopback, and what it got."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            assert self.path == "/v1/traces"
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


def test_a_server_sends_its_spans_to_a_collector_and_loses_none_when_it_stops(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (endpoint, received):
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
        }  # fmt: skip
        with scripted_server(model_folder, {"port": 0}, {}, environment) as process:
            url, _ = wait_for_url(process)
            for _ in range(3):
                httpx.post(f"{url}/v1/completions", json={"prompt": "Once"}, headers={"traceparent": TRACEPARENT})
            process.terminate()
            _, errors = process.communicate(timeout=20)
            assert process.returncode == 0, errors
    resources = [spans for request in received for spans in request.resource_spans]
    sent = [span for spans in resources for scope in spans.scope_spans for span in scope.spans]
    assert [span.name for span in sent] == ["POST /v1/completions"] * 3
    assert {span.trace_id.hex() for span in sent} == {TRACE_ID}
    attributes = {one.key: one.value.string_value for one in resources[0].resource.attributes}
    assert attributes["service.name"] == "gearserve"
    assert attributes["deployment.environment"] == "test"
