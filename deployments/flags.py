"""Ray Serve's settings that have to be in the environment before Ray starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

FAST_PATH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""HAProxy instead of the Python proxy; gRPC between deployments, and one event loop a replica."""

LONG_STREAMS = {
    # A reload of HAProxy cuts what is still open after this long; the default is two minutes.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # A freed port must stay unused that long, or an old HAProxy worker sends it a stranger's
    # requests; Serve derives the default from the setting above, which would use up its ports.
    "RAY_SERVE_PORT_QUARANTINE_S": "150",
    # A dead proxy is replaced in seconds instead of half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
}
"""Values that suit streams of minutes."""


def missing_flags(environment: Mapping[str, str] = os.environ) -> list[str]:
    """`NAME=value` of each setting of the fast path that is not there."""
    return [
        f"{name}={value}" for name, value in FAST_PATH.items() if environment.get(name) != value
    ]


def haproxy_files(folder: Path) -> dict[str, str]:
    """Settings that keep HAProxy's files in a folder of one's own.

    By default they lie in /tmp/haproxy-serve, where two users or two servers get into each other's
    way.
    """
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
    }
