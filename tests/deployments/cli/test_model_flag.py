"""What `--model` leaves of a configuration: all that is not about the file's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cli.main import _parser, main
from deployments.cli.settings import read_settings
from deployments.config import AppArgs, ModelOptions
from engine.config import BUNDLED_MODEL

OF_ALL = {
    "ingress": {"num_replicas": 2},
    "ingress.num_cpus": 1,
    "logging": {"level": "ERROR", "requests": True},
    "tracing.sampling_ratio": 0.5,
    "unknown": 1,  # for the check to name it
}
OF_MODELS: list[dict[str, Any]] = [
    {"models": {"a": {}}},
    {"models.a.engine.seed": 1},
    {"model": "x", "engine": {"seed": 1}, "deployment": {"num_replicas": 2}},
    {"model_path": "x", "max_model_len": 99, "engine.seed": 1, "deployment.num_gpus": 1},
    dict.fromkeys(ModelOptions.model_fields),
]


def written(folder: Path, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A file with these arguments, and its values."""
    entry = {"import_path": "deployments.app:build", "name": "n", "runtime_env": {}}
    values = {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "logging_config": {"log_level": "INFO"},
        "applications": [{**entry, "args": arguments}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path), values


@pytest.mark.parametrize("of_models", OF_MODELS)
def test_what_is_not_of_a_model_stays(tmp_path, of_models):
    path, values = written(tmp_path, {**OF_ALL, **of_models})
    options = _parser().parse_args(["serve", path, "--model", BUNDLED_MODEL])
    _, found, _ = read_settings(options)
    values["applications"][0]["args"] = {"model": BUNDLED_MODEL, **OF_ALL}
    assert found == values


def test_every_argument_of_the_application_is_told_apart():
    assert {key.partition(".")[0] for key in OF_ALL} >= AppArgs.model_fields.keys() - {"models"}


def test_check_tells_of_the_files_logging_and_tracing(capsys, tmp_path):
    of_all = {"logging": {"level": "ERROR"}, "tracing": {"otlp_endpoint": "http://c:4318"}}
    path, _ = written(tmp_path, {"models": {"a": {}}, **of_all})
    assert main(["check", path, "--model", BUNDLED_MODEL]) == 0
    said = capsys.readouterr().out
    assert "  logging     level=ERROR\n  tracing     otlp_endpoint=http://c:4318\n" in said


def test_check_names_what_the_file_has_and_nobody_knows(capsys, tmp_path):
    for unknown, said in (("loging", "unknown option 'loging'"), (3, "must have texts for names")):
        path, _ = written(tmp_path, {"models": {"a": {}}, unknown: {}})
        assert main(["check", path, "--model", BUNDLED_MODEL]) == 1
        assert said in capsys.readouterr().err
