"""One server with the real model for all end-to-end tests, whose start is the slow part; and a real browser."""

import contextlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from selenium import webdriver

from tests.e2e.serving import START_TIMEOUT_S, free_port, serve

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


def _read(process: "subprocess.Popen[str]", lines: list[str]) -> None:
    with process.stdout or contextlib.nullcontext([]) as stdout:
        lines.extend(stdout)


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    port = free_port()
    process = serve("--port", str(port), "--max-model-len", "2048")
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()  # a pipe that nobody reads fills up, and the server would wait for ever to log a line
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"{base}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            process.kill()
            raise AssertionError("".join(lines))
        yield base
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        reader.join()
    output = "".join(lines)
    assert process.returncode == 0, output
    assert "tokens fit" in output  # the memory table


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    browser, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser is not None, "install it: apt-get install chromium"
    assert chromedriver is not None, "install it: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()
