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
from benchmarks.latency import summarise_times
from benchmarks.machine import describe_versions, read_cpu_seconds, read_gpu_memory
from benchmarks.step_profile import summarise_steps
from benchmarks.workloads import FIRST_TOKEN, WORKLOADS, Requests, Workload

WARM_UP = {"requests": 32, "output_tokens": 4}
"""The most of a workload that is run, untimed, before it is measured."""
FIRST_PROMPT_TOKENS = 16
"""Length of the short request whose first token ends the start."""


def main() -> None:
    """Read the job from the first argument; print the load's line, then one a workload."""
    job = json.loads(sys.argv[1])
    engine = load(job)
    for name in job["workloads"]:
        workload = WORKLOADS[name]
        line = measure(engine, workload, job["seed"], prefill=job["prefill"])
        if name in job["profile"]:
            line["profile"] = profile(engine, workload, job["seed"])
        _say(workload=name, **line)


def load(job: dict[str, Any]) -> Engine:
    """Start the engine of `job` and say how long that took.

    `load_seconds` is the engine's import and start; `first_token_seconds` runs from `job["began"]`
    (Unix time just before this process) to the first token of a short request.
    """
    began = time.perf_counter()
    spec = EngineSpec(job["engine"], job["engine"], job["options"])
    engine = spec.load(job["model"], job["load_format"])
    load_seconds = time.perf_counter() - began
    engine.run(Requests([[FIRST_TOKEN] * FIRST_PROMPT_TOKENS], [1], 0.0, 0))
    _say(
        load_seconds=load_seconds,
        first_token_seconds=time.time() - job["began"],
        options=spec.options,
        settled=engine.describe(),
        gpu_memory=read_gpu_memory(),
        versions=describe_versions(),
        warm_up=WARM_UP,
    )
    return engine


def measure(
    engine: Engine, workload: Workload, seed: int, *, prefill: bool = True
) -> dict[str, Any]:
    """Time one run of `workload`, and with `prefill` one of its prefill alone, after a warm-up.

    Each of the three draws other prompts, so that no cache of prompts can help. `disturbance` is
    the share of the machine's CPU time that others had during the run: figures with much of it say
    nothing.
    """
    engine.run(workload.draw(engine.vocab_size, 3 * seed).first(**WARM_UP))
    prefill_seconds = None
    if prefill:
        first_tokens = workload.draw(engine.vocab_size, 3 * seed + 1).first_token_only()
        prefill_seconds, _ = _timed(engine, first_tokens)
    requests = workload.draw(engine.vocab_size, 3 * seed + 2)
    machine, own = read_cpu_seconds()
    seconds, outputs = _timed(engine, requests)
    machine, own = (b - a for a, b in zip((machine, own), read_cpu_seconds(), strict=True))
    times = engine.request_times
    return {
        "seed": seed,
        "requests": len(outputs),
        "input_tokens": requests.input_tokens,
        "output_tokens": requests.output_tokens,
        "seconds": seconds,
        "prefill_seconds": prefill_seconds,
        "disturbance": max(0.0, (machine - own) / (seconds * (os.cpu_count() or 1))),
        "latency": summarise_times(times) if times else None,
        "gpu_memory": read_gpu_memory(),
        "digests": [zlib.crc32(repr(tokens).encode()) for tokens in outputs],
    }


def profile(engine: Engine, workload: Workload, seed: int) -> dict[str, Any] | None:
    """Figures of the steps of another run of `workload`; None where the engine has no profile.

    That run's speed is not reported: watching the steps slows them.
    """
    steps = engine.profile(workload.draw(engine.vocab_size, 3 * seed + 2))
    return None if steps is None else summarise_steps(steps)


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
