"""`make serve` in a process of its own, and what is left of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deployments.ports import pick_port
from tests.integration.server import ROOT

MODEL = "smollm2-135m-instruct"


class Launched:
    def __init__(self, folder: Path) -> None:
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = port = pick_port()
        engine = config["applications"][0]["args"]["models"][MODEL]["engine"]
        engine |= {"kv_cache_memory_bytes": 512 * 2**20}
        self.config = folder / "serve_config.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "launch.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deployments.launch", str(self.config)],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait_until_ready(self) -> None:
        for _ in range(1200):
            if "trunkline: ready in" in self.log.read_text():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        pytest.fail(f"not ready; the launcher said:\n{self.log.read_text()[-6000:]}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


def descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry.name)] = int(stat[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
