"""Every configuration under `cluster/` is one that `trunkline check` and Ray Serve take."""

import pytest
from ray.serve.schema import ServeDeploySchema

from tests.cluster.documents import CLUSTER, check_on_an_a100, load

EXAMPLES = sorted(CLUSTER.glob("examples/*.yaml"))
CONFIGS = [CLUSTER / "docker" / "serve_config.yaml", *EXAMPLES]


@pytest.fixture(autouse=True)
def api_keys(monkeypatch):
    monkeypatch.setenv("TRUNKLINE_API_KEYS", "sk-test")


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_check_accepts_it(path, capsys):
    assert check_on_an_a100(path) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_accepts_it(path):
    ServeDeploySchema(**load(path))


def test_small_engines_share_a_gpu_and_fit(capsys):
    """Three engines of 0.33 GPUs hold no more than one GPU has."""
    assert check_on_an_a100(CLUSTER / "examples" / "multi_model.yaml") == 0
    small = capsys.readouterr().out.split("\nqwen3-0.6b\n")[1]
    assert "GPU 0.33" in small
    sizes = [
        float(line.split(" GiB")[0].split()[-1])
        for line in small.splitlines()
        if line.strip().startswith(("weights", "KV cache"))
    ]
    assert len(sizes) == 2
    assert 3 * sum(sizes) < 0.9 * 79.3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_for_a_fleet_ask_for_keys(path, monkeypatch, capsys):
    monkeypatch.delenv("TRUNKLINE_API_KEYS")
    assert check_on_an_a100(path) == 1
    assert "key" in capsys.readouterr().err
