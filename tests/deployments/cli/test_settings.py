"""What the command line changes of a configuration, and what `check` says of one."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest
import yaml

from deployments.cli import serve
from deployments.cli.fit import Item, place
from deployments.cli.main import main
from deployments.launch import read_plan
from engine.config import BUNDLED_MODEL
from tests.integration.server import ROOT

SHAPE = str(ROOT / "benchmarks" / "shapes" / "qwen2.5-7b")
CONFIG = str(ROOT / "serve_config.yaml")
TWO = {
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "applications": [
        {
            "import_path": "deployments.app:build",
            "args": {
                "models": {
                    "a": {"engine": {"max_num_seqs": 4}},
                    "a.5": {"deployment": {"autoscaling": {"min_replicas": 2, "max_replicas": 3}}},
                },
                "ingress": {"num_replicas": 2},
            },
        }
    ],
}


@pytest.fixture
def served(monkeypatch) -> list[dict[str, Any]]:
    """What would have been served."""
    values: list[dict[str, Any]] = []

    def take(path) -> int:
        values.append(yaml.safe_load(path.read_text()))
        return 0

    monkeypatch.setattr(serve, "launch", take)
    return values


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(TWO))
    return str(path)


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    return values["applications"][0]["args"]


def test_a_file_is_served_as_it_is(served):
    assert main(["serve", CONFIG]) == 0
    assert served == [yaml.safe_load((ROOT / "serve_config.yaml").read_text())]


def test_without_a_file_the_bundled_model_is_served(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--port", "8123"]) == 0
    (values,) = served
    assert values["http_options"] == {
        "host": "127.0.0.1",
        "port": 8123,
        "keep_alive_timeout_s": 90,
    }
    assert arguments(values) == {"model": BUNDLED_MODEL}


def test_settings_go_where_they_belong(served, two):
    words = ["models.a.engine.max_num_seqs=8", "models.a.5.deployment.num_cpus=2.5"]
    words += ["ingress.num_cpus=1", "http_options.keep_alive_timeout_s=5"]
    options = [word for setting in words for word in ("--set", setting)]
    assert main(["serve", two, "--host", "0.0.0.0", *options]) == 0
    (values,) = served
    assert values["http_options"] == {"host": "0.0.0.0", "port": 8000, "keep_alive_timeout_s": 5}
    models = arguments(values)["models"]
    assert models["a"]["engine"] == {"max_num_seqs": 8}
    assert models["a.5"]["deployment"]["num_cpus"] == 2.5
    assert arguments(values)["ingress"] == {"num_replicas": 2, "num_cpus": 1}


def test_a_model_takes_the_place_of_those_in_the_file(served, two):
    assert main(["serve", two, "--model", SHAPE, "--set", "engine.load_format=dummy"]) == 0
    assert arguments(served[0]) == {
        "model": SHAPE,
        "ingress": {"num_replicas": 2},
        "engine": {"load_format": "dummy"},
    }


def test_flags_are_settings(served):
    words = ["--limit-concurrency", "100", "--max-model-len", "2048", "--set", "engine.seed=1"]
    assert main(["serve", CONFIG, "--served-model-name", "chat", *words]) == 0
    found = arguments(served[0])
    assert list(found["models"]) == ["chat"]
    engine = {"model": BUNDLED_MODEL, "max_num_seqs": 64, "max_model_len": 2048, "seed": 1}
    assert found["models"]["chat"]["engine"] == engine
    assert found["ingress"]["max_concurrent_requests"] == 100


def test_flags_go_before_the_environment_and_that_before_the_file(served, monkeypatch):
    monkeypatch.setenv("SERVICE_PORT", "8111")
    monkeypatch.setenv("MODEL_NAME", "from-environment")
    assert main(["serve", CONFIG]) == 0
    assert main(["serve", CONFIG, "--port", "8222", "--served-model-name", "flag"]) == 0
    assert main(["serve", CONFIG, "--model", SHAPE]) == 0
    ports = [values["http_options"]["port"] for values in served]
    assert ports == [8111, 8222, 8111]
    names = [name for values in served for name in arguments(values)["models"]]
    assert names == ["from-environment", "flag", "from-environment"]


def test_a_wrong_port_of_the_environment_is_no_matter_where_a_flag_gives_one(
    served, monkeypatch, capsys
):
    monkeypatch.setenv("SERVICE_PORT", "tcp://10.0.0.1:80")  # as Kubernetes tells of a `service`
    assert main(["serve", CONFIG]) == 1
    assert "SERVICE_PORT must be a port" in capsys.readouterr().err
    assert main(["serve", CONFIG, "--port", "8333"]) == 0
    assert served[0]["http_options"]["port"] == 8333


def test_settings_take_the_place_of_the_files_however_those_are_spelled(served, two, tmp_path):
    values = yaml.safe_load(yaml.safe_dump(TWO))
    del arguments(values)["models"]["a.5"]
    arguments(values)["models"]["a"] = {"max_model_len": 99, "engine": {"seed": 1}}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(values))
    for words in (
        ["--max-model-len", "8"],
        ["--set", "max_model_len=8"],
        ["--set", "models.a.max_model_len=8"],
        ["--set", "models.a.engine.max_model_len=8"],
    ):
        assert main(["serve", str(path), *words]) == 0
        assert arguments(served.pop())["models"]["a"] == {"engine": {"seed": 1, "max_model_len": 8}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "80", "--set", "http_options.port=81"], "--port is --set http_options.port"),
        (["--served-model-name", "x"], "--served-model-name is the name of an only model"),
        (["--max-model-len", "8"], "there are several models"),
        (["--limit-concurrency", "0"], "ingress.max_concurrent_requests"),
        (["--set", "http_options.port=99999"], "http_options.port must be a port"),
        (["--port", "0"], "http_options.port must be a port"),
    ],
)
def test_flags_that_do_not_fit(two, capsys, words, said):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "launch", read_plan)
        assert main(["serve", two, *words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("engine.max_num_seqs=4", "there are several models"),
        ("models.b.engine.seed=1", "models are a, a.5"),
        ("model=x", "begin with engine"),
        ("ingress=3", "begin with engine"),
        ("engine", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
    ],
)
def test_settings_that_have_no_place(two, capsys, setting, words):
    assert main(["check", two, "--set", setting]) == 1
    said = capsys.readouterr().err
    assert said.startswith("trunkline: --set") and words in said and said.count("\n") == 1


def check(capsys, *words: str) -> str:
    assert main(["check", *words]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def test_check_of_the_shipped_file(capsys):
    said = check(capsys, CONFIG)
    for words in (
        "listens on 127.0.0.1:8000",
        "Engine-smollm2-135m-instruct",
        "CPU 0.5; CPU 0.1 beside it",
        "max_num_seqs=64",
        "0.5 GiB of float32 on cpu",
        "2,912 blocks of 16 tokens",
        "11 × 4,096 tokens",
    ):
        assert words in said


def test_check_names_an_ipv6_host_as_a_url_would(capsys):
    words = ["--set", "http_options.host=::1", "--set", "http_options.port=8123"]
    assert "listens on [::1]:8123\n" in check(capsys, CONFIG, *words)


def test_check_for_a_gpu(capsys):
    pytest.importorskip("triton")
    said = check(
        capsys, "--model", SHAPE, "--set", "engine.load_format=dummy", "--gpu-memory", "80"
    )
    for words in ("GPU 1", "14.2 GiB of bfloat16 on cuda", "at most 57.3 GiB", "blocks of 64"):
        assert words in said


def test_check_tells_of_plugins(capsys):
    words = ["--set", "class_name=OllamaGenerate"]
    allowed = "ingress.allowed_classes=[cluster.examples.ollama:OllamaGenerate]"
    assert "OllamaGenerate at /api/generate" in check(capsys, CONFIG, *words, "--set", allowed)
    assert main(["check", CONFIG, *words]) == 1
    assert "not on the allow-list" in capsys.readouterr().err


def test_plugins_are_found_in_the_folder(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_plugin.py").write_text("from cluster.examples.ollama import OllamaGenerate\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["class_name=OllamaGenerate", "ingress.allowed_classes=[my_plugin:OllamaGenerate]"]
    assert "at /api/generate" in check(capsys, *(w for s in words for w in ("--set", s)))


def test_check_tells_of_autoscaling(capsys, two):
    assert "2, later 2 to 3" in check(capsys, two)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("applications: [", "not valid YAML"),
        ("[]", "must have applications"),
        ("applications: []", "must have applications"),
        ("applications: [{import_path: 'deployments.app:build'}]", "http_options with a host"),
        (
            yaml.safe_dump(TWO).replace("max_num_seqs", "max_num_sequences"),
            "models.a.engine: unknown option 'max_num_sequences'; did you mean 'max_num_seqs'?",
        ),
        (
            yaml.safe_dump(TWO).replace("max_replicas", "maximum"),
            "broken.yaml: models.a.5.deployment.autoscaling: unknown option 'maximum'",
        ),
        (yaml.safe_dump(TWO).replace("max_num_seqs: 4", "max_model_len: 9000"), "was made for"),
        (
            yaml.safe_dump(TWO).replace("max_num_seqs: 4", "model: /none"),
            "broken.yaml: models.a: model '/none' was not found",
        ),
        (yaml.safe_dump(TWO).replace("max_num_seqs: 4", "num_kvcache_blocks: 9"), "has room for"),
        (yaml.safe_dump(TWO).replace("num_replicas: 2", "api_keys_file: /none"), "/none"),
    ],
)
def test_check_of_broken_files(tmp_path, capsys, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert main(["check", str(path)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("trunkline: ") and words in said.err and said.out == ""


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("logging.levl=INFO", "yaml: logging: unknown option 'levl'; did you mean 'level'?"),
        ("tracing.sample_ratio=1", "tracing: unknown option 'sample_ratio'; did you mean 'sampl"),
        ("ingress.x=1", "ingress: unknown option 'x'; take one of "),
        ("logging.folder=/dev/null/x", "yaml: logging.folder '/dev/null/x' cannot be written"),
    ],
)
def test_check_names_file_option_and_near_match(capsys, setting, words):
    assert main(["check", CONFIG, "--set", setting]) == 1
    assert words in capsys.readouterr().err


def test_check_names_the_flag_of_a_model_that_is_not_there(capsys):
    assert main(["check", CONFIG, "--model", "/none"]) == 1
    assert "trunkline: --model: model '/none' was not found" in capsys.readouterr().err


def test_check_tells_of_logs_and_traces(capsys):
    said = check(capsys, CONFIG)
    assert "  logging     all defaults\n  tracing     none\n" in said
    words = ["logging.format=json", "tracing.otlp_endpoint=http://c:4318", "logging.requests=true"]
    said = check(capsys, CONFIG, *(w for s in words for w in ("--set", s)))
    assert "  logging     format=json, requests=True\n" in said
    assert "  tracing     otlp_endpoint=http://c:4318\n" in said


def test_items_are_placed_where_there_is_room():
    nodes = {"n1": {"CPU": 1.0, "GPU": 1.0}, "n2": {"CPU": 4.0}}
    items = [
        Item("gpu 1", {"CPU": 0.6, "GPU": 1}),
        Item("gpu 2", {"CPU": 0.6, "GPU": 1}),
        Item("cpu", {"CPU": 0.6}),
        Item("last", {"CPU": 0.4}),
        Item("big", {"CPU": 3.4}),
        Item("none", {"CPU": 0.1}),
    ]
    assert place(items, nodes) == {
        "gpu 1": "n1",
        "gpu 2": None,
        "cpu": "n2",
        "last": "n1",
        "big": "n2",
        "none": None,
    }


def test_wrong_usage_has_status_2(capsys):
    for words in ([], ["nonsense"], ["serve", "--port", "x"], ["check", "--gpu-memory", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    capsys.readouterr()


def test_bench_names_what_there_is(capsys):
    for suite in ("nothing", "serving.fake;", "../x"):
        assert main(["bench", suite]) == 1
        assert "take offline, serving or sweep" in capsys.readouterr().err


def test_help_imports_next_to_nothing():
    """What is imported is what a start costs; a time would depend on the machine."""
    code = (
        "import sys; from deployments.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'aiohttp', 'pydantic', 'yaml', 'asyncio'} & sys.modules.keys()\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_bench_runs_a_benchmark():
    words = [sys.executable, "-m", "deployments.cli", "bench", "serving", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "multi-turn" in done.stdout


def test_check_soon_says_that_no_cluster_answers(capsys):
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        assert main(["check", "--address", address]) == 1
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err
