"""Promises of the whole: short code, no stubs, documented, and figures that have a source."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "deployments", "cluster", "benchmarks")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 400
STUBS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
TORCH_FREE = (
    "engine",
    "engine.config",
    "engine.errors",
    "engine.kv_cache.hashing",
    "engine.model_config",
    "engine.model_source",
    "engine.output_processor",
    "engine.outputs",
    "engine.request",
    "engine.sampling_params",
    "engine.step",
    "engine.tokenizer",
)
FIGURE = re.compile(r"\d\s*(tok/s|tokens/s|requests/s|req/s|ms\b|x\b)")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(file):
    return str(file.relative_to(ROOT))


def public_definitions(tree):
    """Public functions and classes of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, FUNCTIONS) and not inner.name.startswith("_"):
                    yield inner


def is_overload_or_override(node):
    return any("overload" in ast.dump(d) or "override" in ast.dump(d) for d in node.decorator_list)


def is_stub(node):
    """Whether a function holds nothing but a docstring and `pass`, `...` or NotImplementedError."""
    if any(
        "abstractmethod" in ast.dump(d) or "overload" in ast.dump(d) for d in node.decorator_list
    ):
        return False
    rest = [s for s in node.body if not (isinstance(s, ast.Expr) and is_text(s.value))]
    return (
        len(rest) == 1 and isinstance(rest[0], ast.Raise) and "NotImplemented" in ast.dump(rest[0])
    )


def is_text(value):
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_code_is_short_documented_and_finished(file):
    text = file.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= MOST_FILE_LINES, "split this file"
    assert not STUBS.search(text), "finish it, or open an issue"
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, f"split {node.name}: {lines} lines"
            assert not is_stub(node), f"{node.name} is a stub"
    assert ast.get_docstring(tree), "say what this file is for"
    for node in public_definitions(tree):
        if not is_overload_or_override(node):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_every_dependency_is_justified():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(need for extra in extras for need in extra)]
    names = {re.match(r"[\w.-]+", need)[0] for need in wanted}
    text = (ROOT / "docs" / "dependencies.md").read_text()
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w.-]+", need)[0].lower().replace("_", "-") for need in wanted}
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names - {pin.lower().replace("_", "-") for pin in pins} == set()


def figure_tables(text):
    """Sections of a document that show measured figures in a table."""
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        rows = [line for line in section.splitlines() if line.startswith("|")]
        if any(FIGURE.search(row) or re.search(r"tok/s", row) for row in rows):
            yield section


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_figures_cite_a_result_file_that_exists(document):
    text = document.read_text()
    for cited in re.findall(r"benchmarks/results/([\w.-]+\.json)", text):
        assert (ROOT / "benchmarks" / "results" / cited).exists(), f"no result file {cited}"
    if document.name == "README.md":
        for section in figure_tables(text):
            assert "benchmarks/results/" in section, f"no source for: {section[:60]}"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=name_of)
def test_result_files_say_where_they_come_from(file):
    document = json.loads(file.read_text())
    assert {"command", "machine"} <= document.keys()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documents_name_files_that_exist(document):
    named = re.findall(
        r"`((?:engine|deployments|benchmarks|tests|docs|cluster)/[\w./]*)`", document.read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def imports_torch(modules):
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, text=True)
    return done.returncode != 0


@pytest.mark.parametrize("module", TORCH_FREE)
def test_plain_engine_modules_import_no_torch(module):
    assert not imports_torch([module])


def test_no_deployment_imports_torch():
    files = (ROOT / "deployments").rglob("*.py")
    parts = (file.relative_to(ROOT).with_suffix("").parts for file in files)
    assert not imports_torch(sorted(".".join(p).removesuffix(".__init__") for p in parts))
