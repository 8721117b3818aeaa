"""Offline speed of this engine beside its peers, each in a process of its own, in turns.

    python -m benchmarks.offline run --suite cpu --engines trunkline transformers
    python -m benchmarks.offline run --suite gpu --model qwen2.5-7b --profile 1x128-256
    python -m benchmarks.offline compare

An engine may carry options (`transformers:batch_size=8`, `trunkline:max_num_seqs=64`), and an
interpreter of its own (`--python llama.cpp=/path/to/python`). llama.cpp gets a float32 copy of a
GGUF file, as the others compute in float32, unless told `llama.cpp:weights=stored`.
`run` writes one JSON file; `compare` prints its tables: speeds, the goals for its model and GPU,
latencies and step profiles.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.engines import EngineSpec
from benchmarks.goals import goal_table
from benchmarks.latency import latency_table
from benchmarks.machine import describe_commit, describe_machine
from benchmarks.models import BUNDLED_MODEL, find_model, find_shape, write_float32
from benchmarks.step_profile import profile_table
from benchmarks.workloads import SUITES, WORKLOADS, Suite

_ROOT = Path(__file__).parent.parent


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(arguments)
    try:
        options.action(options)
    except (FileNotFoundError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks.offline: {error}")


def run(options: argparse.Namespace) -> None:
    """Measure every engine on every workload, `--rounds` times in turns, and write the file."""
    started = datetime.now(UTC)
    _fill_in(options, SUITES[options.suite])
    specs = [EngineSpec.parse(label) for label in options.engines]
    interpreters = dict(entry.split("=", 1) for entry in options.python)
    loads: dict[str, Any] = {}
    lines: list[results.Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seed, options.seed + options.rounds):
            for spec in specs:
                job = _make_job(spec, options, seed, Path(scratch))
                job["profile"] = options.profile if seed == options.seed else []
                interpreter = interpreters.get(spec.name, sys.executable)
                load, *measured = _measure(spec.label, interpreter, job)
                loads.setdefault(spec.label, load)
                lines += [{"engine": spec.label, **line} for line in measured]
    document = {
        "command": shlex.join(["python", "-m", "benchmarks.offline", *options.words]),
        "started": started.isoformat(timespec="seconds"),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "model": options.model,
        "load_format": options.load_format,
        "engines": loads,
        "records": results.summarise(lines),
    }
    out = options.out or results.FOLDER / f"offline-{started:%Y%m%d-%H%M%S}.json"
    results.write(document, out)
    print(f"{out}\n{_tables([document], specs[0].label)}")


def compare(options: argparse.Namespace) -> None:
    """Print the table of the given result files, or of the newest one."""
    files = (
        options.files
        or sorted(results.FOLDER.glob("offline-*.json"), key=lambda file: file.stat().st_mtime)[-1:]
    )
    if not files:
        raise FileNotFoundError("there is no result file yet; `run` writes one")
    print(_tables([results.read(file) for file in files], options.engine))


def _tables(documents: list[dict[str, Any]], engine: str | None) -> str:
    """Every table that `documents` have rows for; `engine` is the first file's first if unset."""
    engine = engine or documents[0]["records"][0]["engine"]
    records = [record for document in documents for record in document["records"]]
    goals = [goal_table(document, engine) for document in documents]
    tables = [results.compare(documents, engine), *goals]
    return "\n\n".join(filter(None, [*tables, latency_table(records), profile_table(records)]))


def _fill_in(options: argparse.Namespace, suite: Suite) -> None:
    """Take from the suite, and from the kind of model, what the command line left open."""
    options.workloads = options.workloads or [workload.name for workload in suite.workloads]
    options.engines = options.engines or list(suite.engines)
    if options.rounds is None:
        options.rounds = suite.rounds
    if options.prefill is None:
        options.prefill = suite.prefill
    if options.profile == []:
        options.profile = options.workloads
    options.profile = options.profile or []
    if options.load_format is None:
        options.load_format = "dummy" if find_shape(options.model) else "auto"


def _make_job(
    spec: EngineSpec, options: argparse.Namespace, seed: int, scratch: Path
) -> dict[str, Any]:
    """What the worker is told; peers get the model as a path, llama.cpp one in float32."""
    model, engine_options = options.model, dict(spec.options)
    if spec.name != "trunkline":
        model = find_model(model)
    if spec.name == "llama.cpp" and engine_options.pop("weights", "float32") != "stored":
        model = str(_float32_copy(Path(model), scratch))
    return {
        "engine": spec.name,
        "options": engine_options,
        "model": model,
        "load_format": options.load_format,
        "workloads": options.workloads,
        "prefill": options.prefill,
        "seed": seed,
    }


def _float32_copy(model: Path, scratch: Path) -> Path:
    copy = scratch / f"{model.stem}-float32.gguf"
    if not copy.exists():
        write_float32(str(model), str(copy))
    return copy


def _measure(label: str, interpreter: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the worker's lines, and say on the terminal how far it is."""
    command = [interpreter, "-m", "benchmarks.worker", json.dumps(job | {"began": time.time()})]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as worker:
        for text in worker.stdout or ():
            if not text.startswith("{"):
                continue
            line = json.loads(text)
            if "workload" in line:
                _tell(label, line)
            yield line
    if worker.returncode:
        raise subprocess.CalledProcessError(worker.returncode, f"{label} in {interpreter}")


def _tell(engine: str, line: dict[str, Any]) -> None:
    speed = line["output_tokens"] / line["seconds"]
    taken = f"{line['seconds']:8.2f} s"
    print(f"{engine:24} {line['workload']:26} {taken} {speed:10,.1f} tok/s", file=sys.stderr)


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.offline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("run", help="measure and write a result file")
    measuring.set_defaults(action=run, words=sys.argv[1:] if words is None else words)
    measuring.add_argument("--engines", nargs="+", metavar="NAME[:OPTION=VALUE,…]")
    measuring.add_argument("--suite", choices=SUITES, default="cpu")
    measuring.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="instead of a suite")
    measuring.add_argument("--model", default=BUNDLED_MODEL, help="name, directory or GGUF file")
    measuring.add_argument("--load-format", choices=("auto", "dummy"), help="dummy for a shape")
    measuring.add_argument("--rounds", type=int, help="runs of each; medians are shown")
    measuring.add_argument(
        "--prefill",
        action=argparse.BooleanOptionalAction,
        help="time the prefill alone in a run of its own",
    )
    measuring.add_argument(
        "--profile",
        nargs="*",
        choices=WORKLOADS,
        help="run these (or all) workloads once more, timing each step",
    )
    measuring.add_argument("--seed", type=int, default=0, help="of the first round")
    measuring.add_argument("--python", nargs="+", default=[], metavar="ENGINE=INTERPRETER")
    measuring.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    comparing = commands.add_parser("compare", help="print the table of result files")
    comparing.set_defaults(action=compare)
    comparing.add_argument("files", nargs="*", type=Path, help="the newest if none is named")
    comparing.add_argument("--engine", help="whose speed the ratios tell; the first one if unset")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
