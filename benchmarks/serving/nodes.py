"""More nodes of a Ray cluster on this machine, each of which can die as a machine does."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager

from benchmarks.serving.background import in_background

CPUS = 1
"""Of a node. Whatever needs more runs on the head node."""
_LOOK_S = 0.2
_OBJECT_STORE_BYTES = 100 * 2**20


class NodePool:
    """Keeps so many nodes joined to a cluster; one that dies is replaced after a while.

    A node is one process, `ray start --block`, with all of the node's others below it: the role
    `node` in `benchmarks.serving.processes`.

    Args:
        address: host and port of the cluster.
        count: of nodes.
        num_gpus: that each pretends to have.
        replace_after_s: seconds from the death of a node to the start of another.
        namespace: network namespace of the first node, and its address there; the others are in
            that of this process.
    """

    def __init__(
        self,
        address: str,
        count: int,
        num_gpus: int,
        replace_after_s: float,
        namespace: tuple[str, str] | None = None,
    ) -> None:
        self._words = ["--address", address, "--num-cpus", str(CPUS), "--num-gpus", str(num_gpus)]
        self._replace_after_s = replace_after_s
        self._namespace = namespace
        self._end = threading.Event()
        self._nodes = [self._start(index) for index in range(count)]

    def kept(self) -> AbstractContextManager[None]:
        """Replace the dead until the end of the `with`."""
        return in_background(self._run, self._end)

    def end(self) -> None:
        """End all nodes."""
        for node in self._nodes:
            node.terminate()
        for node in self._nodes:
            node.wait()

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *self._words]
        command += ["--object-store-memory", str(_OBJECT_STORE_BYTES)]
        if self._namespace and index == 0:
            name, ip = self._namespace
            command = ["ip", "netns", "exec", name, *command, "--node-ip-address", ip]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def _run(self) -> None:
        died: dict[int, float] = {}
        while not self._end.wait(_LOOK_S):
            for index, node in enumerate(self._nodes):
                if node.poll() is None:
                    continue
                since = died.setdefault(node.pid, time.monotonic())
                if time.monotonic() - since >= self._replace_after_s:
                    self._nodes[index] = self._start(index)
