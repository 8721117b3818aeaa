"""The files under `cluster/`, read; and what is common to the tests of them."""

from pathlib import Path
from typing import Any

import yaml

from deployments.cli.main import main
from deployments.config import AppArgs
from deployments.serve_config import parse_values

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
SHAPES = {"qwen2.5-7b-instruct": "qwen2.5-7b", "qwen3-0.6b": "qwen3-0.6b"}
"""Served name → folder of `benchmarks/shapes` that stands for the model."""


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def load_all(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def args_of(values: dict[str, Any]) -> AppArgs:
    return parse_values(values, Path("serve_config.yaml")).args


def check_on_an_a100(path: Path, *words: str) -> int:
    """`trunkline check`, with shapes in place of the models of the file; its exit status."""
    for name in args_of(load(path)).models:
        if name in SHAPES:
            shape = ROOT / "benchmarks" / "shapes" / SHAPES[name]
            words += ("--set", f"models.{name}.engine.model={shape}")
            words += ("--set", f"models.{name}.engine.load_format=dummy")
    return main(["check", str(path), "--gpu-memory", "79.3", *words])


def longest_answer_s(args: AppArgs) -> float:
    """How long running answers may take, of the ingress or of any model."""
    engines = (model.deployment.graceful_shutdown_timeout_s for model in args.models.values())
    return max(args.ingress.graceful_shutdown_timeout_s, *engines)
