"""CPU time and memory of a server's processes, by what they do. Linux's `/proc` only."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_ROLES = (
    ("ingress", re.compile(r"ray::ServeReplica:[^:]*:Ingress")),
    ("engine_actor", re.compile(r"ray::EngineActor")),
    ("engine_replica", re.compile(r"ray::ServeReplica:[^:]*:Engine-")),
    ("haproxy", re.compile(r"\S*haproxy(\s|$)")),
    ("haproxy_manager", re.compile(r"ray::HAProxyManager")),
    ("proxy", re.compile(r"ray::ProxyActor")),
    ("controller", re.compile(r"ray::ServeController")),
    ("node", re.compile(r"\S+ -m ray\.scripts\.scripts start")),
)
OTHERS = "others"
"""Role of every other process of the server: Ray's daemons, idle workers."""
CORE = "engine_core"
"""The part of `engine_actor`'s time that a fake engine's scheduler and cache took."""
PLANE = ("ingress", "engine_actor", "engine_replica")
"""Roles whose time, without that of `CORE`, counts against the goal for the serve plane."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def read_cpu(root: int) -> dict[str, float]:
    """Role → CPU seconds spent so far by `root` and its living descendants.

    A process with a role counts with all of its threads; one that ended since takes its time along.
    """
    seconds = dict.fromkeys([role for role, _ in _ROLES] + [OTHERS], 0.0)
    for pid in tree(root):
        with contextlib.suppress(OSError):
            seconds[_role(pid)] += _read_stat(pid)[1]
    return seconds


def read_memory(root: int) -> dict[str, float]:
    """Role → MiB of anonymous memory in RAM, of `root` and its living descendants.

    See `memory_by_process`; a process that shares pages with others counts for all of them.
    """
    mebibytes = dict.fromkeys([role for role, _ in _ROLES] + [OTHERS], 0.0)
    for role, mib in memory_by_process(root).values():
        mebibytes[role] += mib
    return mebibytes


def memory_by_process(root: int) -> dict[int, tuple[str, float]]:
    """Process id → role, and MiB of anonymous memory in RAM, of `root` and its descendants.

    Without the pages of files, which come and go with what else the machine does.
    """
    found = {}
    for pid in tree(root):
        with contextlib.suppress(OSError):  # it has ended, or is no process of this user
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            (kibibytes,) = re.findall(r"^Anonymous: +(\d+) kB$", rollup, re.MULTILINE)
            found[pid] = _role(pid), int(kibibytes) / 1024
    return found


def find_processes(root: int, role: str) -> list[int]:
    """Ids of the living processes of a role among `root` and its descendants."""
    found = []
    for pid in tree(root):
        with contextlib.suppress(OSError):
            if _role(pid) == role:
                found.append(pid)
    return found


def _role(pid: int) -> str:
    title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return next((role for role, pattern in _ROLES if pattern.match(title)), OTHERS)


def tree(root: int) -> list[int]:
    """Ids of `root` and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(_read_stat(int(entry.name))[0], []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows meanwhile
        found += children.get(pid, [])
    return found


def _read_stat(pid: int) -> tuple[int, float]:
    """Parent, and CPU seconds in user and system mode (man proc_pid_stat: fields 4, 14, 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) * _TICK_S
