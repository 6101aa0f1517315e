"""gear-loadtest against the real server: a search ends, counts are the server's, and its page opens in a browser."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

SEARCH = ["--find-max-rate", "--slo", "ttft=1.5s,itl=1s,p=80", "--rate", "4", "--duration-s", "2"]
REQUEST = ["--input-len", "16", "--output-len", "8"]
COUNTER = "gear_generation_tokens_total"


@pytest.fixture(scope="module")
def folder(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the files of a search, short and of small requests: it is the way that is tested, not the machine."""
    folder = tmp_path_factory.mktemp("search")
    files = [
        argument for kind in ("json", "csv", "html", "png") for argument in (f"--{kind}", f"{folder}/search.{kind}")
    ]
    command = [sys.executable, "-m", "gear_loadtest.cli", url, *SEARCH, *REQUEST, *files]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=os.environ)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Highest rate that meets the objective" in run.stdout
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "search.json").read_text())["runs"]
    return found


def test_the_search_closes_in_on_the_highest_rate(folder: Path, runs: list[dict[str, Any]]) -> None:
    highest = json.loads((folder / "search.json").read_text())["max_rate"]
    rates = {run["command"]["rate"]: run["objective_met"] for run in runs}
    assert rates[highest]
    missed = [rate for rate, met in rates.items() if not met]
    assert highest < min(missed) <= highest * 1.06
    assert len((folder / "search.csv").read_text().splitlines()) == 1 + len(runs)


def test_client_and_server_count_the_same_tokens(runs: list[dict[str, Any]]) -> None:
    whole = [run for run in runs if run["objective_met"]]  # one that is lost is cut off
    assert whole
    for run in whole:
        tokens = run["output_token_throughput"] * run["duration_s"]
        assert tokens == pytest.approx(run["server"]["counters"][COUNTER], rel=0.03)
        assert run["client"]["invalid"] is None


def test_the_page_opens_in_a_browser_without_an_error(
    folder: Path, runs: list[dict[str, Any]], driver: webdriver.Chrome
) -> None:
    driver.get(f"file://{folder}/search.html")
    assert driver.title == "Load tests of SmolLM2-135M-Instruct"
    plots = driver.find_elements(By.TAG_NAME, "svg")
    assert len(plots) == 1 + len(runs)
    assert all(plot.is_displayed() and plot.size["height"] > 200 for plot in plots)
    assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert [entry["message"] for entry in driver.get_log("browser")] == []
