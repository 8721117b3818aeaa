"""The ids of requests: the client's own if it has a form that logs can hold, else one of ours."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable

HEADER = b"x-request-id"
"""In which a client sends its id, and the answer brings the one that was taken (Serve adds it)."""
_PLAIN = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

Headers = Iterable[tuple[bytes, bytes]]


def without_odd_ids(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers but ids that are too long, or have characters that logs and shells read."""
    return [(name, value) for name, value in headers if name != HEADER or _PLAIN.fullmatch(value)]


def request_id(headers: Headers) -> str:
    """The id that a request brings, or a new one."""
    for name, value in headers:
        if name == HEADER and _PLAIN.fullmatch(value):
            return value.decode()
    return uuid.uuid4().hex
