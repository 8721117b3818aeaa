"""The dashboard and the alerts, as far as that can be told without Grafana.

That a server exports what they ask for: `tests/integration/test_plane.py`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest

from cluster.monitoring.__main__ import DASHBOARD, files
from cluster.monitoring.queries import PREFIX
from deployments.samples import FAMILIES
from tests.cluster.documents import CLUSTER, ROOT, load

DOCKER = CLUSTER / "docker"
PANELS = json.loads(DASHBOARD.read_text())["panels"]
RULES = load(DOCKER / "alerts.yaml")["groups"][0]["rules"]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def dashboard_queries() -> dict[str, str]:
    """Panel and legend → PromQL, with values in place of Grafana's variables."""
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$model", ".*")
        .replace("$deployment", ".*")
        for panel in PANELS
        for target in panel.get("targets", [])
    }


def all_queries() -> dict[str, str]:
    return dashboard_queries() | {rule["alert"]: rule["expr"] for rule in RULES}


def selectors(query: str) -> Iterator[Any]:
    """What a query reads."""
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    yield from found


def names(query: str) -> set[str]:
    return {selector.name for selector in selectors(query)}


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_files_are_as_they_are_written(path):
    assert path.read_text() == files()[path], "run `python -m cluster.monitoring`"


@pytest.mark.parametrize("title", all_queries())
def test_queries_ask_for_what_is_measured(title):
    query = all_queries()[title]
    assert "$" not in query
    own = {name.removeprefix(PREFIX) for name in names(query) if name.startswith(PREFIX)}
    for name in own:
        family = FAMILIES.get(name)
        if family is None:
            assert FAMILIES[re.sub("_(bucket|sum|count)$", "", name)].kind == "histogram"
        else:
            assert family.kind in ("gauge", "counter")
            assert (f"rate({PREFIX}{name}" in query or "increase(" in query) == (
                family.kind == "counter"
            )
    assert own or names(query) <= {"ray_node_cpu_utilization", "ray_node_mem_used"}


def test_panels_stand_side_by_side():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    for one, other in itertools.combinations(places, 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert max(place["x"] + place["w"] for place in places) == 24


def test_the_dashboard_names_the_data_source():
    (source,) = load(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    for each in [*PANELS, *variables]:
        for asked in [*each.get("targets", []), each]:
            if each.get("type") != "row":
                assert asked["datasource"] == {"type": source["type"], "uid": source["uid"]}


def test_prometheus_reads_the_alerts():
    (inside,) = load(DOCKER / "prometheus.yaml")["rule_files"]
    mounts = load(DOCKER / "compose.yaml")["services"]["prometheus"]["volumes"]
    assert f"./alerts.yaml:{inside}:ro" in mounts


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_say_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert f"`{rule['alert']}`" in OPERATIONS


@pytest.mark.parametrize(
    ("alert", "title"),
    [
        ("TrunklineServerErrors", "Server errors"),
        ("TrunklineSlowFirstToken", "Time to first token"),
        ("TrunklineSlowFirstToken", "Time to first token, p95"),
        ("TrunklineSlowTokens", "Inter-token latency"),
        ("TrunklineSlowTokens", "Inter-token latency, p95"),
        ("TrunklineStalledStep", "Time since a step ended"),
        ("TrunklineEventLoopLag", "Event loop lag"),
        ("TrunklineEventLoopLag", "Event loop lag, worst"),
    ],
)
def test_panels_are_red_where_alerts_go_off(alert, title):
    (rule,) = [rule for rule in RULES if rule["alert"] == alert]
    (panel,) = [panel for panel in PANELS if panel["title"] == title]
    last = panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]
    assert last == {"color": "red", "value": float(rule["expr"].split(" > ")[-1])}


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_explain_each_metric(family):
    assert f"`{family}`" in OPERATIONS
