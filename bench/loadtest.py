"""What the load tester itself costs: its CPU for a chunk, and the chunks a second that one core sustains.

    python bench/loadtest.py [--concurrency 100] [--duration-s 10] [--workers 1] [--json OUT]

Against the tests' stub server in another process, which sends a chunk every 15 ms to each stream. The yardstick:
5,000 chunks/s leave 0.2 ms a chunk.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from gear_loadtest.plan import LoadPlan
from gear_loadtest.report import Report
from gear_loadtest.run import run_load_test
from gear_loadtest.target import parse_target

_ITL_S = 0.015


def _serve(connection: Connection) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "loadtest"))
    from stub_openai_server import StubServer

    async def serve() -> None:
        async with StubServer(ttft_s=0.02, itl_s=_ITL_S).serve() as stub:
            connection.send(stub.url)
            await asyncio.Event().wait()

    asyncio.run(serve())


def _measure(plan: LoadPlan) -> Report:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        return asyncio.run(run_load_test(plan, parse_target(ours.recv()), Console(stderr=True)))
    finally:
        server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--duration-s", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = _measure(
        LoadPlan(
            concurrency=options.concurrency,
            duration_s=options.duration_s,
            workers=options.workers,
            input_len="32",
            output_len="256",
        )
    )
    cpu_ms, itl = report.client.cpu_ms_per_chunk, report.itl_s
    assert cpu_ms is not None
    assert itl is not None
    if options.json:
        figures = {
            "date": report.date,
            "concurrency": options.concurrency,
            "workers": options.workers,
            "chunks_per_s": report.chunks.total / report.duration_s,
            "cpu_ms_per_chunk": cpu_ms,
            "cpu_share": report.client.cpu_share,
            "itl_p50_ms": itl.p50 * 1000,
            "invalid": report.client.invalid,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{report.chunks.total / report.duration_s:10,.0f} chunks/s received (the goal: 5,000 on one core)")
    print(f"{cpu_ms:10.3f} ms of CPU a chunk (the goal: under 0.2)")
    print(f"{1000 / cpu_ms:10,.0f} chunks/s that a whole core would sustain")
    print(f"{report.client.cpu_share:10.0%} of a core used by the busiest process")
    print(f"{itl.p50 * 1000:10.2f} ms ITL p50 (the stub: {_ITL_S * 1000:g}); {report.client.invalid or 'valid'}")


if __name__ == "__main__":
    main()
