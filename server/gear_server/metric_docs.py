"""docs/metrics.md, made from the table of metrics: `python -m gear_server.metric_docs > docs/metrics.md`."""

from gear_server.metric_table import METRICS, MetricSpec

# The same thing as vLLM names it, for whoever brings dashboards along.
VLLM_NAMES = {
    "gear_requests_running": "vllm:num_requests_running",
    "gear_requests_waiting": "vllm:num_requests_waiting",
    "gear_requests_total": "vllm:request_success_total",
    "gear_prompt_tokens_total": "vllm:prompt_tokens_total",
    "gear_generation_tokens_total": "vllm:generation_tokens_total",
    "gear_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "gear_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "gear_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "gear_queue_time_seconds": "vllm:request_queue_time_seconds",
    "gear_batch_tokens": "vllm:iteration_tokens_total",
    "gear_pages": "vllm:kv_cache_usage_perc (a share; here slots by state)",
    "gear_cached_tokens_total": "vllm:prefix_cache_hits_total (in tokens there)",
    "gear_preemptions_total": "vllm:num_preemptions_total",
}

_HEAD = """\
# Metrics

At `/metrics`, in Prometheus' text format. Every metric carries the label `model` besides those listed; a histogram has
`_bucket`, `_sum` and `_count`. This page is made from `server/gear_server/metric_table.py`.

| metric | type | labels | what it says | in vLLM |
| --- | --- | --- | --- | --- |
"""


def markdown() -> str:
    """The whole page."""
    return _HEAD + "".join(_row(spec) for spec in METRICS)


def _row(spec: MetricSpec) -> str:
    text = spec.help
    if spec.buckets:
        text += f" Buckets from {_number(spec.buckets[0])} to {_number(spec.buckets[-1])}{_unit(spec.name)}."
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    vllm_name = VLLM_NAMES.get(spec.name, "")
    return f"| `{spec.name}` | {spec.kind} | {labels} | {text} | {vllm_name} |\n"


def _unit(name: str) -> str:
    return " s" if name.endswith("_seconds") else ""


def _number(x: float) -> str:
    return f"{x:,g}"


if __name__ == "__main__":
    print(markdown(), end="")
