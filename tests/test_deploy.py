"""What is deployed fits together: files that are mounted exist, and charts and alerts name metrics that are there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.config import ServeSettings, env_of, load_config
from loraplex_server.demo import DEMO_ADAPTERS_ROOT, DEMO_MODEL
from loraplex_server.metrics import Metrics

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "loraplex.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"

# Labels that Prometheus itself adds.
PROMETHEUS_LABELS = {"job", "instance"}
METRIC = re.compile(r"\b(?:loraplex_|vllm:|process_)[a-z0-9_]+|\bup\b")


class ComposeLoader(yaml.SafeLoader):
    """YAML with compose's own tags."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=ComposeLoader)


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every alert, panel and variable."""
    for group in read_yaml(ALERTS)["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for variable in dashboard["templating"]["list"]:
        yield f"${variable['name']}", variable["definition"]
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Every sample's name and the names of its labels, as a server writes them."""
    metrics = Metrics(model_name="m", names=dict)
    metrics.start(None, "base").on_finish("stop", seconds=1, prompt_tokens=1, output_tokens=1, queue_s=0)
    found: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=lambda text: text[:40])
def test_charts_and_alerts_name_metrics_that_exist(where: str, expression: str, exposed: dict[str, set[str]]) -> None:
    named = METRIC.findall(expression)
    assert named, f"{where} reads no metric"
    for metric in named:
        assert metric in exposed, f"{where} reads {metric}, which no server writes"
    known = set().union(PROMETHEUS_LABELS, *(exposed[metric] for metric in named))
    for labels in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in labels.split(",")} <= known, f"{where}: {labels}"
    for metric, selector in re.findall(r"([a-z_:]+)\{([^}]*)\}", expression):
        used = set(re.findall(r"(\w+)\s*=~?", selector))
        assert used <= exposed[metric] | PROMETHEUS_LABELS, f"{where}: {metric} has no {used - exposed[metric]}"


def test_every_metric_of_ours_has_a_place_on_the_dashboard(exposed: dict[str, set[str]]) -> None:
    shown = {metric for _, expression in expressions() for metric in METRIC.findall(expression)}
    families = {re.sub(r"_(bucket|sum|count)$", "", metric) for metric in shown}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed if name.startswith("loraplex_")}
    assert ours - families == {"loraplex_kv_blocks_used", "loraplex_kv_blocks_limit"}  # shown as their ratio


def test_panels_read_the_provisioned_data_source() -> None:
    (source,) = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    for part in (*panels, *dashboard["templating"]["list"]):
        assert part["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert part["description"]
    assert source["url"] == "http://prometheus:9090"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_compose_mounts_what_is_there() -> None:
    compose = read_yaml(ROOT / "docker-compose.yml")
    for service in compose["services"].values():
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), source
            else:
                assert source in compose["volumes"]
        assert service["healthcheck"]["test"]
    provider = read_yaml(DEPLOY / "grafana/provisioning/dashboards/loraplex.yml")["providers"][0]
    mounts = dict(mount.split(":")[:2] for mount in compose["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    (rules,) = read_yaml(DEPLOY / "prometheus/prometheus.yml")["rule_files"]
    assert rules in dict(mount.split(":")[1::-1] for mount in compose["services"]["prometheus"]["volumes"])


def test_prometheus_scrapes_the_server_of_compose() -> None:
    compose = read_yaml(ROOT / "docker-compose.yml")
    (job,) = read_yaml(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert compose["services"][host]["ports"][0].endswith(f":{port}")


def test_compose_sets_settings_that_exist() -> None:
    known = {env_of(setting) for setting in ServeSettings.model_fields}
    for name in ("docker-compose.yml", "docker-compose.cpu.yml"):
        environment = read_yaml(ROOT / name)["services"]["server"]["environment"]
        assert {key for key in environment if key.startswith("LORAPLEX_")} <= known
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"\b(LORAPLEX_[A-Z_]+)=", image)) <= known


def test_the_cpu_override_is_a_valid_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ServeSettings.model_fields:
        monkeypatch.delenv(env_of(setting), raising=False)
    flags: dict[str, Any] = {}
    for argument in read_yaml(ROOT / "docker-compose.cpu.yml")["services"]["server"]["command"]:
        flag, _, value = argument.partition("=")
        setting = flag.removeprefix("--").replace("-", "_")
        value = value.replace("/opt/loraplex/demo", str(DEMO_MODEL.parent))
        flags[setting] = [*flags.get(setting, []), value] if setting in ("adapter", "served_model_name") else value
    config = load_config(flags)
    assert Path(config.model.model) == DEMO_MODEL
    assert config.adapters.preloaded
    for adapter in config.adapters.preloaded:
        assert Path(adapter.source) == DEMO_ADAPTERS_ROOT / adapter.name
        assert Path(adapter.source).is_dir()


def test_the_image_is_built_from_what_the_context_holds() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", image, re.M)
    for name in " ".join(copied).split():
        assert name in allowed, f"{name} is copied and ignored"
        assert (ROOT / name).exists()
    assert re.search(r"^USER loraplex$", image, re.M)
    assert re.search(r"^HEALTHCHECK", image, re.M)
