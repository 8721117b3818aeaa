"""Figures of one run: percentiles, speeds, and their table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.serving.answers import Answer, Run
from benchmarks.serving.conversations import count_words, echo
from benchmarks.serving.journal import Journal
from benchmarks.serving.processes import CORE, PLANE

Record = dict[str, Any]
Spread = dict[str, float]

_PERCENTILES = (50, 90, 99)


def spread(values: Iterable[float]) -> Spread | None:
    """Mean, maximum and percentiles (nearest rank) of seconds, in milliseconds; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    ranks = {f"p{p}": ordered[math.ceil(len(ordered) * p / 100) - 1] for p in _PERCENTILES}
    figures = {"mean": statistics.fmean(ordered), **ranks, "max": ordered[-1]}
    return {name: round(value * 1e3, 3) for name, value in figures.items()}


def summarise(run: Run) -> Record:
    """What every server can be judged by.

    `ttft` runs from the time a request was due to its first text. `itl` are the gaps between
    successive events with text, which may carry several tokens; `tpot` is the time from the first
    to the last event, divided by the tokens after the first. Only requests without an error count.
    """
    good = [answer for answer in run.answers if answer.error is None and answer.events]
    tokens = sum(answer.output_tokens for answer in good)
    seconds = run.end - run.begin
    return {
        "requests": len(run.answers),
        "completed": len(good),
        "errors": dict(
            Counter(a.error or "no text" for a in run.answers if a.error or not a.events)
        ),
        "short": sum(answer.output_tokens < answer.asked_tokens for answer in good),
        "seconds": round(seconds, 3),
        "input_tokens": sum(answer.prompt_tokens for answer in good),
        "output_tokens": tokens,
        "output_tok_s": round(tokens / seconds, 1),
        "steady_tok_s": _steady_speed(run, good),
        **_latencies(run, good),
    }


def _latencies(run: Run, good: Sequence[Answer]) -> dict[str, Spread | None]:
    times = [[when for when, _ in answer.events] for answer in good]
    gaps = [after - before for when in times for before, after in pairwise(when)]
    return {
        "ttft_ms": spread(w[0] - a.sent for a, w in zip(good, times, strict=True)),
        "itl_ms": spread(gaps if run.itl is None else run.itl),
        "tpot_ms": spread(
            (when[-1] - when[0]) / (answer.output_tokens - 1)
            for answer, when in zip(good, times, strict=True)
            if answer.output_tokens > 1
        ),
        "e2e_ms": spread(w[-1] - a.sent for a, w in zip(good, times, strict=True)),
    }


def _steady_speed(run: Run, good: Sequence[Answer]) -> float | None:
    """Tokens a second while all clients of a closed loop had work, if that lasted a second.

    An answer's tokens are spread evenly over its events.
    """
    if run.full is None or run.full[1] - run.full[0] < 1.0:
        return None
    begin, end = run.full
    tokens = sum(
        answer.output_tokens
        * sum(begin < when <= end for when, _ in answer.events)
        / len(answer.events)
        for answer in good
    )
    return round(tokens / (end - begin), 1)


def summarise_fake(run: Run, journal: Journal, *, by_token: bool) -> Record:
    """What only a fake engine can tell.

    `delay` is, for each token, the time from when the engine's step was due to when the client had
    it; `step` the time between successive steps of an engine; `wrong` counts answers whose text is
    not what the engine must have said.

    Args:
        run: the load's answers.
        journal: of the engines.
        by_token: whether the answers' events are known, and delays with them.
    """
    delays: list[float] = []
    wrong = unknown = 0
    for answer in run.answers:
        if answer.error is not None:
            continue
        dues = journal.times(answer.request_id, answer.output_tokens)
        if answer.text != echo(answer.prompt, answer.asked_tokens):
            wrong += 1
        elif dues is None:
            unknown += 1
        elif by_token:
            delays += _delays(answer, dues)
    return {
        "delay_ms": spread(delays),
        "step_ms": spread(journal.steps(run.begin, run.end)),
        "wrong": wrong,
        "not_in_journal": unknown,
    }


def _delays(answer: Answer, dues: Sequence[float]) -> Iterable[float]:
    position = 0
    for when, text in answer.events:
        count = count_words(text)
        yield from (when - due for due in dues[position : position + count])
        position += count


def table(records: Iterable[Record]) -> str:
    """A Markdown table, a line a run; times in ms, CPU in µs a token."""
    heads = [
        "load", "requests", "errors", "tok/s", "steady tok/s", "of offered",
        "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "end p50", "p99",
        "delay p50", "p99", "CPU plane", "HAProxy", "client", "disturbance",
    ]  # fmt: skip
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *map(_cells, records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(record: Record) -> list[str]:
    cpu = record.get("cpu_us_per_token") or {}
    plane = sum(cpu[role] for role in PLANE) - cpu.get(CORE, 0.0) if cpu.get("ingress") else None
    return [
        record["load"],
        str(record["requests"]),
        str(sum(record["errors"].values()) + record.get("wrong", 0)),
        number(record["output_tok_s"]),
        number(record["steady_tok_s"]),
        share(record.get("of_offered")),
        *ranks(record["ttft_ms"], "p50", "p90", "p99"),
        *ranks(record["itl_ms"], "p50", "p90", "p99"),
        *ranks(record["e2e_ms"], "p50", "p99"),
        *ranks(record.get("delay_ms"), "p50", "p99"),
        number(plane),
        number(cpu.get("haproxy")),
        number(cpu.get("client")),
        share(record["disturbance"]),
    ]


def ranks(values: Spread | None, *names: str) -> list[str]:
    """Cells with figures of a spread."""
    return [number(values[name] if values else None) for name in names]


def number(value: float | None) -> str:
    """A cell with a number."""
    return "-" if value is None else f"{value:,.1f}"


def share(value: float | None) -> str:
    """A cell with a share, in per cent."""
    return "-" if value is None else f"{value:.1%}"
