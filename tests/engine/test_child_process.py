"""Processes of the package's own modules."""

import subprocess
import sys
from pathlib import Path

from engine.child_process import module_command, module_environment


def test_modules_come_from_the_package_and_not_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path[1:]])  # as in an interactive session
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(Path(__file__).parents[2])])
    command = module_command("engine.structured_outputs.messages")
    environment = module_environment()
    assert environment["PYTHONPATH"].endswith(str(Path(__file__).parents[2]))
    subprocess.run(command, env=environment, check=True)
