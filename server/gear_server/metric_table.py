"""Every metric's name, type, labels and buckets, and where the engine's numbers come from; docs are made from it.

Names are a promise to dashboards. Nothing here knows prometheus_client.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from gear_engine.protocol import EngineInfo, EngineStats
from gear_server import version


def _seconds(*milliseconds: float) -> tuple[float, ...]:
    return tuple(ms / 1000 for ms in milliseconds)


_STEP_BUCKETS = _seconds(
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12.5, 15, 17.5, 20, 25, 30, 40, 50, 75, 100, 150, 250, 500, 1000, 2500
)
_WAIT_BUCKETS = _seconds(
    1, 2, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500, 750,
    1e3, 1.5e3, 2e3, 3e3, 5e3, 7.5e3, 10e3, 15e3, 20e3, 30e3, 60e3,
)  # fmt: skip
_LATENCY_BUCKETS = _seconds(
    1, 2, 5, 10, 25, 50, 100, 250, 500, 750,
    1e3, 1.5e3, 2e3, 3e3, 4e3, 5e3, 7.5e3, 10e3, 15e3, 20e3, 30e3, 45e3, 60e3, 80e3, 100e3, 120e3, 180e3, 300e3,
)  # fmt: skip
_BATCH_BUCKETS = tuple(float(2**power) for power in range(15))

Read = Callable[[EngineStats, EngineInfo], Iterable[tuple[tuple[str, ...], float]]]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric: all carry the label `model`, and `labels` besides. `read` is for what the engine counts."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    read: Read | None = None


def _field(name: str) -> Read:
    return lambda stats, info: [((), getattr(stats, name))]


def _saved_bytes(stats: EngineStats, info: EngineInfo) -> float:
    """Below zero while open pages cost more than sealing has saved, and said so."""
    return stats.kv_tokens * info.bf16_token_bytes - stats.kv_sealed_bytes - stats.kv_open_bytes


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(
        "gear_engine_up", "gauge", "1 while the engine process lives, 0 once it has ended: what /health says, too."
    ),
    MetricSpec("gear_requests_running", "gauge", "Sequences in the running batch.", read=_field("num_running")),
    MetricSpec("gear_requests_waiting", "gauge", "Sequences waiting to be admitted.", read=_field("num_waiting")),
    MetricSpec("gear_requests_swapped", "gauge", "Sequences swapped out to host memory.", read=_field("num_swapped")),
    MetricSpec(
        "gear_requests_total",
        "counter",
        "Ended sequences by reason (a request with n choices has n); rejected: HTTP requests refused before they ran.",
        labels=("finish_reason",),
    ),
    MetricSpec(
        "gear_requests_arrived_total", "counter",
        "The same counted when they arrive: the difference is what is under way.",
    ),
    MetricSpec(
        "gear_prompt_tokens_total", "counter", "Prompt tokens taken in, cached ones included.",
        read=_field("prompt_tokens_total"),
    ),
    MetricSpec(
        "gear_cached_tokens_total", "counter", "Prompt tokens found in the prefix cache.",
        read=_field("cached_tokens_total"),
    ),
    MetricSpec(
        "gear_generation_tokens_total", "counter", "Tokens generated.", read=_field("generation_tokens_total")
    ),
    MetricSpec(
        "gear_time_to_first_token_seconds", "histogram", "From a request's arrival to its first token.",
        buckets=_WAIT_BUCKETS,
    ),
    MetricSpec(
        "gear_inter_token_latency_seconds", "histogram", "Between one output of a sequence and the next.",
        buckets=_STEP_BUCKETS,
    ),
    MetricSpec(
        "gear_request_latency_seconds", "histogram", "From arrival to the end, of answers that came to stop or length.",
        buckets=_LATENCY_BUCKETS,
    ),
    MetricSpec(
        "gear_queue_time_seconds", "histogram", "From the engine's queue to the first step.", buckets=_WAIT_BUCKETS
    ),
    MetricSpec("gear_step_seconds", "histogram", "Duration of an engine step.", buckets=_STEP_BUCKETS),
    MetricSpec("gear_batch_tokens", "histogram", "Tokens computed in an engine step.", buckets=_BATCH_BUCKETS),
    MetricSpec(
        "gear_pages", "gauge", "Page slots: free, active (in use), cached (kept until they are needed).",
        labels=("state",),
        read=lambda stats, info: [
            # Counted from the pool, because before its first step the engine has not counted anything.
            (("free",), info.num_pages - stats.pages_active - stats.pages_cached),
            (("active",), stats.pages_active), (("cached",), stats.pages_cached),
        ],
    ),
    MetricSpec(
        "gear_prefix_hits_total", "counter", "Requests that began with cached pages.", read=_field("prefix_hits_total")
    ),
    MetricSpec(
        "gear_swaps_total", "counter", "Sequences swapped out to host memory and in again.", labels=("direction",),
        read=lambda stats, info: [(("out",), stats.swaps_out_total), (("in",), stats.swaps_in_total)],
    ),
    MetricSpec(
        "gear_preemptions_total", "counter", "Sequences whose pages were lost and are computed again.",
        read=_field("preemptions_total"),
    ),
    MetricSpec("gear_cache_dir_bytes", "gauge", "Bytes of files in --cache-dir.", read=_field("cache_dir_bytes")),
    MetricSpec(
        "gear_cache_dir_pages_total", "counter", "Cached pages written to --cache-dir and read from it.",
        labels=("direction",),
        read=lambda stats, info: [
            (("out",), stats.cache_dir_saved_total), (("in",), stats.cache_dir_read_total),
        ],
    ),
    MetricSpec(
        "gear_kv_compression_ratio", "gauge",
        "bf16 bytes of a token over its bytes in a sealed page, metadata included: a property of the preset.",
        read=lambda stats, info: [((), info.kv_compression_ratio)],
    ),
    MetricSpec(
        "gear_kv_capacity_tokens", "gauge",
        "Tokens that the pool holds in sealed pages, and that its bytes would hold in bf16.", labels=("format",),
        read=lambda stats, info: [
            (("gear",), info.num_pages * info.page_size),
            (("bf16",), info.num_pages * info.page_bytes // info.bf16_token_bytes),
        ],
    ),
    MetricSpec(
        "gear_kv_tokens", "gauge", "Tokens that running sequences have in the pool; shared ones count once.",
        read=_field("kv_tokens"),
    ),
    MetricSpec(
        "gear_kv_bytes", "gauge", "Bytes of keys and values by state: sealed, open, swapped.", labels=("state",),
        read=lambda stats, info: [
            (("sealed",), stats.kv_sealed_bytes), (("open",), stats.kv_open_bytes),
            (("swapped",), stats.kv_swapped_bytes),
        ],
    ),
    MetricSpec(
        "gear_kv_saved_bytes", "gauge",
        "Bytes the same tokens would take in bf16, less what they take; negative while open pages cost more.",
        read=lambda stats, info: [((), _saved_bytes(stats, info))],
    ),
    MetricSpec(
        "gear_kv_peak_bytes", "gauge", "High-water mark of sealed and open bytes.", read=_field("kv_peak_bytes")
    ),
    MetricSpec(
        "gear_peak_memory_bytes", "gauge", "Peak of the allocator on a GPU, peak resident set on a CPU.",
        read=_field("peak_memory_bytes"),
    ),
    MetricSpec(
        "gear_memory_bytes", "gauge", "The memory plan made at start, by kind.", labels=("kind",),
        read=lambda stats, info: [((row.kind,), row.num_bytes) for row in info.memory],
    ),
    MetricSpec(
        "gear_page_error_ratio", "gauge", "Relative error of the last sampled sealed page.", labels=("layer", "part")
    ),
    MetricSpec(
        "gear_build_info", "gauge", "Always 1; what runs is in the labels.", labels=("version", "preset", "backend"),
        read=lambda stats, info: [((version(), info.preset, info.backend), 1)],
    ),
)  # fmt: skip
