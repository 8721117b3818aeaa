"""API keys: which files and variables are taken, and what the options do with them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments import launch
from deployments.api_keys import CHECK_PERIOD_S, KEY_VARIABLES, KeySource, read_key_file
from deployments.app import build
from deployments.config import AppArgs
from deployments.ingress.options import IngressOptions
from deployments.launch import read_plan
from engine.errors import ConfigError

CONFIG = Path(__file__).resolve().parents[2] / "serve_config.yaml"
SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (*KEY_VARIABLES, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def write(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_file_has_a_key_a_line_with_settings(tmp_path):
    text = """
    # comment
    sk-a
    sk-b   name=bob requests_per_minute=0.5  # another
    sk-c   max_concurrent_requests=3 name=carol
    """
    keys = read_key_file(Path(write(tmp_path, text)))
    assert [key.digest for key in keys] == [
        hashlib.sha256(key).digest() for key in (b"sk-a", b"sk-b", b"sk-c")
    ]
    assert [(k.name, k.max_concurrent_requests, k.requests_per_minute) for k in keys] == [
        ("", None, None),
        ("bob", None, 0.5),
        ("carol", 3, None),
    ]


def test_a_sharp_within_a_key_is_part_of_it(tmp_path):
    keys = read_key_file(Path(write(tmp_path, "sk-a#b\nsk-c# name=c#d\t#x\n#sk-e\n\t # sk-f")))
    assert [(k.digest, k.name) for k in keys] == [
        (hashlib.sha256(b"sk-a#b").digest(), ""),
        (hashlib.sha256(b"sk-c#").digest(), "c#d"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("# only a comment", "holds no key"),
        (f"{SECRET} bob", "line 1: after the key there may be name=…"),
        (f"x\n{SECRET} rate=5", "line 2: after the key there may be"),
        (f"{SECRET} digest=x", "line 1: after the key there may be"),
        (f"{SECRET} name=a name=b", "each once"),
        (f"{SECRET} requests_per_minute=many", "line 1: Expected `float"),
        (f"{SECRET} requests_per_minute=nan", "above 0"),
        (f"{SECRET} max_concurrent_requests=0", "above 0"),
        (f"{SECRET} max_concurrent_requests=1.5", "line 1: Expected `int"),
        (f"{SECRET}é", "line 1: API keys must be of printable ASCII"),
        (f"{SECRET}\nx\n{SECRET}", "line 3: this key has been there before"),
    ],
)
def test_wrong_files_are_named_and_keys_are_not(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_key_file(Path(path))
    assert words in str(caught.value) and path in str(caught.value)
    assert SECRET not in str(caught.value)


def test_file_that_is_not_there_or_open_to_all(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*/keys: No such file"):
        KeySource(str(tmp_path / "keys"))
    for mode in (0o604, 0o602):
        with pytest.raises(ConfigError, match="chmod 600"):
            KeySource(write(tmp_path, SECRET, mode))
    Path(write(tmp_path, "", 0o600)).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        KeySource(str(tmp_path / "keys"))


def test_keys_of_the_environment_and_the_file_count_alike(tmp_path):
    environment = {"TRUNKLINE_API_KEYS": "one, two", "VLLM_API_KEY": "a,b"}
    source = KeySource(write(tmp_path, "three name=third"), environment)
    assert all(source.find(key) for key in (b"one", b"two", b"a,b"))
    assert source.find(b"three").name == "third"
    for wrong in (b"", b"a", b"One", b"one,", b"one, two", "é".encode("latin-1")):
        assert source.find(wrong) is None


@pytest.mark.parametrize("name", KEY_VARIABLES)
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_variable_does_not_open_the_server(name, value):
    with pytest.raises(ConfigError, match="must not hold empty keys"):
        KeySource(None, {name: value})
    with pytest.raises(ConfigError, match="must not hold empty keys"):
        KeySource(None, {"TRUNKLINE_API_KEYS": "a,,b"})


def test_every_key_is_compared_whichever_matches(monkeypatch):
    """So that times do not tell which part of a key, or which key, was nearly right."""
    seen: list[tuple[bytes, bytes]] = []
    source = KeySource(None, {"TRUNKLINE_API_KEYS": "a,b,c"})
    monkeypatch.setattr("hmac.compare_digest", lambda x, y: seen.append((x, y)) or x == y)
    assert source.find(b"a") is not None
    assert source.find(b"longer than any key of this server") is None
    assert len(seen) == 6
    assert {len(value) for pair in seen for value in pair} == {32}


def test_file_is_read_again_when_it_changes(tmp_path, caplog):
    time_s = 0.0
    source = KeySource(write(tmp_path, "old"), {}, now=lambda: time_s)
    write(tmp_path, "new name=n")
    assert source.find(b"old") and not source.find(b"new")
    time_s += CHECK_PERIOD_S
    assert source.find(b"new") and not source.find(b"old")
    write(tmp_path, f"{SECRET} wrong")
    os.utime(tmp_path / "keys", ns=(1, 1))
    time_s += CHECK_PERIOD_S
    assert source.find(b"new")
    assert "stay as they were" in caplog.text and SECRET not in caplog.text
    (tmp_path / "keys").unlink()
    time_s += CHECK_PERIOD_S
    assert source.find(b"new") and "cannot read" in caplog.text
    write(tmp_path, "third")
    time_s += CHECK_PERIOD_S
    assert source.find(b"third") and not source.find(b"new")


def test_wrong_keys_end_the_start_before_anything_slow(tmp_path):
    missing = {"ingress.api_keys_file": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match="cannot read the file of API keys"):
        build(AppArgs(**missing))
    with pytest.raises(ConfigError, match="there are no API keys here"):
        build(AppArgs(**{"ingress.require_api_key": True}))


def test_keys_of_the_builder_must_be_on_the_cluster_too(monkeypatch):
    """Where the application is built, the environment may be another than where it runs."""
    monkeypatch.setenv("TRUNKLINE_API_KEYS", SECRET)
    app = build(AppArgs())
    args = app._bound_deployment.init_args[0]
    assert args.ingress.require_api_key
    assert SECRET not in repr(args) and SECRET not in args.model_dump_json()
    monkeypatch.delenv("TRUNKLINE_API_KEYS")
    with pytest.raises(ConfigError, match="in the environment of every node"):
        args.ingress.key_source()


def test_launcher_knows_of_keys_and_refuses_those_that_would_not_arrive(monkeypatch, tmp_path):
    assert not read_plan(CONFIG).needs_key
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    plan = read_plan(CONFIG)
    assert plan.needs_key and SECRET not in repr(plan)
    assert "Authorization: Bearer KEY" in launch._ready_text(plan, 1)
    assert launch.environment(plan, tmp_path)["VLLM_API_KEY"] == SECRET
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ConfigError, match=r"api_keys_file"):
        read_plan(CONFIG)


def test_launcher_refuses_a_wrong_file(tmp_path):
    values = yaml.safe_load(CONFIG.read_text())
    values["applications"][0]["args"]["ingress"]["api_keys_file"] = write(tmp_path, "x", 0o644)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="chmod 600"):
        read_plan(path)


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://*.a.example", ""])
def test_wrong_origins_are_named(origin):
    with pytest.raises(ValidationError, match="is no origin"):
        IngressOptions(cors_allow_origins=[origin])
    IngressOptions(cors_allow_origins=["*", "https://a.example:8443", "tauri://localhost"])
