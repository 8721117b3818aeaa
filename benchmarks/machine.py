"""What a measurement ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "vllm",
    "ray",
    "llama_cpp_python",
    "numpy",
)
_GIB = 2**30
_GPU_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def describe_machine() -> dict[str, object]:
    """CPU model, cores that this process may use, memory in GiB, GPUs and operating system.

    A GPU is its name, memory and driver version.
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "gpus": _output("nvidia-smi", *_GPU_QUERY),
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_commit() -> str:
    """The commit measured, marked where the working tree differs from it.

    `BENCH_COMMIT` in the environment names it where the code was copied without its history.
    """
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    lines = _output("git", "describe", "--always", "--dirty", "--abbrev=12")
    return lines[0] if lines else "unknown"


def describe_run(module: str, words: Sequence[str], started: datetime) -> dict[str, Any]:
    """The fields that a result file begins with.

    Args:
        module: that was run.
        words: its command line.
        started: when.
    """
    return {
        "command": shlex.join(["python", "-m", module, *words]),
        "started": started.isoformat(timespec="seconds"),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def read_gpu_memory() -> dict[str, float] | None:
    """GPU memory in GiB, or None without a GPU: what is in use on the first GPU, by whichever
    process, and the most that torch has allocated and reserved in this process so far."""
    used = _output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    if not used:
        return None
    memory = {"device_used_gib": round(float(used[0]) / 1024, 2)}  # nvidia-smi speaks in MiB
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        memory["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / _GIB, 2)
        memory["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / _GIB, 2)
    return memory


def read_cpu_seconds() -> tuple[float, float]:
    """CPU seconds spent so far: by the whole machine, time stolen by its host included, and by
    this process. Linux's `/proc/stat`, whose first line has user, nice, system, idle, iowait, irq,
    softirq and steal in clock ticks (man proc_stat)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    own = os.times()
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> list[str]:
    """Lines that `command` prints; none where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
