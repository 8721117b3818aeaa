"""The command line: runs probes, writes a result file and prints its table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.models import find_model
from benchmarks.probes.bench import Bench
from benchmarks.probes.records import Record, table
from benchmarks.roofline import Shape

PROBES = {
    "ceilings": "ceilings",
    "decode-attention": "decode_attention",
    "prefill-attention": "prefill_attention",
    "rotary": "rotary",
    "products": "products",
    "sampling": "sampling",
}
"""Modules of this package by the names of their probes; each has a `measure(bench, shapes)`."""
HOST_PROBES = {"ingress": "ingress", "masks": "masks", "metrics": "metrics"}
"""The same of probes that need no GPU; each has a `measure()`."""

_MODELS = ("qwen2.5-7b", "qwen3-0.6b")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    names = options.names or [*HOST_PROBES, *PROBES]
    if not torch.cuda.is_available() and not HOST_PROBES.keys() >= set(names):
        sys.exit(
            "benchmarks.probes: needs a CUDA GPU, and this machine has none; without one there are "
            + ", ".join(HOST_PROBES)
        )
    run(Bench(torch.device("cuda", 0)), names, options)


def run(bench: Bench, names: Sequence[str], options: argparse.Namespace) -> None:
    """Run the probes asked for; the file holds what was measured even if one of them fails."""
    started = datetime.now(UTC)
    torch.manual_seed(0)
    records: list[Record] = []
    try:
        for name in names:
            _measure(bench, name, records)
    finally:
        document = {
            **describe_run("benchmarks.probes", options.words, started),
            "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
            "dtype": str(bench.dtype).removeprefix("torch."),
            "records": records,
        }
        out = options.out or results.FOLDER / f"probes-{started:%Y%m%d-%H%M%S}.json"
        results.write(document, out)
        print(f"{out}\n{table(records)}")


def _measure(bench: Bench, name: str, records: list[Record]) -> None:
    """Run one probe, and say on the terminal how far it is."""
    probe = import_module(f"benchmarks.probes.{(PROBES | HOST_PROBES)[name]}")
    shapes = {m: Shape.read(Path(find_model(m)), bench.dtype.itemsize) for m in _MODELS}
    found = probe.measure() if name in HOST_PROBES else probe.measure(bench, shapes)
    for entry in found:
        records.append({"name": name, **entry})
        print(name, *entry.values(), file=sys.stderr, flush=True)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.probes", description=__doc__)
    known = [*PROBES, *HOST_PROBES]
    parser.set_defaults(words=sys.argv[1:] if words is None else words)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(known)}; or all")
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    options = parser.parse_args(words)
    if unknown := set(options.names).difference(known):
        parser.error(f"no probe is called {', '.join(sorted(unknown))}; {', '.join(known)} are")
    return options


if __name__ == "__main__":
    main()
