"""The highest rate at which the default model meets an objective, and whether Prometheus sees the same load.

    python bench/server.py [--slo ttft=2s,itl=250ms,p=95] [--rate 0.5] [--duration-s 30] [--json OUT] [--html OUT]

Starts `gear-serve` and a Prometheus that scrapes it twice a second, runs `gear-loadtest --find-max-rate`, and then once
more at the rate found, twice as long and with nothing else before or after, so that Prometheus' rates are of that run
alone. The yardstick: 3 % between the client's throughput and Prometheus' rates, which extrapolate by a scrape (1 %).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

SCRAPE_S = 0.5
IDLE_S = 4.0
PORT, PROMETHEUS_PORT = 8123, 9123
URL = f"http://127.0.0.1:{PORT}"
CONFIG = f"""
global: {{scrape_interval: {SCRAPE_S * 1000:.0f}ms, scrape_timeout: {SCRAPE_S * 1000:.0f}ms}}
scrape_configs: [{{job_name: gearserve, static_configs: [{{targets: ["127.0.0.1:{PORT}"]}}]}}]
"""


@contextmanager
def started(command: list[str], ready_url: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            try:
                if httpx.get(ready_url).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, f"{command[0]} ended"
            time.sleep(0.25)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def rate(counter: str, start_s: float, end_s: float) -> float:
    """Prometheus' own, over that stretch of time."""
    query = f"sum(rate({counter}[{round((end_s - start_s) * 1000)}ms]))"
    answer = httpx.get(f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query", params={"query": query, "time": end_s})
    return float(answer.json()["data"]["result"][0]["value"][1])


def load_test(options: argparse.Namespace, report: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "gear_loadtest.cli", URL, "--slo", options.slo, "--input-len", "128",
               "--output-len", "32", "--json", str(report), *arguments]  # fmt: skip
    subprocess.run(command, check=False)  # status 1: the objective was missed, which the caller looks at
    time.sleep(IDLE_S)
    result: dict[str, Any] = json.loads(report.read_text())
    return result


def beside_prometheus(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    start_s, duration_s = datetime.fromisoformat(run["date"]).timestamp(), run["duration_s"]
    # Idle at both ends, so everything lies within; what the rate spreads over the idle time is given back.
    idle_s = IDLE_S / 2
    from_s, until_s = start_s - idle_s, start_s + duration_s + idle_s
    widening = (until_s - from_s) / duration_s
    pairs = {
        "tokens/s": (
            run["output_token_throughput"], rate("gear_generation_tokens_total", from_s, until_s) * widening
        ),
        "requests/s": (
            run["request_throughput"], rate('gear_requests_total{finish_reason="length"}', from_s, until_s) * widening
        ),
    }  # fmt: skip
    if steady := run["steady"]:
        bounds_s = (start_s + steady["start_s"], start_s + steady["end_s"])
        pairs["tokens/s, steady"] = (
            steady["output_token_throughput"], rate("gear_generation_tokens_total", *bounds_s)
        )  # fmt: skip
    return {
        what: {"client": ours, "prometheus": theirs, "ratio": ours / theirs} for what, (ours, theirs) in pairs.items()
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    (folder / "prometheus.yml").write_text(CONFIG)
    server = [sys.executable, "-m", "gear_server.cli", "--port", str(PORT), "--max-model-len", "2048"]
    prometheus = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                  f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}"]  # fmt: skip
    with started(server, f"{URL}/ready"), started(prometheus, f"http://127.0.0.1:{PROMETHEUS_PORT}/-/ready"):
        search = load_test(options, folder / "search.json", "--find-max-rate", "--rate", str(options.rate),
                           "--duration-s", str(options.duration_s), *(("--html", options.html) if options.html else ()),
                           )  # fmt: skip
        max_rate = search["max_rate"]
        assert max_rate is not None, "no rate met the objective: choose another --slo"
        run = load_test(
            options, folder / "run.json", "--rate", str(max_rate), "--duration-s", str(2 * options.duration_s)
        )
        return {
            "date": run["date"],
            "slo": options.slo,
            "input_len": 128,
            "output_len": 32,
            "max_rate": max_rate,
            "rates_tried": [one["command"]["rate"] for one in search["runs"]],
            "duration_s": run["duration_s"],
            "num_requests": run["num_ok"],
            "objective_met": run["objective_met"],
            "client_cpu_share": run["client"]["cpu_share"],  # of a core
            "beside_prometheus": beside_prometheus(run),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slo", default="ttft=2s,itl=250ms,p=95")
    parser.add_argument("--rate", type=float, default=0.5, help="to begin with")
    parser.add_argument("--duration-s", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(f"highest rate that meets {result['slo']}: {result['max_rate']:.3g}/s, {len(result['rates_tried'])} tried")
    print(f"{'':20} {'client':>10} {'Prometheus':>10} {'ratio':>8} (the goal: within 3 %)")
    for what, found in result["beside_prometheus"].items():
        print(f"{what:20} {found['client']:10.3f} {found['prometheus']:10.3f} {found['ratio']:8.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
