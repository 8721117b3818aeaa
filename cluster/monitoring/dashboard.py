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
WHOLE = {"percentunit": 1, "percent": 100}
"""Units in which there is a most."""

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
        width, height = WIDTH // len(row), NUMBER_HEIGHT if row[0].number else GRAPH_HEIGHT
        for column, panel in enumerate(row):
            place = {"x": column * width, "y": top + 1, "w": width, "h": height}
            made.append({"id": next(ids), "gridPos": place, **_panel(panel)})
        top += 1 + height
    return made


def _panel(panel: Panel) -> Json:
    targets = [
        {"refId": letter, "datasource": SOURCE, "expr": expr, "legendFormat": legend or "all"}
        for letter, (legend, expr) in zip(ascii_uppercase, panel.queries.items(), strict=False)
    ]
    head = {"title": panel.title, "description": panel.says, "datasource": SOURCE}
    made = _number(panel) if panel.number else _graph(panel)
    return {**head, **made, "targets": targets}


def _graph(panel: Panel) -> Json:
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 5,
        "showPoints": "never",
        "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
        "thresholdsStyle": {"mode": "dashed" if panel.limits else "off"},
    }
    defaults = {"unit": panel.unit, "min": 0, "custom": custom}
    defaults |= {"color": {"mode": "palette-classic"}, "thresholds": _thresholds(panel, "red")}
    if panel.unit in WHOLE:
        defaults["max"] = WHOLE[panel.unit]
    overrides = [_colored(*pair) for pair in panel.colors]
    named = list(panel.queries) != [""]
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": named, "calcs": []}
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
    }


def _colored(legends: str, color: str) -> Json:
    """A color for some of the lines, whatever else there is."""
    value = {"mode": "shades" if legends.startswith("/") else "fixed", "fixedColor": color}
    matcher = {"id": "byRegexp", "options": legends}
    return {"matcher": matcher, "properties": [{"id": "color", "value": value}]}


def _number(panel: Panel) -> Json:
    thresholds = _thresholds(panel, "orange", "red")
    defaults = {"unit": panel.unit, "min": 0, "decimals": 2, "thresholds": thresholds}
    defaults["color"] = {"mode": "thresholds"}
    return {
        "type": "stat",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value" if panel.limits else "none",
            "graphMode": "area",
            "textMode": "value",
        },
    }


def _thresholds(panel: Panel, *colors: str) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    steps += [
        {"color": color, "value": limit}
        for color, limit in zip(colors, panel.limits, strict=bool(panel.limits))
    ]
    return {"mode": "absolute", "steps": steps}


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
