"""The files of compose/ against the code they name: settings, ports, metrics, commands."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scission.common.metrics import (
    DecodeMetrics,
    EngineMetrics,
    GatewayMetrics,
    HttpMetrics,
    Metrics,
    PrefillMetrics,
    RequestMetrics,
    TransferMetrics,
)
from scission.common.settings import read_settings
from scission.common.settings.table import SETTINGS
from scission.common.types import Role
from scission.services.cli import make_command

FOLDER = Path(__file__).parents[3] / "compose"
FILES = sorted(FOLDER.glob("compose*.yaml"))
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/scission.json").read_text())
SUFFIXES = ("_bucket", "_sum", "_count")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def services(path: Path = FOLDER / "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = load(path)["services"]
    return loaded


def metric_names() -> set[str]:
    names = set()
    groups: dict[Role, tuple[Any, ...]] = {
        Role.GATEWAY: (HttpMetrics, RequestMetrics, GatewayMetrics),
        Role.PREFILL: (EngineMetrics, PrefillMetrics, TransferMetrics),
        Role.DECODE: (EngineMetrics, DecodeMetrics, TransferMetrics),
    }
    for role, kinds in groups.items():
        metrics = Metrics(role, "m", "0")
        for kind in kinds:
            kind(metrics)
        for family in metrics.registry.collect():
            if family.type == "histogram":
                names |= {family.name + suffix for suffix in SUFFIXES}
            else:
                names.add(family.name + ("_total" if family.type == "counter" else ""))
    return names


def expressions() -> Iterator[str]:
    for file in ("rules.yml", "alerts.yml"):
        for group in load(FOLDER / "prometheus" / file)["groups"]:
            yield from (rule["expr"] for rule in group["rules"])
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (variable["definition"] for variable in DASHBOARD["templating"]["list"])


def test_every_metric_that_is_asked_for_is_exported() -> None:
    asked = {name for text in expressions() for name in re.findall(r"\bscission_\w+", text)}
    assert asked - metric_names() == set()
    assert len(asked) > 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_variable_of_a_service_is_a_setting(file: Path) -> None:
    known = {setting.variable for setting in SETTINGS}
    for service in services(file).values():
        given = {
            name for name in service.get("environment", {}) if str(name).startswith("SCISSION_")
        }
        assert given - known == set()


@pytest.mark.parametrize("service", ["gateway", "prefill", "decode"])
def test_a_service_starts_without_any_variable_set(service: str) -> None:
    described = services()[service]
    environment = {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))
        for name, value in described["environment"].items()
    }
    read_settings({}, environment)
    assert described["command"] == [service]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_old_and_new_compose_read_the_file(file: Path) -> None:
    loaded = load(file)
    assert not {"name", "version"} & loaded.keys()
    # docker-compose 1.29 knows the operators :- and :? only
    assert not re.search(r"\$\{\w+:?\+", file.read_text())


def test_every_lasting_service_has_a_health_check_and_a_start_period() -> None:
    for name, service in services().items():
        if name != "init":
            assert service["healthcheck"]["start_period"], name


def test_services_stop_in_the_time_their_drain_may_take() -> None:
    drain_s = next(setting.default for setting in SETTINGS if setting.name == "shutdown_timeout")
    for name in ("gateway", "prefill", "decode"):
        assert int(services()[name]["stop_grace_period"].removesuffix("s")) >= drain_s + 15


def test_health_checks_ask_where_the_service_listens() -> None:
    gateway, prefill = services()["gateway"], services()["prefill"]
    assert f":{gateway['environment']['SCISSION_PORT']}/ready" in gateway["healthcheck"]["test"][-1]
    address = prefill["healthcheck"]["test"][-1]
    assert address == f"127.0.0.1:{prefill['environment']['SCISSION_GRPC_PORT']}"
    registry = f"gateway:{gateway['environment']['SCISSION_REGISTRY_PORT']}"
    assert prefill["environment"]["SCISSION_GATEWAY"] == registry


def test_everything_is_published_on_loopback_unless_told() -> None:
    for name, service in services().items():
        for port in service.get("ports", ()):
            assert ":-127.0.0.1:" in port, name


def test_the_images_run_commands_that_exist_as_nobody_in_particular() -> None:
    commands = make_command().list_commands(None)  # type: ignore[attr-defined]
    for file in FOLDER.glob("*.Dockerfile"):
        text = file.read_text()
        assert "\nUSER scission\n" in text and "--uid 10001" in text
        default = re.search(r'^CMD \["(\w+)"\]', text, re.MULTILINE)
        assert default and default[1] in commands


def test_the_gateways_image_installs_no_torch() -> None:
    text = (FOLDER / "gateway.Dockerfile").read_text()
    assert "[worker]" not in text and "pip_install.sh /venv/bin/python ." in text


def test_the_dashboard_can_be_provisioned() -> None:
    source = load(FOLDER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert DASHBOARD["uid"] and "__inputs" not in DASHBOARD and "id" not in DASHBOARD
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == source["uid"]
            assert panel["targets"], panel["title"]
    titles = " ".join(panel["title"] for panel in DASHBOARD["panels"])
    assert "TTFT" in titles and "TPOT" in titles


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= covered


def test_alerts_say_what_to_do() -> None:
    for group in load(FOLDER / "prometheus/alerts.yml")["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"] and rule["annotations"]["runbook"]
            assert rule["labels"]["severity"] in ("warning", "critical")
