"""Writes the files that are made from others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.monitoring.dashboard import build_dashboard

CLUSTER = Path(__file__).parent.parent
DASHBOARD = CLUSTER / "docker" / "grafana" / "dashboards" / "trunkline.json"
ALERTS = CLUSTER / "docker" / "alerts.yaml"
RULE = CLUSTER / "kuberay" / "alerts.yaml"
_RULE_HEAD = """\
# For the Prometheus Operator: `kubectl apply -f cluster/kuberay/alerts.yaml`. Written from
# ../docker/alerts.yaml by `python -m cluster.monitoring`. Many operators want a label here, such as
# `release: …`; see ruleSelector of the Prometheus.
"""


def files() -> dict[Path, str]:
    """The text of each file."""
    return {
        DASHBOARD: json.dumps(build_dashboard(), indent=1) + "\n",
        RULE: _RULE_HEAD + yaml.safe_dump(_rule(), sort_keys=False, width=100),
    }


def _rule() -> dict[str, Any]:
    """The alerts as the Prometheus Operator takes them."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "trunkline"},
        "spec": yaml.safe_load(ALERTS.read_text()),
    }


def main() -> None:
    """Run the command line."""
    for path, text in files().items():
        path.write_text(text)
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
