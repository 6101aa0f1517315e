"""The highest rate at which the default model meets an objective, and whether Prometheus saw the same load.

    python bench/server.py [--slo ttft=2s,itl=250ms,p=95] [--rate 0.5] [--duration-s 30] [--json OUT] [--html OUT]

Starts `gear-serve` and a Prometheus that scrapes it twice a second, runs `gear-loadtest --find-max-rate`, then asks
Prometheus for its rate of tokens and requests over each run that met the objective (one that did not is cut off). The
yardstick: 3 % between the client's throughput and Prometheus' rate, over the whole run and over the client's steady
window.
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


def rate(metric: str, start_s: float, end_s: float) -> float:
    """Prometheus' own, over that stretch of time."""
    query = f"sum(rate({metric}[{round((end_s - start_s) * 1000)}ms]))"
    answer = httpx.get(f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query", params={"query": query, "time": end_s})
    return float(answer.json()["data"]["result"][0]["value"][1])


def beside_prometheus(run: dict[str, Any]) -> dict[str, Any]:
    start_s = datetime.fromisoformat(run["date"]).timestamp()
    duration_s = run["duration_s"]
    # Idle at both ends, so that every token lies within; what Prometheus spreads over these is given back.
    wide_s = duration_s + 4 * SCRAPE_S
    widening = wide_s / duration_s
    whole_end_s = start_s + duration_s + 2 * SCRAPE_S
    found = {
        "rate": run["command"]["rate"],
        "tokens_per_s": run["output_token_throughput"],
        "tokens_per_s_prometheus": rate("gear_generation_tokens_total", whole_end_s - wide_s, whole_end_s) * widening,
        "requests_per_s": run["request_throughput"],
        "requests_per_s_prometheus": rate("gear_requests_total", whole_end_s - wide_s, whole_end_s) * widening,
    }
    if steady := run["steady"]:
        bounds_s = (start_s + steady["start_s"], start_s + steady["end_s"])
        found["steady_tokens_per_s"] = steady["output_token_throughput"]
        found["steady_tokens_per_s_prometheus"] = rate("gear_generation_tokens_total", *bounds_s)
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    (folder / "prometheus.yml").write_text(CONFIG)
    server = [sys.executable, "-m", "gear_server.cli", "--port", str(PORT), "--max-model-len", "2048"]
    prometheus = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                  f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}"]  # fmt: skip
    report = folder / "report.json"
    load = [sys.executable, "-m", "gear_loadtest.cli", URL, "--find-max-rate", "--slo", options.slo,
            "--rate", str(options.rate), "--duration-s", str(options.duration_s),
            "--input-len", "128", "--output-len", "32", "--json", str(report)]  # fmt: skip
    load += ["--html", options.html] if options.html else []
    with started(server, f"{URL}/ready"), started(prometheus, f"http://127.0.0.1:{PROMETHEUS_PORT}/-/ready"):
        subprocess.run(load, check=True)
        time.sleep(3 * SCRAPE_S)
        search = json.loads(report.read_text())
        met = [beside_prometheus(run) for run in search["runs"] if run["objective_met"]]
    return {
        "date": search["runs"][0]["date"],
        "slo": options.slo,
        "input_len": 128,
        "output_len": 32,
        "duration_s": options.duration_s,
        "max_rate": search["max_rate"],
        "num_runs": len(search["runs"]),
        "client_cpu_share": max(run["client"]["cpu_share"] for run in search["runs"]),  # of a core
        "runs_that_met": met,
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
    print(f"highest rate that meets {result['slo']}: {result['max_rate']:.3g} requests/s, in {result['num_runs']} runs")
    print("rate      what                    client  Prometheus  ratio (the goal: within 3 %)")
    for run in result["runs_that_met"]:
        for name in [name for name in run if name.endswith("_prometheus")]:
            ours, theirs = run[name.removesuffix("_prometheus")], run[name]
            what = name.removesuffix("_prometheus")
            print(f"{run['rate']:<9.3g} {what:<20} {ours:9.2f}   {theirs:9.2f}  {ours / theirs:.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
