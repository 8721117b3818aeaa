"""What a request cannot reach: files, code, and the log."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from deployments.ingress.errors import to_api_error
from engine.errors import EngineDead, InvalidRequest
from tests.deployments.plane import open_plane

ROOT = Path(__file__).resolve().parents[2]
CODE_FROM_DATA = {
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"),
    *("eval", "exec", "compile", "torch.load", "numpy.load", "np.load", "yaml.load", "os.system"),
}
"""Modules and functions that run, or can be made to run, what they read."""
MARK = "zyzzyva"
LOST = "The engine of the request was lost; try again."
FAILED = "The server failed to handle the request."


def names(tree: ast.AST) -> set[str]:
    """Modules that are imported and functions that are called."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
    return found


def test_nothing_runs_what_it_reads():
    """Between our processes go msgspec structs; weights are safetensors or GGUF; YAML is safe."""
    files = [path for room in ("engine", "deployments") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        source = path.read_text()
        assert not names(ast.parse(source)) & CODE_FROM_DATA, path
        assert "trust_remote_code=True" not in source, path


def test_what_imports_by_name():
    """What the allow-list has; else only modules of ours, by names that our code lists."""
    importing = {
        str(path.relative_to(ROOT))
        for room in ("engine", "deployments")
        for path in (ROOT / room).rglob("*.py")
        if {"importlib.import_module", "__import__"} & names(ast.parse(path.read_text()))
    }
    ours = {"deployments/cli/main.py", "engine/__init__.py"}
    assert importing == {"deployments/plugins/loading.py", *ours}


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../etc", "smollm2-135m-instruct", "m/", "./m", "file:///etc", "M"]
)
async def test_models_are_found_by_their_served_names_alone(name):
    async with open_plane() as plane:
        for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
            body = {"model": name, "prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}
            response = await plane.http.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("cause", "status", "code", "message"),
    [
        (InvalidRequest("the prompt is too long.", "prompt"), 400, None, "The prompt is too long."),
        (EngineDead("10.0.0.1 is gone"), 503, "engine_lost", LOST),
        (KeyError("/secret"), 500, None, FAILED),
        (OSError(2, "No such file", "/secret"), 500, None, FAILED),
    ],
)
def test_errors_of_remote_calls_tell_nothing(cause, status, code, message):
    """Ray wraps them with a traceback, an address and a process."""
    trace = 'Traceback: File "/secret/x.py"'
    error = RayTaskError("generate", trace, cause, pid=1, ip="10.0.0.1").as_instanceof_cause()
    answer = to_api_error(error)
    assert (answer.status, answer.code, answer.message) == (status, code, message)
    assert (answer.retry_after_s is not None) == (status == 503)


async def test_prompts_and_answers_are_not_logged(caplog):
    """Neither when all is well, nor when the request, the program or the engine is at fault."""
    caplog.set_level(logging.DEBUG)
    asked = {"model": "m", "prompt": MARK, "max_tokens": 3}
    chat = {"model": "m", "messages": [{"role": "user", "content": MARK}], "max_tokens": 3}
    async with open_plane() as plane:
        assert MARK in (await plane.http.post("/v1/completions", json=asked)).text
        for path, body, status in (
            ("/v1/chat/completions", chat, 200),
            ("/v1/completions", {**asked, "stream": True}, 200),
            ("/v1/completions", {**asked, "prompt": f"{MARK} " * 1000}, 400),
            ("/v1/completions", {**asked, "stop": [MARK, 5]}, 400),
            ("/v1/chat/completions", {**chat, "messages": [{"content": MARK}]}, 400),
            ("/v1/chat/completions", {**chat, "chat_template_kwargs": {"self": MARK}}, 400),
        ):
            assert (await plane.http.post(path, json=body)).status_code == status
        plane.handle.failure = KeyError("no such thing")
        assert (await plane.http.post("/v1/completions", json=asked)).status_code == 500
    assert "unexpected error" in caplog.text
    async with open_plane(die_at_token=1) as plane:
        assert (await plane.http.post("/v1/completions", json=asked)).status_code == 503
    assert MARK not in caplog.text
