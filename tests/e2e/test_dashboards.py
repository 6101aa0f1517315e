"""Every query of dashboards, rules and alerts has data: a real Prometheus scrapes the real server under load."""

import json
import re
import runpy
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from gear_server.metric_table import METRICS
from tests.e2e.serving import MODEL, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SCHEMA = json.loads((Path(__file__).parent / "grafana_schema/dashboard.schema.json").read_text())
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(DEPLOY.glob("grafana/dashboards/*.json"))}
RULES = [rule for group in yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"] for rule in group["rules"]]
QUERIES = [
    pytest.param(target["expr"], id=f"{name}: {panel['title']}, {target['legendFormat']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    for target in panel["targets"]
]
ALERTS = [pytest.param(rule["expr"], id=rule["alert"]) for rule in RULES if "alert" in rule]
RECORDED = [rule["record"] for rule in RULES if "record" in rule]


@pytest.fixture(scope="module")
def prometheus(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus with the shipped configuration, aimed at the server, after a little traffic."""
    assert shutil.which("prometheus"), "install it: apt-get install prometheus"
    folder = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    configuration["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
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
        with httpx.Client(base_url=f"http://{address}") as client:
            yield client
    finally:
        process.terminate()
        process.wait(timeout=20)


def value(prometheus: httpx.Client, expression: str) -> list[float]:
    for variable in ("$job", "$model", "$instance"):
        expression = expression.replace(variable, ".*")
    expression = expression.replace("$__rate_interval", "30s")
    answer = prometheus.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    return [float(sample["value"][1]) for sample in answer["data"]["result"]]


def assert_data(prometheus: httpx.Client, expression: str) -> None:
    values = value(prometheus, expression)
    assert values, f"no data: {expression}"
    assert all(v == v for v in values), f"{values}: {expression}"  # NaN: a histogram without observations


@pytest.mark.parametrize("expression", QUERIES)
def test_every_query_of_a_panel_returns_data(prometheus: httpx.Client, expression: str) -> None:
    assert_data(prometheus, expression)


@pytest.mark.parametrize("name", RECORDED)
def test_every_recording_rule_records(prometheus: httpx.Client, name: str) -> None:
    deadline = time.monotonic() + 10
    while not value(prometheus, name) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert_data(prometheus, name)


@pytest.mark.parametrize("expression", ALERTS)
def test_every_alert_has_something_to_compare(prometheus: httpx.Client, expression: str) -> None:
    """Whether it holds or not: `bool` makes a comparison answer 0 or 1 instead of nothing."""
    answers_always = re.sub(r" (==|[<>]=?) ", r" \1 bool ", expression)
    assert answers_always != expression
    assert_data(prometheus, answers_always.replace(" offset 1h", ""))  # the server is younger


def test_every_metric_that_is_named_is_exported() -> None:
    exported = {spec.name for spec in METRICS}
    text = json.dumps(list(DASHBOARDS.values())) + json.dumps(RULES)
    named = {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\bgear_[a-z0-9_]+", text)}
    assert named <= exported, named - exported
    assert exported - named == set(), "measured, and shown nowhere"


def test_the_rules_fire_when_they_should_and_not_before() -> None:
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        run = subprocess.run(["promtool", *command], cwd=DEPLOY, text=True, capture_output=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_the_dashboards_are_what_dashboards_py_writes() -> None:
    written = runpy.run_path(str(DEPLOY / "grafana/dashboards.py"))["DASHBOARDS"]
    assert {dashboard.uid: dashboard.json() for dashboard in written} == DASHBOARDS, "run deploy/grafana/dashboards.py"
    assert len(DASHBOARDS) == 3


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_conforms_to_grafanas_schema(name: str) -> None:
    jsonschema.validate(DASHBOARDS[name], SCHEMA)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("panels", 0, "type"), "statt"),
        (("panels", 0, "options", "colorMode"), "values"),
        (("panels", 0, "targets", 0, "exp"), "up"),
        (("panels", 6, "fieldConfig", "defaults", "custom", "lineWidht"), 1),
        (("templating", "list", 1, "type"), "querry"),
    ],
)
def test_the_schema_tells_a_slip(place: tuple[str | int, ...], wrong: object) -> None:
    dashboard = json.loads(json.dumps(DASHBOARDS["gearserve-overview"]))
    inner: Any = dashboard
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(dashboard, SCHEMA)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_whole(name: str) -> None:
    dashboard = DASHBOARDS[name]
    panels = dashboard["panels"]
    places = [panel["gridPos"] for panel in panels]
    cells = [(at["x"] + dx, at["y"] + dy) for at in places for dx in range(at["w"]) for dy in range(at["h"])]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == [
        "datasource",
        "job",
        "model",
        "instance",
    ]
    assert any(link["type"] == "dashboards" and link["includeVars"] for link in dashboard["links"])
    for panel in panels:
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["legendFormat"]
            selected = re.findall(r"\{([^}]*)\}", target["expr"])
            assert all('job=~"$job", model=~"$model", instance=~"$instance"' in one for one in selected)
            assert "rate(" not in target["expr"] or "[$__rate_interval]" in target["expr"]


def test_promtool_accepts_configuration_and_metrics(url: str) -> None:
    subprocess.run(["promtool", "check", "config", str(DEPLOY / "prometheus.yml")], check=True, capture_output=True)
    text = httpx.get(f"{url}/metrics").text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_compose_puts_rules_and_dashboards_where_they_are_looked_for(tmp_path: Path) -> None:
    """There is no container engine here: what the files say of each other is compared."""
    prometheus, grafana = COMPOSE["services"]["prometheus"], COMPOSE["services"]["grafana"]
    content = COMPOSE["configs"]["prometheus"]["content"].replace("${GEAR_API_KEY}", "secret")
    assert "$" not in content
    (tmp_path / "prometheus.yml").write_text(content)
    shutil.copy(DEPLOY / "rules.yml", tmp_path)
    subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, check=True, capture_output=True)
    shipped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    job = yaml.safe_load(content)["scrape_configs"][0]
    assert job["job_name"] == shipped["scrape_configs"][0]["job_name"]
    assert job["static_configs"][0]["targets"] == ["gearserve:8000"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"] + prometheus["volumes"])
    assert all((DEPLOY / path).exists() for path in mounts)
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/gearserve.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == (
        f"{mounts['./grafana/dashboards']}/gearserve-overview.json"
    )
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == yaml.safe_load(content)["global"]["scrape_interval"]
    version = grafana["image"].partition(":")[2]
    assert f'"@grafana/schema": "{version}"' in (Path(__file__).parent / "grafana_schema/make.py").read_text()
