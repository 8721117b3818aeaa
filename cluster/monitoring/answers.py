"""Asks a Prometheus what the panels of the dashboard would show, for `picture/` to draw.

python -m cluster.monitoring.answers --url http://127.0.0.1:9090 --minutes 10 > answers.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.request
from typing import Any
from urllib.parse import urlencode

from cluster.monitoring.__main__ import DASHBOARD

SCRAPE_S = 10
"""The data source's `timeInterval`."""
POINTS = 400
"""Of a series, at most: about one for each pixel of a panel."""

Json = dict[str, Any]


class Prometheus:
    """Answers queries over a range of time.

    Args:
        url: of the server, such as `http://127.0.0.1:9090`.
        begin: seconds since the epoch.
        end: likewise.
    """

    def __init__(self, url: str, begin: float, end: float) -> None:
        self._url = url.rstrip("/")
        self._begin = begin
        self._end = end
        self._step_s = max(SCRAPE_S, round((end - begin) / POINTS))

    def series(self, target: Json) -> list[Json]:
        """What one query of a panel brings: `legend`, and `values` of time and number or None.

        Raises:
            OSError: Prometheus is not there, or does not like the query.
        """
        words = {
            "query": _without_variables(target["expr"], self._step_s),
            "start": self._begin,
            "end": self._end,
            "step": self._step_s,
        }
        with urllib.request.urlopen(f"{self._url}/api/v1/query_range?{urlencode(words)}") as answer:
            found = json.load(answer)["data"]["result"]
        return [
            {
                "query": target["refId"],
                "legend": _legend(target["legendFormat"], each["metric"]),
                "values": self._values(each["values"]),
            }
            for each in found
        ]

    def _values(self, points: list[tuple[float, str]]) -> list[tuple[float, float | None]]:
        """Of each step; what is missing or no number is None, as a gap has to be drawn."""
        known = {time_s: float(number) for time_s, number in points if number != "NaN"}
        count = int((self._end - self._begin) / self._step_s) + 1
        times = [self._begin + index * self._step_s for index in range(count)]
        return [(time_s, known.get(time_s)) for time_s in times]


def _without_variables(query: str, step_s: int) -> str:
    """All of Grafana's variables as they are at first: everything, and its own choice of a rate."""
    rate_s = max(step_s + SCRAPE_S, 4 * SCRAPE_S)
    return re.sub(r"\$(model|deployment)", ".*", query.replace("$__rate_interval", f"{rate_s}s"))


def _legend(form: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), form)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m cluster.monitoring.answers")
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus")
    parser.add_argument("--minutes", type=float, default=10, help="how long")
    parser.add_argument("--until", type=float, default=time.time(), help="seconds since the epoch")
    options = parser.parse_args()
    end = float(int(options.until))
    begin = end - round(60 * options.minutes)
    prometheus = Prometheus(options.url, begin, end)
    dashboard = json.loads(DASHBOARD.read_text())
    series = {
        panel["id"]: [
            one for target in panel.get("targets", ()) for one in prometheus.series(target)
        ]
        for panel in dashboard["panels"]
    }
    json.dump({"dashboard": dashboard, "from": begin, "to": end, "series": series}, sys.stdout)


if __name__ == "__main__":
    main()
