"""The file for `ray up`, by Ray's own checks."""

import shlex

import jsonschema
import pytest
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from deployments.flags import EVERY_NODE
from tests.cluster.documents import CLUSTER, load

LAUNCHER = load(CLUSTER / "launcher.yaml")


def start_words(role: str) -> list[str]:
    (command,) = [c for c in LAUNCHER[f"{role}_start_ray_commands"] if "ray start" in c]
    return shlex.split(command)[2:]


def docker_run(role: str) -> list[str]:
    """The words by which Ray starts the container of a node."""
    docker = LAUNCHER["docker"]
    options = [*docker["run_options"], *docker.get(f"{role}_run_options", [])]
    return shlex.split(
        docker_start_cmds(
            LAUNCHER["auth"]["ssh_user"],
            docker["image"],
            {},
            docker["container_name"],
            options,
            LAUNCHER["cluster_name"],
            "/home/trunkline",
            "docker",
        )
    )


def test_ray_accepts_it():
    validate_config(prepare_config(LAUNCHER))


def test_what_ray_does_not_know_is_noticed():
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**LAUNCHER, "setup_comands": []}))


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_node_gets_all_flags(role):
    words = docker_run(role)
    settings = [words[index + 1] for index, word in enumerate(words) if word == "-e"]
    assert {f"{name}={value}" for name, value in EVERY_NODE.items()} <= set(settings)
    assert "RAY_AUTH_MODE=token" in settings


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_knows_how_a_node_is_started(role):
    options = {word for option in start.params for word in option.opts}
    given = [word.split("=")[0] for word in start_words(role)]
    assert set(given) <= options


def test_the_head_does_no_work_and_only_workers_have_gpus():
    assert "--num-cpus=0" in start_words("head")
    assert "--gpus" in docker_run("worker")
    assert "--gpus" not in docker_run("head")


def test_models_are_there_on_every_node_and_cannot_be_changed():
    for role in ("head", "worker"):
        assert "/models:/models:ro" in docker_run(role)
