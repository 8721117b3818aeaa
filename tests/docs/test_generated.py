"""The pages that are made from the code are those that the code makes now, and tell all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from deployments.config import AppArgs
from deployments.ingress.openapi import OPERATIONS
from docs.generate.api_reference import api_reference, models_of
from docs.generate.markdown import anchor, limits, table, type_name
from docs.generate.pages import PAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", PAGES)
def test_page_is_what_the_code_makes(path):
    assert (ROOT / path).read_text() == PAGES[path](), "run `make docs`"


def test_every_field_has_a_line_that_says_what_it_means():
    page = api_reference()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    told = {row[0][2:]: row[-1] for row in rows}
    bodies = [operation.body for operation in OPERATIONS if operation.body]
    options = [AppArgs, *models_of(AppArgs)]
    fields = {f"`{name}`" for model in (*bodies, *options) for name in model.model_fields}
    assert fields - told.keys() == set()
    assert [name for name in fields if len(told[name]) < len("Only null. |")] == []


def test_links_lead_to_headings():
    page = api_reference()
    headings = {anchor(line.lstrip("# ")) for line in page.splitlines() if line[:1] == "#"}
    targets = {part.split(")")[0] for part in page.split("](#")[1:]}
    assert targets - headings == set()


class Inner(BaseModel):
    size: Annotated[int, Field(ge=1, lt=2**63)] | None = None


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (str | None, "string"),
        (int | float, "integer, number"),
        (list[Any], "array"),
        (list[list[int]], "array of arrays of integers"),
        (dict[str, Any] | str, "object, string"),
        (dict[str, Inner], "object of [Inner](#inner)"),
        (Literal["a", "b"] | None, '`"a"`, `"b"`'),
        (Any, "any"),
    ],
)
def test_types_are_told_in_the_words_of_json(annotation, name):
    assert type_name(annotation) == name


def test_limits_are_found_within_a_type():
    assert limits(Inner.model_fields["size"]) == "at least 1, below 2^63"


def test_bars_do_not_end_a_cell():
    assert table(("a",), [("x | y",)]).splitlines()[-1] == "| x \\| y |"
