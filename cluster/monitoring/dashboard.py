"""Makes Grafana's JSON of the panels: https://grafana.com/docs/grafana/latest/dashboards."""

from __future__ import annotations

from itertools import count
from string import ascii_uppercase
from typing import Any

from cluster.monitoring.panels import ROWS, VARIABLES, Panel

SOURCE = {"type": "prometheus", "uid": "prometheus"}
"""As `grafana/provisioning/datasources` has it."""
SCHEMA_VERSION = 41
"""Grafana 12's."""
WIDTH = 24
"""Columns of Grafana's grid."""
NUMBER_HEIGHT, GRAPH_HEIGHT = 4, 8

Json = dict[str, Any]


def build_dashboard() -> Json:
    """The dashboard."""
    return {
        "uid": "trunkline",
        "title": "Trunkline",
        "tags": ["trunkline"],
        "description": "docs/operations.md says what to do.",
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one line through all graphs
        "refresh": "30s",
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_variable(name, query) for name, query in VARIABLES.items()]},
        "annotations": {"list": []},
        "links": [],
        "panels": _panels(),
    }


def _panels() -> list[Json]:
    ids, made, top = count(1), [], 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        head = {"id": next(ids), "type": "row", "title": title, "gridPos": place, "panels": []}
        made.append({**head, "collapsed": False})
        width, height = WIDTH // len(row), GRAPH_HEIGHT if row[0].limits is None else NUMBER_HEIGHT
        for column, panel in enumerate(row):
            place = {"x": column * width, "y": top + 1, "w": width, "h": height}
            made.append({"id": next(ids), "gridPos": place, **_panel(panel)})
        top += 1 + height
    return made


def _panel(panel: Panel) -> Json:
    made = _graph(panel) if panel.limits is None else _number(panel, *panel.limits)
    targets = [
        {"refId": letter, "datasource": SOURCE, "expr": expr, "legendFormat": legend or "all"}
        for letter, (legend, expr) in zip(ascii_uppercase, panel.queries.items(), strict=False)
    ]
    head = {"title": panel.title, "description": panel.says, "datasource": SOURCE}
    return {**head, **made, "targets": targets}


def _graph(panel: Panel) -> Json:
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 5,
        "showPoints": "never",
        "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
    }
    defaults = {"unit": panel.unit, "min": 0, "custom": custom}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
    }


def _number(panel: Panel, orange: float, red: float) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    steps += [{"color": "orange", "value": orange}, {"color": "red", "value": red}]
    thresholds = {"mode": "absolute", "steps": steps}
    return {
        "type": "stat",
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "decimals": 2, "thresholds": thresholds},
            "overrides": [],
        },
        "options": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
            "textMode": "value",
        },
    }


def _variable(name: str, query: str) -> Json:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,  # when the time changes, as engines come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }
