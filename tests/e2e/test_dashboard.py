"""Every query of the dashboard and every metric of the rules has data: a real Prometheus scrapes the real server."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.serving import MODEL, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/gearserve.json").read_text())
RULES = yaml.safe_load((DEPLOY / "rules.yml").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def prometheus(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with the shipped configuration, aimed at the server, after a little traffic."""
    assert shutil.which("prometheus"), "install it: apt-get install prometheus"
    folder = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    configuration["global"]["scrape_interval"] = "1s"
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [url.removeprefix("http://")]
    shutil.copy(DEPLOY / "rules.yml", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(6):
            prompt = "Once upon a time " * 40  # more than a page, so that one is sealed
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "stream": True}
            httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            time.sleep(1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def value(prometheus: str, expression: str) -> list[float]:
    for variable, text in (("$job", ".*"), ("$model", ".*"), ("$__rate_interval", "30s")):
        expression = expression.replace(variable, text)
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    return [float(sample["value"][1]) for sample in answer["data"]["result"]]


@pytest.mark.parametrize(("title", "expression"), QUERIES)
def test_every_query_returns_data(prometheus: str, title: str, expression: str) -> None:
    values = value(prometheus, expression)
    assert values, f"{title}: no data"
    assert all(v == v for v in values), f"{title}: {values}"  # NaN: a histogram without observations


def test_every_metric_that_a_rule_names_is_there(prometheus: str) -> None:
    text = "\n".join(rule["expr"] for group in RULES["groups"] for rule in group["rules"])
    named = set(re.findall(r"gear_[a-z_]+|\bup\b", text))
    assert len(named) >= 8
    for name in named:
        assert value(prometheus, f"count({name})"), name


def test_the_rules_fire_when_they_should_and_not_before() -> None:
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        run = subprocess.run(["promtool", *command], cwd=DEPLOY, text=True, capture_output=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_the_dashboard_is_whole() -> None:
    cells = [(p["gridPos"]["x"] + dx, p["gridPos"]["y"] + dy) for p in DASHBOARD["panels"]
             for dx in range(p["gridPos"]["w"]) for dy in range(p["gridPos"]["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)), "panels overlap"
    assert all(p["description"] and p["fieldConfig"]["defaults"]["unit"] for p in DASHBOARD["panels"])
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_promtool_accepts_configuration_and_metrics(url: str) -> None:
    subprocess.run(["promtool", "check", "config", str(DEPLOY / "prometheus.yml")], check=True, capture_output=True)
    text = httpx.get(f"{url}/metrics").text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
