"""The Grafana dashboards, written down once: `python deploy/grafana/dashboards.py` writes them as JSON for Grafana.

Knows panels and their queries; what the metrics mean is docs/metrics.md's. In a query `{@}` selects the job, model and
instance that the reader chose.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTED = 'job=~"$job", model=~"$model", instance=~"$instance"'
WIDTH = 24  # of Grafana's grid


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str

    def target(self, ref: str, **more: Any) -> dict[str, Any]:
        expr = self.expr.replace("@", SELECTED)
        return {"refId": ref, "expr": expr, "legendFormat": self.legend, "datasource": SOURCE, **more}


@dataclass(frozen=True)
class Panel:
    kind: Literal["stat", "timeseries", "heatmap", "bargauge"]
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    options: dict[str, Any]
    width: int
    height: int
    custom: dict[str, Any] | None = None
    min: float | None = 0
    max: float | None = None

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        more = {"format": "heatmap"} if self.kind == "heatmap" else {"instant": True} if self.kind == "bargauge" else {}
        bounds = {name: bound for name, bound in (("min", self.min), ("max", self.max)) if bound is not None}
        defaults = {"unit": self.unit, **bounds, **({} if self.custom is None else {"custom": self.custom})}
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": self.options,
            "targets": [query.target(chr(ord("A") + i), **more) for i, query in enumerate(self.queries)],
        }


def stat(title: str, description: str, unit: str, *queries: Query, width: int = 4) -> Panel:
    """The last value, large, above its past."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "textMode": "auto",
    }
    return Panel("stat", title, description, unit, queries, options, width, 5, min=None)


def lines(title: str, description: str, unit: str, *queries: Query, stacked: bool = False, **more: Any) -> Panel:
    custom = {
        "drawStyle": "line",
        "lineWidth": 1 if stacked else 2,
        "fillOpacity": 40 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["mean", "max"]},
        "tooltip": {"mode": "multi", "sort": "none" if stacked else "desc"},
    }
    return Panel("timeseries", title, description, unit, queries, options, more.pop("width", 12), 9, custom, **more)


def heatmap(title: str, description: str, metric: str, width: int = 12) -> Panel:
    """Of a histogram: how many observations fell into each bucket, over time."""
    query = Query(f"sum by (le) (increase({metric}_bucket{{@}}[$__rate_interval]))", "{{le}}")
    options = {
        "calculate": False,
        "color": {
            "mode": "scheme", "scheme": "Turbo", "fill": "dark-orange", "exponent": 0.5, "steps": 64, "reverse": False,
        },
        "cellGap": 1,
        "filterValues": {"le": 1e-9},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": True, "showColorScale": True},
        "legend": {"show": True},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "s"},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
    }  # fmt: skip
    return Panel("heatmap", title, description, "short", (query,), options, width, 9, {}, min=None)


def bars(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Panel:
    """The last value of every series, side by side."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "vertical",
        "displayMode": "basic",
        "valueMode": "text",
        "namePlacement": "auto",
        "showUnfilled": False,
        "sizing": "auto",
        "minVizWidth": 8,
        "minVizHeight": 16,
        "maxVizHeight": 300,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
    }
    return Panel("bargauge", title, description, unit, queries, options, more.pop("width", 12), 9, **more)


def rate(metric: str, labels: str = "") -> str:
    return f"sum(rate({metric}{{{labels}@}}[$__rate_interval]))"


def quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share:g}, sum by (le) (rate({metric}_bucket{{@}}[$__rate_interval])))"


def percentiles(metric: str) -> tuple[Query, ...]:
    return tuple(Query(quantile(share, metric), f"p{share * 100:g}") for share in (0.5, 0.9, 0.99))


def mean(metric: str) -> str:
    return f"{rate(f'{metric}_sum')} / {rate(f'{metric}_count')}"


TTFT, ITL, E2E = "gear_time_to_first_token_seconds", "gear_inter_token_latency_seconds", "gear_request_latency_seconds"
QUEUE, STEP = "gear_queue_time_seconds", "gear_step_seconds"
HELD = 'sum(gear_kv_bytes{state=~"sealed|open", @})'
USED = 'sum(gear_pages{state="active", @}) / sum(gear_pages{@})'
FAILED = rate("gear_requests_total", 'finish_reason=~"error|rejected", ') + " / " + rate("gear_requests_total")


def overview() -> tuple[Panel, ...]:
    return (
        stat(
            "Tokens/s",
            "Tokens generated for all requests.",
            "short",
            Query(rate("gear_generation_tokens_total"), "tokens/s"),
        ),
        stat(
            "Requests/s",
            "Requests that came to an end, whichever.",
            "reqps",
            Query(rate("gear_requests_total"), "requests/s"),
        ),
        stat(
            "TTFT p99", "Of 100 requests 99 had their first token within this.", "s", Query(quantile(0.99, TTFT), "p99")
        ),
        stat(
            "ITL p99", "Of 100 tokens 99 followed the one before within this.", "s", Query(quantile(0.99, ITL), "p99")
        ),
        stat(
            "Failed",
            "Share of requests that were refused or ended with an error.",
            "percentunit",
            Query(FAILED, "failed"),
        ),
        stat(
            "Peak memory",
            "High-water mark of the engine: the allocator's on a GPU, resident memory on a CPU.",
            "bytes",
            Query("max(gear_peak_memory_bytes{@})", "peak"),
        ),
        lines(
            "Throughput",
            "Tokens a second: generated, taken in as prompts, and of those found in the prefix cache.",
            "short",
            Query(rate("gear_generation_tokens_total"), "generated"),
            Query(rate("gear_prompt_tokens_total"), "prompt"),
            Query(rate("gear_cached_tokens_total"), "cached"),
        ),
        lines(
            "Requests by outcome",
            "Ended requests a second: stop and length are answers, rejected never ran.",
            "reqps",
            Query("sum by (finish_reason) (rate(gear_requests_total{@}[$__rate_interval]))", "{{finish_reason}}"),
            stacked=True,
        ),
        lines(
            "Time to first token", "From a request's arrival at the server to its first token.", "s", *percentiles(TTFT)
        ),
        lines("Inter-token latency", "Between one output of a sequence and the next.", "s", *percentiles(ITL)),
        lines(
            "Request latency",
            "From arrival to the end, of answers that came to stop or length.",
            "s",
            *percentiles(E2E),
        ),
        lines(
            "Queue time",
            "From the engine's queue to the first step. Grows when pages or batch slots are short.",
            "s",
            *percentiles(QUEUE),
        ),
        lines(
            "Saturation",
            "Share of time that the engine computes, and of page slots in use. Near 100 % requests wait.",
            "percentunit",
            Query(rate(f"{STEP}_sum") + " / count(gear_requests_running{@})", "engine busy"),
            Query(USED, "pages in use"),
            max=1,
        ),
        lines(
            "Sequences",
            "In the running batch, waiting to be admitted, and swapped out to host memory.",
            "short",
            Query("sum(gear_requests_running{@})", "running"),
            Query("sum(gear_requests_waiting{@})", "waiting"),
            Query("sum(gear_requests_swapped{@})", "swapped"),
        ),
        lines(
            "Engine steps", "Duration of a step: it bounds the time between tokens from below.", "s", *percentiles(STEP)
        ),
        lines(
            "Errors",
            "Failed share of requests, and sequences a second that must be computed again for want of pages.",
            "short",
            Query(FAILED, "failed (share)"),
            Query(rate("gear_preemptions_total"), "computed again"),
        ),
        lines(
            "Memory",
            "High-water marks of the engine and of keys and values within it, and what these hold now.",
            "bytes",
            Query("max(gear_peak_memory_bytes{@})", "engine, peak"),
            Query("max(gear_kv_peak_bytes{@})", "KV, peak"),
            Query(HELD, "KV, now"),
        ),
        bars(
            "Memory plan",
            "What the engine set aside at start, by kind.",
            "bytes",
            Query("sum by (kind) (gear_memory_bytes{@})", "{{kind}}"),
        ),
        stat(
            "Engines up",
            "Engine processes that live; a server whose engine has ended answers 503.",
            "short",
            Query("sum(gear_engine_up{@})", "up"),
        ),
        stat(
            "What runs",
            "Version, preset and backend; the number counts servers.",
            "short",
            Query("count by (version, preset, backend) (gear_build_info{@})", "{{version}} {{preset}} {{backend}}"),
            width=20,
        ),
    )


def kv_cache() -> tuple[Panel, ...]:
    return (
        stat(
            "Compression",
            "bf16 bytes of a token over its bytes in a sealed page, metadata included: of the preset.",
            "none",
            Query("min(gear_kv_compression_ratio{@})", "ratio"),
        ),
        stat(
            "Compression, effective",
            "The same of what is in the pool now, open pages included; 1 when it is empty.",
            "none",
            Query(f"({HELD} + sum(gear_kv_saved_bytes{{@}})) / ({HELD} > 0) or vector(1)", "ratio"),
        ),
        stat(
            "Bytes saved",
            "What its tokens would take in bf16, less what they take. Below 0 while open pages cost more.",
            "bytes",
            Query("sum(gear_kv_saved_bytes{@})", "saved"),
        ),
        stat(
            "Tokens that fit",
            "In the pool, once sealed.",
            "short",
            Query('sum(gear_kv_capacity_tokens{format="gear", @})', "tokens"),
        ),
        stat(
            "As bf16",
            "Tokens that the same bytes would hold uncompressed.",
            "short",
            Query('sum(gear_kv_capacity_tokens{format="bf16", @})', "tokens"),
        ),
        stat(
            "KV peak", "High-water mark of sealed and open bytes.", "bytes", Query("max(gear_kv_peak_bytes{@})", "peak")
        ),
        lines(
            "Pages by state",
            "Slots of the pool: active ones are in use, cached ones are kept until their space is needed.",
            "short",
            Query("sum by (state) (gear_pages{@})", "{{state}}"),
            stacked=True,
        ),
        lines(
            "KV bytes by state",
            "Sealed and open pages lie in the pool, swapped ones in host memory.",
            "bytes",
            Query("sum by (state) (gear_kv_bytes{@})", "{{state}}"),
            stacked=True,
        ),
        lines(
            "With and without compression",
            "Bytes that the tokens in the pool take, and what bf16 would take for them.",
            "bytes",
            Query(HELD, "as they are"),
            Query(f"{HELD} + sum(gear_kv_saved_bytes{{@}})", "in bf16"),
        ),
        lines(
            "Tokens in the pool",
            "Of running sequences; those that they share count once.",
            "short",
            Query("sum(gear_kv_tokens{@})", "tokens"),
        ),
        bars(
            "Page error per layer, keys",
            "Relative error of the last sampled sealed page of each layer.",
            "percentunit",
            Query('avg by (layer) (gear_page_error_ratio{part="keys", @})', "{{layer}}"),
        ),
        bars(
            "Page error per layer, values",
            "Relative error of the last sampled sealed page of each layer.",
            "percentunit",
            Query('avg by (layer) (gear_page_error_ratio{part="values", @})', "{{layer}}"),
        ),
        lines(
            "Page error over time",
            "Mean over the layers and the worst one. Drift means that the traffic has changed.",
            "percentunit",
            Query("avg by (part) (gear_page_error_ratio{@})", "{{part}}, mean"),
            Query("max by (part) (gear_page_error_ratio{@})", "{{part}}, worst"),
        ),
        lines(
            "Prefix cache",
            "Share of prompt tokens that were found in it, and requests a second that began with cached pages.",
            "short",
            Query(f"{rate('gear_cached_tokens_total')} / {rate('gear_prompt_tokens_total')}", "cached tokens (share)"),
            Query(rate("gear_prefix_hits_total"), "hits/s"),
        ),
        lines(
            "Swaps",
            "Sequences a second swapped out to host memory and in again; without room there they are computed again.",
            "ops",
            Query("sum by (direction) (rate(gear_swaps_total{@}[$__rate_interval]))", "{{direction}}"),
            Query(rate("gear_preemptions_total"), "computed again"),
        ),
        lines(
            "Swapped out",
            "Sequences that wait in host memory.",
            "short",
            Query("sum(gear_requests_swapped{@})", "sequences"),
        ),
        lines(
            "Pages kept on disk",
            "What --cache-dir holds of prompts that memory had no room for.",
            "bytes",
            Query("sum(gear_cache_dir_bytes{@})", "kept"),
        ),
        lines(
            "Pages to and from disk",
            "Pages a second that were written to --cache-dir and read from it.",
            "ops",
            Query("sum by (direction) (rate(gear_cache_dir_pages_total{@}[$__rate_interval]))", "{{direction}}"),
        ),
    )


def load_test() -> tuple[Panel, ...]:
    answered = rate("gear_requests_total", 'finish_reason=~"stop|length", ')
    return (
        stat(
            "Offered",
            "Requests a second that arrived, whatever came of them.",
            "reqps",
            Query(rate("gear_requests_arrived_total"), "offered"),
        ),
        stat("Achieved", "Requests a second that were answered in full.", "reqps", Query(answered, "achieved")),
        stat(
            "Under way",
            "Requests that arrived and have not ended.",
            "short",
            Query("sum(gear_requests_arrived_total{@}) - sum(gear_requests_total{@})", "requests"),
        ),
        stat(
            "Tokens/s",
            "Tokens generated for all requests.",
            "short",
            Query(rate("gear_generation_tokens_total"), "tokens/s"),
        ),
        stat(
            "TTFT p99",
            "Measured in the server; gear-loadtest adds the network and its own schedule.",
            "s",
            Query(quantile(0.99, TTFT), "p99"),
        ),
        stat("ITL p99", "Measured in the server.", "s", Query(quantile(0.99, ITL), "p99")),
        lines(
            "Offered and achieved",
            "Where achieved stays below offered the server falls behind and requests pile up.",
            "reqps",
            Query(rate("gear_requests_arrived_total"), "offered"),
            Query(answered, "achieved"),
            Query(rate("gear_requests_total", 'finish_reason=~"error|rejected|abort", '), "failed, refused or left"),
        ),
        lines(
            "Under way",
            "Running in the batch, waiting, swapped out.",
            "short",
            Query("sum(gear_requests_running{@})", "running"),
            Query("sum(gear_requests_waiting{@})", "waiting"),
            Query("sum(gear_requests_swapped{@})", "swapped"),
            stacked=True,
        ),
        heatmap("Time to first token", "How many requests had their first token after how long.", TTFT),
        heatmap("Inter-token latency", "How many tokens followed the one before after how long.", ITL),
        heatmap("Request latency", "How many answers were complete after how long.", E2E),
        heatmap("Queue time", "How many requests waited how long for their first step.", QUEUE),
        lines(
            "Tokens/s",
            "Generated, and prompt tokens that had to be computed.",
            "short",
            Query(rate("gear_generation_tokens_total"), "generated"),
            Query(f"{rate('gear_prompt_tokens_total')} - {rate('gear_cached_tokens_total')}", "prompt, computed"),
        ),
        lines(
            "Tokens in a step",
            "Mean tokens that the engine computed together: larger batches use the machine better.",
            "short",
            Query(mean("gear_batch_tokens"), "mean"),
        ),
        lines(
            "Step time",
            "Mean duration of a step, and of its 99th percentile.",
            "s",
            Query(mean(STEP), "mean"),
            Query(quantile(0.99, STEP), "p99"),
        ),
        lines(
            "Pages and memory",
            "Share of the pool in use, and peak KV bytes as a share of what the pool holds.",
            "percentunit",
            Query(USED, "pages in use"),
            Query('max(gear_kv_peak_bytes{@}) / max(gear_memory_bytes{kind="pages", @})', "KV peak"),
            max=1,
        ),
    )


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    description: str
    panels: Callable[[], tuple[Panel, ...]]

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.uid}.json"

    def json(self) -> dict[str, Any]:
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["gearserve", "llm"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,
            "timezone": "browser",
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "templating": {"list": list(_variables())},
            "annotations": {"list": []},
            "links": [_links(), _documentation()],
            "panels": list(_placed(self.panels())),
        }

    def text(self) -> str:
        return json.dumps(self.json(), indent=1) + "\n"


DASHBOARDS = (
    Dashboard(
        "gearserve-overview", "GearServe / Overview", "Throughput, latency, saturation, errors, memory.", overview
    ),
    Dashboard(
        "gearserve-kv-cache", "GearServe / KV cache", "What the compressed cache holds, saves and loses.", kv_cache
    ),
    Dashboard(
        "gearserve-load-test", "GearServe / Load test", "Offered and achieved load, and how latency spreads.", load_test
    ),
)


def _placed(panels: tuple[Panel, ...]) -> Iterator[dict[str, Any]]:
    """From left to right, in rows as high as their first panel."""
    x = y = height = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > WIDTH or panel.height != height:
            x, y, height = 0, y + height, panel.height
        yield panel.json(number, x, y)
        x += panel.width


def _variables() -> Iterator[dict[str, Any]]:
    yield {
        "name": "datasource",
        "type": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "current": {"text": "", "value": ""},
    }
    chosen: list[str] = []
    for name in ("job", "model", "instance"):
        selector = f"{{{', '.join(chosen)}}}" if chosen else ""
        yield {
            "name": name,
            "type": "query",
            "label": name.capitalize(),
            "datasource": SOURCE,
            "query": {"query": f"label_values(gear_requests_running{selector}, {name})", "refId": name},
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
            "refresh": 2,
            "sort": 1,
        }
        chosen.append(f'{name}=~"${name}"')


def _links() -> dict[str, Any]:
    return _link("dashboards", "GearServe", "The other dashboards, for the same servers and time", ["gearserve"], "")


def _documentation() -> dict[str, Any]:
    return _link("link", "Prometheus alerts", "What fires, and why", [], "/alerting/list")


def _link(kind: str, title: str, tooltip: str, tags: list[str], url: str) -> dict[str, Any]:
    return {
        "type": kind, "title": title, "tooltip": tooltip, "tags": tags, "url": url, "icon": "external link",
        "asDropdown": False, "includeVars": True, "keepTime": True, "targetBlank": False,
    }  # fmt: skip


if __name__ == "__main__":
    for dashboard in DASHBOARDS:
        dashboard.path.write_text(dashboard.text())
