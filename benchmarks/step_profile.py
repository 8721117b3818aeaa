"""What the steps of a profiled run tell: seconds of each phase, and how long the GPU had no work.

Needs the standard library alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a peer's interpreter has no engine
    from engine import StepRecord

HOST_PHASES = ("schedule", "prepare", "launch", "wait", "update")
"""Parts of a step on the host, in order; `wait` is for the device."""


def step_seconds(step: StepRecord) -> float:
    """The device's time for a step or, where it does not tell, the host's for all phases."""
    return host_seconds(step) if step.device_s is None else step.device_s


def period_seconds(step: StepRecord) -> float | None:
    """The device's time from the end of the step before to the end of this one."""
    return None if step.device_s is None or step.idle_s is None else step.device_s + step.idle_s


def host_seconds(step: StepRecord) -> float:
    """The host's time for a step, waiting included."""
    return step.schedule_s + step.prepare_s + step.launch_s + step.wait_s + step.update_s


def summarise_steps(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Figures of a profile, for decode steps (one token a row) and for mixed ones apart.

    Of each phase, and of `device` and `idle` where the device tells them: median, mean and total
    in seconds. `gpu_idle_share` is idle time over idle and working time, None without a GPU.
    """
    return {
        "gpu_idle_share": _idle_share(steps),
        "decode": _summarise_kind([step for step in steps if step.decode]),
        "mixed": _summarise_kind([step for step in steps if not step.decode]),
    }


def _idle_share(steps: Iterable[StepRecord]) -> float | None:
    told = [step for step in steps if step.device_s is not None]
    busy = sum(step.device_s or 0.0 for step in told)
    idle = sum(step.idle_s or 0.0 for step in told)
    return round(idle / (idle + busy), 4) if idle + busy else None


def _summarise_kind(steps: Sequence[StepRecord]) -> dict[str, Any]:
    if not steps:
        return {"steps": 0}
    columns = {phase: [getattr(step, f"{phase}_s") for step in steps] for phase in HOST_PHASES}
    columns["device"] = [step.device_s for step in steps if step.device_s is not None]
    columns["idle"] = [step.idle_s for step in steps if step.idle_s is not None]
    return {
        "steps": len(steps),
        "tokens": sum(step.tokens for step in steps),
        "mean_rows": round(statistics.fmean(step.rows for step in steps), 2),
        "mean_context_tokens": round(statistics.fmean(step.context_tokens for step in steps), 1),
        "seconds": {name: _spread(values) for name, values in columns.items() if values},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 8),
        "mean": round(statistics.fmean(values), 8),
        "total": round(sum(values), 6),
    }


def profile_table(records: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of the records that carry a `profile`; empty when none does.

    A cell is the median of a step in milliseconds and the phase's total in seconds.
    """
    names = (*HOST_PHASES, "device", "idle")
    rows = [
        f"| {record['workload']} | {record['engine']} | {kind} | {part['steps']} | "
        + " | ".join(_cell(part["seconds"].get(name)) for name in names)
        + f" | {_percent(record['profile']['gpu_idle_share'])} |"
        for record in records
        if record.get("profile")
        for kind in ("decode", "mixed")
        if (part := record["profile"][kind])["steps"]
    ]
    head = f"| workload | engine | steps of kind | steps | {' | '.join(names)} | GPU idle |"
    rule = "|---|---|---|---:|" + "---:|" * (len(names) + 1)
    return "\n".join([head, rule, *rows]) if rows else ""


def _cell(spread: dict[str, float] | None) -> str:
    return f"{spread['median'] * 1e3:.3f} ms, {spread['total']:.2f} s" if spread else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
