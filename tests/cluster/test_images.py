"""The image and what runs beside it, as far as that can be told without Docker."""

import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deployments.haproxy import haproxy_settings
from deployments.launch import STOP_LIMIT_S
from tests.cluster.documents import CLUSTER, ROOT, args_of, load, longest_answer_s

DOCKER = CLUSTER / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = load(DOCKER / "compose.yaml")
SERVICES = COMPOSE["services"]
SCRIPTS = Path(sys.executable).parent


def run(*words: str) -> None:
    done = subprocess.run(words, cwd=DOCKER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_of_dockerfiles_is_content():
    run(str(SCRIPTS / "hadolint"), "Dockerfile")


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_follow_the_schema(name):
    run(str(SCRIPTS / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", name)


def test_what_the_build_takes_is_not_ignored():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [name.rstrip("*") for name in packages["packages"]["find"]["include"]]
    copied = re.findall(r"^COPY (\S+)", DOCKERFILE, re.MULTILINE)
    bound = re.findall(r"source=([\w.]+)", DOCKERFILE)
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert {*folders, *bound, "README.md", "LICENSE"} <= let_through
    for name in copied:
        assert (ROOT / name).is_file()
        assert name.split("/")[0] in let_through


def test_images_are_pinned_and_run_as_a_user():
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)", DOCKERFILE, re.MULTILINE)
    others = [SERVICES[name]["image"] for name in ("prometheus", "grafana")]
    for image in (base, *others):
        assert re.search(r":v?\d+\.\d+\.\d+", image), f"{image} is no release"
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE) == ["1000:1000"]
    for line in re.findall(r"pip install (?!--no-deps --no-build)[^\n]*", DOCKERFILE):
        assert "--constraint /src/constraints.txt" in line


def test_the_wrapper_of_haproxy_is_where_ray_looks(tmp_path):
    wrapper = haproxy_settings(tmp_path)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    inside = wrapper.replace(str(tmp_path), "/opt/haproxy")
    assert f"RAY_SERVE_HAPROXY_BINARY_PATH={inside}" in DOCKERFILE
    assert "haproxy_settings(Path('/opt/haproxy'))" in DOCKERFILE


def health_check() -> list[str]:
    (words,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return json.loads(words)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_the_server(status, healthy):
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, *health_check()[1:]],
            env={"SERVICE_PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:1"},
            stderr=subprocess.DEVNULL,
            check=False,
        )
        server.shutdown()
    assert (done.returncode == 0) == healthy
    assert asked == ["/health"]


def test_a_stop_waits_for_running_answers():
    longest_s = longest_answer_s(args_of(load(DOCKER / "serve_config.yaml")))
    grace_s = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > longest_s + STOP_LIMIT_S


def test_nothing_is_open_to_other_machines_or_writes_to_models():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
    assert "${MODELS:-./models}:/models:ro" in SERVICES["server"]["volumes"]
    assert "TRUNKLINE_API_KEYS" in SERVICES["server"]["environment"]


def target(service: str, suffix: str) -> str:
    """Where a service finds a file or folder that is mounted."""
    (mounted,) = [v for v in SERVICES[service]["volumes"] if v.split(":")[0].endswith(suffix)]
    return mounted.split(":")[1]


def test_prometheus_finds_what_ray_writes():
    """Ray's list of targets is an absolute link, so it must lie at the same path."""
    (job,) = load(DOCKER / "prometheus.yaml")["scrape_configs"]
    (file,) = job["file_sd_configs"][0]["files"]
    assert str(Path(file).parent) == target("server", "ray") == target("prometheus", "ray")


def test_grafana_finds_prometheus_and_dashboards():
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = load(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load(provisioning / "dashboards" / "trunkline.yaml")["providers"]
    assert provider["options"]["path"] == target("grafana", "dashboards")
    assert (DOCKER / "grafana" / "dashboards").is_dir()
