"""Ports for servers that listen only in a while."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.ports import PICKED, bind, pick_port

PICK = "import sys; from deployments.ports import pick_port; print(pick_port(int(sys.argv[1])))"


def test_wanted_port_is_taken_if_it_can_be_had():
    wanted = random.choice(PICKED)
    assert pick_port(wanted) == wanted


def test_nobody_gets_a_port_twice():
    wanted = pick_port()
    elsewhere = subprocess.run(
        [sys.executable, "-c", PICK, str(wanted)], capture_output=True, text=True, check=True
    )
    assert len({wanted, pick_port(wanted), int(elsewhere.stdout)}) == 3


def test_port_on_which_somebody_listens_is_not_picked():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert pick_port(port) in PICKED
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", port)


def test_system_gives_no_picked_port_to_others():
    low, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert max(PICKED) < int(low)
