"""The server as a process: start-up, signals and exit codes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

SERVE_SCRIPTED = Path(__file__).parent / "serve_scripted.py"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("GEAR_", "OTEL_"))}


def gear_serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gear_server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=ENVIRONMENT | environment)


@contextmanager
def scripted_server(
    folder: Path, settings: dict[str, Any], engine: dict[str, Any], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(SERVE_SCRIPTED), str(folder), json.dumps(settings), json.dumps(engine)]
    pipe = subprocess.PIPE
    variables = ENVIRONMENT | (environment or {})
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_url(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """The address that it printed, and the lines before."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        if line.startswith("listening on "):
            return line.removeprefix("listening on ").strip(), lines
        lines.append(line.strip())
    assert process.stderr is not None
    raise AssertionError(process.stderr.read())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_start_up_prints_the_memory_table_the_address_and_an_example_that_works(model_folder: Path) -> None:
    with scripted_server(model_folder, {"port": 0}, {}) as process:
        _, before = wait_for_url(process)
        assert before == ["MEMORY TABLE"]
        assert process.stdout is not None
        example = process.stdout.readline().removeprefix("try: ").strip()
        answer = subprocess.run(["bash", "-c", f"{example} -sS"], capture_output=True, text=True, timeout=10)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Hello world", answer.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_lets_a_running_stream_finish_and_exits_with_zero(model_folder: Path, number: int) -> None:
    engine = {"answer": [5] * 30, "step_s": 0.02}
    with scripted_server(model_folder, {"port": 0}, engine) as process:
        url, _ = wait_for_url(process)
        body = {"prompt": "Once", "stream": True, "max_tokens": 100}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            events = response.iter_lines()
            assert next(events).startswith("data: {")
            process.send_signal(number)
            time.sleep(0.1)
            assert httpx.get(f"{url}/ready").status_code == 503
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 503
            assert [line for line in events if line][-1] == "data: [DONE]"
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors


def test_a_second_signal_stops_at_once(model_folder: Path) -> None:
    engine = {"answer": [5] * 100, "step_s": 0.5}
    with scripted_server(model_folder, {"port": 0}, engine) as process:
        url, _ = wait_for_url(process)
        body = {"prompt": "Once", "stream": True, "max_tokens": 100}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            events = response.iter_lines()
            assert next(events).startswith("data: {")
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            began_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert any('"finish_reason":"abort"' in line for line in events)
        _, errors = process.communicate(timeout=10)
        assert "Traceback" not in errors
        assert time.monotonic() - began_s < 3
        assert process.returncode == 0


def test_an_idle_server_stops_within_a_second(model_folder: Path) -> None:
    with scripted_server(model_folder, {"port": 0}, {}) as process:
        url, _ = wait_for_url(process)
        with httpx.Client() as keeps_alive:
            keeps_alive.get(f"{url}/health")
            began_s = time.monotonic()
            process.terminate()
            process.communicate(timeout=10)
        assert time.monotonic() - began_s < 1.5
        assert process.returncode == 0


def test_a_signal_while_the_engine_starts_closes_it_and_exits_with_zero(model_folder: Path) -> None:
    with scripted_server(model_folder, {"port": 0}, {"kind": "slow"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        process.terminate()
        output, errors = process.communicate(timeout=10)
        assert (output, process.returncode) == ("closed\n", 0), errors


def test_an_engine_that_cannot_start_is_one_sentence_and_exit_code_one(model_folder: Path) -> None:
    with scripted_server(model_folder, {"port": 0}, {"kind": "failing"}) as process:
        _, errors = process.communicate(timeout=10)
    assert errors == "gear-serve: the model does not fit: lower --max-model-len\n"
    assert process.returncode == 1


def test_the_metrics_port_takes_metrics_and_health_off_the_public_one_and_needs_no_key(model_folder: Path) -> None:
    port = free_port()
    settings = {"port": 0, "api_key": "secret", "metrics_port": port}
    with scripted_server(model_folder, settings, {}) as process:
        url, before = wait_for_url(process)
        assert before == ["MEMORY TABLE", f"metrics on http://127.0.0.1:{port}/metrics"]
        key = {"Authorization": "Bearer secret"}
        for path in ("/metrics", "/health"):
            answer = httpx.get(f"{url}{path}", headers=key)
            assert answer.status_code == 404
            assert "--metrics-port" in answer.json()["error"]["message"]
            assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200
        assert "gear_requests_running" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert httpx.get(f"{url}/ready").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 404
        process.terminate()
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in errors


def test_metrics_are_served_while_the_public_port_drains(model_folder: Path) -> None:
    port = free_port()
    engine = {"answer": [5] * 30, "step_s": 0.02}
    with scripted_server(model_folder, {"port": 0, "metrics_port": port}, engine) as process:
        url, _ = wait_for_url(process)
        body = {"prompt": "Once", "stream": True, "max_tokens": 100}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            events = response.iter_lines()
            assert next(events).startswith("data: {")
            process.terminate()
            time.sleep(0.1)
            assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 503
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            assert [line for line in events if line][-1] == "data: [DONE]"
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0, errors


def test_a_busy_port_is_noticed_before_the_engine_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for flag in ("--port", "--metrics-port"):
            arguments = [flag, str(port)] if flag == "--port" else ["--port", "0", flag, str(port)]
            result = gear_serve("/no/such/model", *arguments)
            assert result.returncode == 1
            assert result.stderr == (
                f"gear-serve: port {port} is in use on 127.0.0.1: choose another one with {flag}\n"
            )


def test_an_open_door_is_refused_from_the_command_line() -> None:
    result = gear_serve("--host", "0.0.0.0")
    assert result.returncode == 2
    assert "--api-key (or GEAR_API_KEY)" in result.stderr
    assert "--insecure" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_value_is_one_sentence() -> None:
    result = gear_serve(GEAR_MAX_RUNNING="0")
    assert result.returncode == 2
    assert result.stderr == "gear-serve: max_running must be greater than or equal to 1, got 0\n"


def test_help_and_version_answer_in_a_blink() -> None:
    fastest_s = 10.0
    for _ in range(3):
        began_s = time.monotonic()
        result = gear_serve("--help")
        fastest_s = min(fastest_s, time.monotonic() - began_s)
        assert result.returncode == 0
    assert fastest_s < 0.6, "0.3 s on an idle machine; the test allows for a busy one"
    for option in ("--max-waiting", "GEAR_MAX_WAITING", "--metrics-port", "near-lossless"):
        assert option in result.stdout
    assert gear_serve("--version").stdout.startswith("gear-serve ")


@pytest.mark.parametrize("module", ["gear_server.cli", "gear_server.serving"])
def test_the_server_imports_no_torch_and_the_command_line_nothing_slow(module: str) -> None:
    code = f"import sys, {module}; print(' '.join(name for name in sys.modules if '.' not in name))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    loaded = set(result.stdout.split())
    assert "gear_server" in loaded, result.stderr
    assert not loaded & {"torch", "transformers", "numpy", "numba"}
    if module == "gear_server.cli":
        assert not loaded & {"fastapi", "starlette", "pydantic", "uvicorn", "zmq", "tokenizers", "prometheus_client"}
