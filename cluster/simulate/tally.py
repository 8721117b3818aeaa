"""Figures of a run, small enough to be added up over thousands of engines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BUCKETS_PER_E = 200
"""Buckets between x and e·x: a quantile is right within half a per cent."""
_SMALLEST_S = 1e-6
_QUANTILES = (50, 95, 99)


class Histogram:
    """Times, in buckets whose width is proportional to the time."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0.0
        self.count = 0
        """Times that were added."""
        self.max = 0.0
        """Largest of them."""

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a time, or several that are equal."""
        bucket = math.floor(math.log(max(seconds, _SMALLEST_S)) * BUCKETS_PER_E)
        self._counts[bucket] = self._counts.get(bucket, 0) + times
        self._total += seconds * times
        self.count += times
        self.max = max(self.max, seconds)

    def merge(self, other: Histogram) -> None:
        """Add what another one has counted."""
        for bucket, times in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + times
        self._total += other._total
        self.count += other.count
        self.max = max(self.max, other.max)

    @property
    def mean(self) -> float:
        """Mean in seconds; 0 of none."""
        return self._total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Time that this share does not exceed, by nearest rank; 0 of none."""
        rank, seen = max(1, math.ceil(self.count * share)), 0
        for bucket, times in sorted(self._counts.items()):
            seen += times
            if seen >= rank:
                return min(math.exp((bucket + 0.5) / BUCKETS_PER_E), self.max)
        return 0.0

    def share_within(self, seconds: float) -> float:
        """Share of the times that are no longer than this, give or take a bucket; 1 of none."""
        last = math.floor(math.log(max(seconds, _SMALLEST_S)) * BUCKETS_PER_E)
        within = sum(times for bucket, times in self._counts.items() if bucket <= last)
        return within / self.count if self.count else 1.0

    def spread(self) -> dict[str, float]:
        """Mean, quantiles and maximum, in milliseconds."""
        quantiles = {f"p{percent}": self.quantile(percent / 100) for percent in _QUANTILES}
        figures = {"mean": self.mean, **quantiles, "max": self.max}
        return {name: round(value * 1e3, 3) for name, value in figures.items()}


@dataclass(slots=True)
class EngineTally:
    """What one engine did."""

    requests: int = 0
    computed_tokens: int = 0
    """Prompt tokens that its cache lacked."""
    output_tokens: int = 0
    busy_s: float = 0.0
    service_s: float = 0.0
    """From its start to its end; what it costs."""


@dataclass(slots=True)
class Tally:
    """What came of all requests, and what each engine did."""

    ttft: Histogram = field(default_factory=Histogram)
    """From when a request was sent to its first token at the client."""
    itl: Histogram = field(default_factory=Histogram)
    """Between successive tokens of a request."""
    e2e: Histogram = field(default_factory=Histogram)
    """To the last token."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of these, found in caches."""
    end_s: float = 0.0
    """When the last request ended."""
    engines: list[EngineTally] = field(default_factory=list)

    def merge(self, other: Tally) -> None:
        """Add the figures of other engines."""
        for name in ("ttft", "itl", "e2e"):
            getattr(self, name).merge(getattr(other, name))
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.end_s = max(self.end_s, other.end_s)
        self.engines += other.engines

    def record(self) -> dict[str, Any]:
        """The figures for a result file; `imbalance` is the largest engine's over the mean."""
        tokens = sum(engine.output_tokens for engine in self.engines)
        service = sum(engine.service_s for engine in self.engines)
        busy = sum(engine.busy_s for engine in self.engines)
        return {
            "requests": self.e2e.count,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": tokens,
            "simulated_s": round(self.end_s, 1),
            "ttft_ms": self.ttft.spread(),
            "itl_ms": self.itl.spread(),
            "e2e_ms": self.e2e.spread(),
            "cache_hits": _share(self.cached_tokens, self.prompt_tokens),
            "busy": _share(busy, service),
            "engine_s_per_mtok": round(service / max(tokens, 1) * 1e6, 2),
            "busy_s_per_mtok": round(busy / max(tokens, 1) * 1e6, 2),
            "imbalance": {
                name: _imbalance([getattr(engine, name) for engine in self.engines])
                for name in ("requests", "computed_tokens", "output_tokens")
            },
        }


def add_up(tallies: Iterable[Tally]) -> Tally:
    """The figures of several groups of engines together."""
    whole = Tally()
    for tally in tallies:
        whole.merge(tally)
    return whole


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table, a line a run; times in ms."""
    heads = ["trace", "policy", "requests", "TTFT p50", "p95", "p99", "ITL p50", "p95", "p99"]
    heads += ["cache hits", "busy", "engine s / Mtok", "computed tokens, max / mean"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *map(_cells, records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(record: Mapping[str, Any]) -> list[str]:
    times = [f"{record[k][q]:,.1f}" for k in ("ttft_ms", "itl_ms") for q in ("p50", "p95", "p99")]
    return [
        record["trace"],
        record["policy"],
        f"{record['requests']:,}",
        *times,
        f"{record['cache_hits']:.1%}",
        f"{record['busy']:.1%}",
        f"{record['engine_s_per_mtok']:,.1f}",
        f"{record['imbalance']['computed_tokens'] or 0:.2f}",
    ]


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def _imbalance(figures: Sequence[float]) -> float | None:
    total = sum(figures)
    return round(max(figures) * len(figures) / total, 3) if total else None
