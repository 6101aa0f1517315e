"""What Prometheus sees: the metrics of `metric_table.py`, filled.

Totals and states are read from the engine's last step when a scrape asks; times of requests are measured here,
where the client would feel them.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gear_engine.protocol import EngineInfo, EngineStats, FinishReason, StepReport
from gear_server.metric_table import METRICS, MetricSpec

Outcome = FinishReason | Literal["rejected"]
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "abort", "error", "rejected")

_SPECS = {spec.name: spec for spec in METRICS}


class _EngineCollector(Collector):
    """Reads the engine's last word when scraped: counters follow its totals exactly and cost nothing a step."""

    def __init__(self, model: str, info: EngineInfo, stats: Callable[[], EngineStats]) -> None:
        self._model = model
        self._info = info
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for spec in METRICS:
            if spec.read is None:
                continue
            family = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
            metric = family(spec.name, spec.help, labels=("model", *spec.labels))
            for labels, value in spec.read(stats, self._info):
                metric.add_metric((self._model, *labels), value)
            yield metric


class Histogram(Collector):
    """One without a lock, for one thread: an observation for every token costs a quarter of the library's 1.1 µs."""

    def __init__(self, model: str, spec: MetricSpec) -> None:
        self._model = model
        self._spec = spec
        self._counts = [0] * (len(spec.buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._spec.buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._spec.name, self._spec.help, labels=("model",))
        bounds = [*(str(bound) for bound in self._spec.buckets), "+Inf"]
        family.add_metric((self._model,), list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family


class Metrics:
    """A registry of its own; the process's default one stays untouched."""

    def __init__(
        self, model: str, info: EngineInfo, stats: Callable[[], EngineStats], is_alive: Callable[[], bool]
    ) -> None:
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model, info, stats))
        self._model = model
        requests = self._counter("gear_requests_total")
        self._outcomes = {outcome: requests.labels(model, outcome) for outcome in OUTCOMES}
        self._arrived = self._counter("gear_requests_arrived_total").labels(model)
        self.time_to_first_token_s = self._histogram("gear_time_to_first_token_seconds")
        self.inter_token_latency_s = self._histogram("gear_inter_token_latency_seconds")
        self.request_latency_s = self._histogram("gear_request_latency_seconds")
        self._queue_time_s = self._histogram("gear_queue_time_seconds")
        self._step_s = self._histogram("gear_step_seconds")
        self._batch_tokens = self._histogram("gear_batch_tokens")
        self._page_error_ratio = self._gauge("gear_page_error_ratio")
        self._gauge("gear_engine_up").labels(model).set_function(lambda: float(is_alive()))

    def arrive(self) -> None:
        """A sequence that was submitted; one `count` will say how it ended."""
        self._arrived.inc()

    def count(self, outcome: Outcome) -> None:
        if outcome == "rejected":
            self.arrive()
        self._outcomes[outcome].inc()

    def on_step(self, report: StepReport) -> None:
        """The engine's listener."""
        if report.step_s is not None:
            self._step_s.observe(report.step_s)
            self._batch_tokens.observe(report.batch_tokens)
        for queue_time_s in report.queue_times_s.values():
            self._queue_time_s.observe(queue_time_s)
        for error in report.page_errors:
            self._page_error_ratio.labels(self._model, str(error.layer), error.part).set(error.ratio)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text of a scrape and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _counter(self, name: str) -> Counter:
        spec = _SPECS[name]
        return Counter(name, spec.help, ("model", *spec.labels), registry=self.registry)

    def _gauge(self, name: str) -> Gauge:
        spec = _SPECS[name]
        return Gauge(name, spec.help, ("model", *spec.labels), registry=self.registry)

    def _histogram(self, name: str) -> Histogram:
        histogram = Histogram(self._model, _SPECS[name])
        self.registry.register(histogram)
        return histogram
