"""Ray Serve's settings that have to be in the environment before Ray starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

FAST_PATH = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""HAProxy instead of the Python proxy; gRPC between deployments, and one event loop a replica."""

SERVE_MIDDLEWARE = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.ingress.plain_headers.before_serve"
}
"""What each HTTP server of Serve passes requests through before it looks at them itself."""

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

STEADY_MEMORY = {
    # glibc gives threads up to eight arenas a core. What a storm of requests leaves free in one is
    # of no use to the others: an ingress would grow by some per cent over twenty storms.
    "MALLOC_ARENA_MAX": "2",
}
"""For all processes, from their start."""

EVERY_NODE = FAST_PATH | LONG_STREAMS | SERVE_MIDDLEWARE | STEADY_MEMORY
"""What Ray should find in its environment on every node."""


def missing_flags(environment: Mapping[str, str] = os.environ) -> list[str]:
    """`NAME=value` of each setting of the fast path that is not there."""
    return [
        f"{name}={value}" for name, value in FAST_PATH.items() if environment.get(name) != value
    ]


ONE_MACHINE = {
    # How long an ingress replica stays up for load balancers to notice that it leaves; Serve's
    # 30 s would make every stop of a single machine take as long.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # The fast path keeps the replicas' warnings and errors from the terminal.
    "RAY_SERVE_LOG_TO_STDERR": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Values for a server on a single machine that somebody watches."""
