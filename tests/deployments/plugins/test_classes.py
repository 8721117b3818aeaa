"""Which classes of plug-ins are imported at all, and which of them can serve."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.app import build
from deployments.config import AppArgs
from deployments.ingress.app import check_plugin_paths
from deployments.ingress.options import IngressOptions
from deployments.plugins import ServingEngine
from deployments.plugins.loading import load_classes
from engine.errors import ConfigError
from tests.deployments.plugins.asking import Ask, AskBody, Named

HERE = "tests.deployments.plugins.test_classes"


def arguments(class_name: str, *allowed: str) -> dict[str, Any]:
    return {
        "models": {"m": {"class_name": class_name}},
        "ingress": {"allowed_classes": list(allowed)},
    }


def test_nothing_is_imported_that_is_not_allowed():
    """`this` prints when it is imported, and nobody else imports it."""
    for name in ("this", "Zen", "this:Zen", "../this", "os.system", ""):
        with pytest.raises(ConfigError, match="allow-list"):
            AppArgs(**arguments(name, f"{HERE}:Ask")).check()
    assert "this" not in sys.modules
    with pytest.raises(ConfigError, match="allow-list"):
        load_classes({"m": "Ask"}, [])


def test_what_is_allowed_but_not_named_is_not_imported():
    args = AppArgs(**arguments("Ask", "this:Zen", f"{HERE}:Ask"))
    (found,) = args.plugin_classes().values()
    assert found.__name__ == "Ask" and "this" not in sys.modules


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (["cluster.examples.ollama"], "package.module:Class"),
        (["../x:Y"], "package.module:Class"),
        ([""], "package.module:Class"),
        (["a:Ask", "b:Ask"], "same class name"),
    ],
)
def test_wrong_allow_lists(allowed, words):
    with pytest.raises(ValidationError, match=words):
        IngressOptions(allowed_classes=allowed)


class NoPath(Ask):
    path = "ask"


class NoBody(Ask):
    request_model = dict  # type: ignore[assignment]


class NoPrompt(ServingEngine[AskBody]):
    path = "/x"
    request_model = AskBody


class Wide(Ask):
    path = "/{anything}"


class Taken(Ask):
    path = "/v1/completions"


class Broken(Ask):
    path = "/a/{b:nothing}"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.at_all:Ask", "cannot import nowhere.at_all:Ask .*No module named"),
        (f"{HERE}:Absent", "no subclass"),
        (f"{HERE}:AskBody", "no subclass"),
        (f"{HERE}:NoPath", "begins with /"),
        (f"{HERE}:NoBody", "request_model"),
        (f"{HERE}:NoPrompt", "must override create_prompt"),
        (f"{HERE}:Wide", r"wants the path /\{anything\}, but .* is that of the server"),
        (f"{HERE}:Taken", "/v1/completions is that of the server"),
        (f"{HERE}:Broken", "Unknown path convertor"),
    ],
)
def test_classes_that_cannot_serve_fail_at_build(path, words):
    with pytest.raises(ConfigError, match=words):
        build(AppArgs(**arguments(path.partition(":")[2], path)))


def test_plugins_answer_for_one_another_no_more_than_for_the_server():
    class Same(Ask):
        pass

    check_plugin_paths([Ask, Ask])
    check_plugin_paths([Ask, Named])

    class One(Ask):
        path = "/ask/one"

    with pytest.raises(ConfigError, match="that of Ask"):
        check_plugin_paths([Ask, Same])
    for order in ([Ask, One], [One, Ask]):  # whichever came second would never be asked
        with pytest.raises(ConfigError, match="wants the path /ask/"):
            check_plugin_paths(order)
