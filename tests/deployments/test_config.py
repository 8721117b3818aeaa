"""Arguments of the application, the builder, the configuration file and the launcher's checks."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments import launch
from deployments.app import REPLICA_CPUS, build
from deployments.config import (
    AppArgs,
    Autoscaling,
    DeploymentOptions,
    ModelOptions,
    deployment_name,
)
from deployments.flags import FAST_PATH, missing_flags
from deployments.haproxy import haproxy_settings
from deployments.ingress.deployment import load_served_model
from deployments.ingress.options import IngressOptions
from deployments.ingress.prompts import chat_prompt
from deployments.launch import Plan, check_port_free, read_plan
from deployments.observability.options import LoggingOptions, TracingOptions
from deployments.protocols.template import TemplateFields
from deployments.protocols.tool_parsers import TOOL_CALL_PARSERS
from deployments.serve_config import apply_environment, checked_port, read_values
from engine.config import BUNDLED_MODEL, EngineConfig
from engine.errors import ConfigError
from tests.engine.conftest import TINY_LLAMA
from tests.integration.server import ROOT

CONFIG = ROOT / "serve_config.yaml"


def test_shortcut_with_dotted_options_as_the_command_line_gives_them():
    args = AppArgs(
        **{
            "model": "smollm2-135m-instruct",
            "engine.max_num_seqs": "8",
            "engine.enable_prefix_caching": "false",
            "deployment.num_replicas": "2",
            "ingress.num_replicas": "3",
        }
    )
    model = args.models["smollm2-135m-instruct"]
    assert (model.engine.max_num_seqs, model.engine.enable_prefix_caching) == (8, False)
    assert (model.deployment.num_replicas, args.ingress.num_replicas) == (2, 3)


def test_nothing_at_all_serves_the_bundled_model():
    assert list(AppArgs(**{}).models) == ["smollm2-135m-instruct"]


def test_path_is_served_under_its_last_part():
    assert list(AppArgs(model="/models/Qwen2.5-7B/").models) == ["Qwen2.5-7B"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"engine.max_num_seq": 8}, ["max_num_seq", "did you mean 'max_num_seqs'"]),
        ({"engine.max_num_seqs": "many"}, ["engine.max_num_seqs", "integer"]),
        ({"engine.max_num_seqs": 0}, ["engine.max_num_seqs", "greater"]),
        ({"modle": "x"}, ["modle"]),
        ({"ingress.port": 1}, ["ingress", "unknown option 'port'"]),
        ({"deployment.num_replicas": 0}, ["deployment.num_replicas"]),
        ({"models": {}}, ["models"]),
        ({"models": {"a/b": {}, "a-b": {}}}, ["Engine-a-b"]),
        ({"models": {"": {}}}, ["no name for a model"]),
        ({"models": {"a\n": {}}}, ["no name for a model"]),
        ({"models": {"a": {"max_model_len": 0}}}, ["models.a.engine.max_model_len", "greater"]),
        ({"models": {"a": {"model_path": 5}}}, ["models.a.engine.model", "string"]),
        ({"models": {"a": {"model_path": "x", "engine": {"model": "x"}}}}, ["mean the same"]),
        ({"models": {"a": {"max_model_len": 9, "engine": {"max_model_len": 8}}}}, ["same"]),
        ({"model": "x", "model_path": "y"}, ["mean the same"]),
        ({"model": "x", "engine.model": "y"}, ["mean the same"]),
        ({"models": {"a": {"engine": 5, "model_path": "x"}}}, ["models.a.engine"]),
        ({"engine": 5}, ["engine"]),
        ({"models": {"a": {"response_role": ""}}}, ["response_role"]),
        ({"models": {"a": {"chat_template": ""}}}, ["chat_template"]),
        ({"deployment": {"num_replicas": 3, "autoscaling": {}}}, ["initial_replicas"]),
    ],
)
def test_bad_options_are_named(values, words):
    with pytest.raises(ValidationError) as caught:
        AppArgs(**values)
    for word in words:
        assert word in str(caught.value)


def test_the_table_of_models_under_the_names_of_older_systems():
    table = {"model_path": "/m/x", "max_model_len": 99, "engine": {"seed": 3}}
    model = AppArgs(models={"a": {**table, "response_role": "bot"}}).models["a"]
    assert (model.engine.model, model.engine.max_model_len, model.engine.seed) == ("/m/x", 99, 3)
    assert model.response_role == "bot"
    shortcut = AppArgs(**{"model_path": "/m/x", "max_model_len": "99", "engine.seed": "3"})
    assert shortcut.models["x"].engine == model.engine


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages", "not valid Jinja"),
        ("{% if %}", "not valid Jinja"),
        ("/nowhere/chat.jinja", "/nowhere/chat.jinja.*No such file"),
    ],
)
def test_chat_templates_that_cannot_be_used_fail_at_build(template, words):
    with pytest.raises(ConfigError, match=words):
        build(AppArgs(chat_template=template))


async def test_chat_template_and_role_of_a_model(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("<tool_call>{{ messages[-1].content }}")
    for template in (str(path), path.read_text()):
        options = AppArgs(chat_template=template, response_role="bot").models[BUNDLED_MODEL]
        options.check()
        model = load_served_model("m", options, IngressOptions(), client=Any)
        messages = [{"role": "user", "content": "hi"}]
        prompt = await chat_prompt(model, TemplateFields(), messages, None, 1)
        assert prompt.text == "<tool_call>hi"
        assert model.tokenizer.decode(prompt.token_ids) == prompt.text
        assert model.style.role == "bot"
        assert model.style.calls is TOOL_CALL_PARSERS["hermes"]  # guessed from this template


def test_model_that_is_not_there_fails_at_build():
    with pytest.raises(ConfigError, match="/nowhere/model"):
        build(AppArgs(model="/nowhere/model"))


def test_model_that_is_half_there_fails_at_build(tiny_folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tiny_folder / "model-1.safetensors").touch()
    with pytest.raises(ConfigError, match=r"lacks 1 of the 2 weight files.*model-2\.safetensors"):
        build(AppArgs(model=str(tiny_folder)))
    build(AppArgs(**{"model": str(tiny_folder), "engine.load_format": "dummy"}))


@pytest.fixture
def tiny_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return tmp_path


def test_context_longer_than_the_model_fails_at_build():
    with pytest.raises(ConfigError, match="max_model_len"):
        build(AppArgs(**{"engine.max_model_len": 10**7}))


def test_several_models_have_readable_deployments():
    args = AppArgs(models={"a/b": {}, "c": {"engine": {"max_num_seqs": 3}}})
    app = build(args)
    assert app._bound_deployment.name == "Ingress"
    engines = app._bound_deployment.init_args[1]
    names = {name: e._bound_deployment.name for name, e in engines.items()}
    assert names == {"a/b": "Engine-a-b", "c": "Engine-c"}
    assert engines["c"]._bound_deployment.max_ongoing_requests == 6
    assert deployment_name("Qwen/Qwen2.5") == "Engine-Qwen-Qwen2.5"


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_rank_has_a_gpu_of_one_node(ranks):
    options = {"device": "cuda", "tensor_parallel_size": ranks}
    app = build(AppArgs(engine=options, deployment={"accelerator_type": "A100"}))
    (engine,) = app._bound_deployment.init_args[1].values()
    config = engine._bound_deployment._replica_config
    replica, *bundles = config.placement_group_bundles
    assert replica == {"CPU": REPLICA_CPUS} and config.placement_group_strategy == "STRICT_PACK"
    share = {"CPU": 0.5 / ranks, "GPU": 1.0, "accelerator_type:A100": 0.001 / ranks}
    assert bundles == [share] * ranks


def test_ranks_that_cannot_share_the_model_are_refused_when_it_is_built():
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2"):
        build(AppArgs(engine={"tensor_parallel_size": 2}))


def test_ranks_share_no_gpu():
    for num_gpus in (None, 0, 3):
        ModelOptions(engine={"tensor_parallel_size": 3}, deployment={"num_gpus": num_gpus}).check()
    ModelOptions(deployment={"num_gpus": 0.5}).check()
    for num_gpus in (0.5, 1, 4):
        options = {"engine.tensor_parallel_size": 3, "deployment.num_gpus": num_gpus}
        with pytest.raises(ConfigError, match=r"num_gpus is .* leave it out"):
            AppArgs(**options).check()


def test_shipped_configuration_is_valid_and_names_every_option():
    plan = read_plan(CONFIG)
    assert (plan.host, plan.port, plan.model) == ("127.0.0.1", 8000, "smollm2-135m-instruct")
    args = uncommented()["applications"][0]["args"]
    model = args["models"]["smollm2-135m-instruct"]
    assert list(model["engine"]) == list(EngineConfig.model_fields)
    assert list(model["deployment"]["autoscaling"]) == list(Autoscaling.model_fields)
    assert set(model["deployment"]) == set(DeploymentOptions.model_fields)
    assert set(model) == set(ModelOptions.model_fields)
    assert list(args["ingress"]) == list(IngressOptions.model_fields)
    assert list(args["logging"]) == list(LoggingOptions.model_fields)
    assert list(args["tracing"]) == list(TracingOptions.model_fields)
    AppArgs(**args)


def uncommented() -> dict[str, Any]:
    """The shipped file with all the options that it only mentions; without the second model."""
    text = re.sub(r" *# qwen.*?(?=\n    ingress:)", "", CONFIG.read_text(), flags=re.DOTALL)
    return yaml.safe_load(re.sub(r"^( *)# (?= *\w+:( |$))", r"\1", text, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", "YAML"),
        ("[]", "applications"),
        ("applications: []", "applications"),
        (None, "cannot read"),
    ],
)
def test_bad_configuration_file(tmp_path, change, words):
    path = tmp_path / "config.yaml"
    if change is not None:
        path.write_text(change)
    with pytest.raises(ConfigError, match=words):
        read_plan(path)


def test_bad_options_in_the_file_are_named(tmp_path):
    values = yaml.safe_load(CONFIG.read_text())
    values["applications"][0]["args"]["models"]["x"] = {"engine": {"max_num_seq": 1}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"models\.x\.engine.*did you mean 'max_num_seqs'"):
        read_plan(path)


def test_host_must_be_said(tmp_path):
    """Serve would listen on all interfaces."""
    values = yaml.safe_load(CONFIG.read_text())
    del values["http_options"]["host"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"http_options with a host \(127\.0\.0\.1"):
        read_plan(path)


def environment_of(**variables: str) -> tuple[bool, dict[str, Any]]:
    values = read_values(CONFIG)
    changed = apply_environment(values, CONFIG, variables)
    return changed, values


def test_the_environment_goes_before_the_file():
    changed, values = environment_of(SERVICE_PORT="8123", MODEL_NAME="org/chat")
    original = yaml.safe_load(CONFIG.read_text())
    (model,) = original["applications"][0]["args"]["models"].values()
    original["applications"][0]["args"]["models"] = {"org/chat": model}
    original["http_options"]["port"] = 8123
    assert changed and values == original
    unchanged, values = environment_of(SERVICE_PORT="", MODEL_NAME="")
    assert not unchanged and values == yaml.safe_load(CONFIG.read_text())


def test_the_name_of_a_model_given_by_the_shortcut():
    entry = {"import_path": "deployments.app:build", "args": {"model": "/m/x", "engine.seed": 3}}
    values = {"http_options": {"host": "127.0.0.1"}, "applications": [entry]}
    apply_environment(values, CONFIG, {"MODEL_NAME": "chat"})
    (options,) = AppArgs(**entry["args"]).models.items()
    assert (options[0], options[1].engine.model, options[1].engine.seed) == ("chat", "/m/x", 3)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "80.0", "http", " ", "0x50", 8.5, True, None])
def test_ports_are_checked(port):
    with pytest.raises(ConfigError, match="x must be a port, from 1 to 65535"):
        checked_port(port, "x")
    if isinstance(port, str):
        with pytest.raises(ConfigError, match="SERVICE_PORT must be a port"):
            environment_of(SERVICE_PORT=port)


def test_a_name_for_several_models_is_refused():
    values = read_values(CONFIG)
    values["applications"][0]["args"]["models"]["b"] = {}
    with pytest.raises(ConfigError, match=r"MODEL_NAME is the name of an only model"):
        apply_environment(values, CONFIG, {"MODEL_NAME": "chat"})


def test_the_launcher_heeds_the_environment(monkeypatch):
    monkeypatch.setenv("SERVICE_PORT", "8123")
    monkeypatch.setenv("MODEL_NAME", "chat")
    monkeypatch.setattr("sys.argv", ["launch", str(CONFIG)])
    plans = []
    monkeypatch.setattr(launch, "launch", lambda config: plans.append(read_plan(config)) or 0)
    assert launch.main() == 0
    assert (plans[0].port, plans[0].model) == (8123, "chat")


def test_the_launcher_says_what_is_wrong_with_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("SERVICE_PORT", "eighty")
    monkeypatch.setattr("sys.argv", ["launch", str(CONFIG)])
    assert launch.main() == 1
    assert "SERVICE_PORT must be a port" in capsys.readouterr().err


def test_taken_port_names_the_remedy(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        plan = Plan(CONFIG, "127.0.0.1", taken.getsockname()[1], "m")
        with pytest.raises(ConfigError, match=r"http_options\.port"):
            check_port_free(plan)


def test_missing_flags():
    assert missing_flags(FAST_PATH) == []
    assert missing_flags({}) == [f"{name}=1" for name in FAST_PATH]


def test_haproxy_wrapper_mends_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr("deployments.haproxy.haproxy_binary", lambda: "/bin/echo")
    settings = haproxy_settings(tmp_path)
    config = tmp_path / "c.cfg"
    config.write_text(
        "global\n    option splice-request\ndefaults\n    mode http\n"
        "    errorfile 502 /etc/500.http\n"
        "frontend prometheus\n    bind :9101\n"
        "frontend http_frontend\n    bind *:8000\n"
        "listen stats\n  bind *:8404\n"
        "    http-request return status 404 content-type text/plain lf-string \"no '%[path]'\"\n"
    )
    wrapper = settings["RAY_SERVE_HAPROXY_BINARY_PATH"]
    for _ in range(2):  # Serve checks a file before it uses it
        said = subprocess.check_output([wrapper, "-db", "-f", str(config)], text=True)
        assert said == f"-db -f {config}\n"
    assert config.read_text() == (
        "global\n    tune.rcvbuf.server 262144\n"
        "defaults\n    timeout http-request 10s\n    mode http\n"
        f"    errorfile 502 {tmp_path}/unavailable.http\n"
        "frontend prometheus\n    bind 127.0.0.1:9101\n"
        "frontend http_frontend\n    bind *:8000\n"
        "listen stats\n  bind 127.0.0.1:8404\n"
        "    http-request return status 503 default-errorfiles\n"
    )
    head, _, body = (tmp_path / "unavailable.http").read_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["error"]["type"] == "service_unavailable"


def test_ingress_and_replica_processes_import_no_torch():
    code = (
        "import sys; import deployments.app, deployments.ingress.deployment; "
        "import deployments.engine_replica; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert said.strip() == "[]"
