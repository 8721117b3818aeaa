"""Measures one engine in a process of its own: a job as JSON in, a line of JSON a measurement out.

Started by `benchmarks.offline`, perhaps under another interpreter than its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from typing import Any

from benchmarks.engines import Engine, EngineSpec
from benchmarks.machine import describe_versions, read_cpu_seconds
from benchmarks.workloads import WORKLOADS, Requests, Workload

_WARM_UP_TOKENS = 4


def main() -> None:
    """Read the job from the first argument; print the load's line, then one a workload."""
    job = json.loads(sys.argv[1])
    spec = EngineSpec(job["engine"], job["engine"], job["options"])
    began = time.perf_counter()
    engine = spec.load(job["model"], job["load_format"])
    _say(load_seconds=time.perf_counter() - began, versions=describe_versions())
    for name in job["workloads"]:
        _say(workload=name, **measure(engine, WORKLOADS[name], job["seed"]))


def measure(engine: Engine, workload: Workload, seed: int) -> dict[str, Any]:
    """Time one run of `workload`, and one of its prefill alone, after a short warm-up.

    Each of the three draws other prompts, so that no cache of prompts can help. `disturbance` is
    the share of the machine's CPU time that others had during the run: figures with much of it say
    nothing.
    """
    draws = [workload.draw(engine.vocab_size, 3 * seed + offset) for offset in range(3)]
    warm_up = [min(size, _WARM_UP_TOKENS) for size in draws[0].outputs]
    draws[0].outputs = warm_up
    engine.run(draws[0])
    prefill_seconds, _ = _timed(engine, draws[1].first_token_only())
    machine, own = read_cpu_seconds()
    seconds, outputs = _timed(engine, draws[2])
    machine, own = (b - a for a, b in zip((machine, own), read_cpu_seconds(), strict=True))
    return {
        "seed": seed,
        "requests": len(outputs),
        "input_tokens": draws[2].input_tokens,
        "output_tokens": draws[2].output_tokens,
        "seconds": seconds,
        "prefill_seconds": prefill_seconds,
        "disturbance": max(0.0, (machine - own) / (seconds * (os.cpu_count() or 1))),
        "digests": [zlib.crc32(repr(tokens).encode()) for tokens in outputs],
    }


def _timed(engine: Engine, requests: Requests) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    outputs = engine.run(requests)
    seconds = time.perf_counter() - began
    lengths = [len(tokens) for tokens in outputs]
    if lengths != requests.outputs:
        raise RuntimeError(f"the engine made {lengths} tokens, not {requests.outputs}")
    return seconds, outputs


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
