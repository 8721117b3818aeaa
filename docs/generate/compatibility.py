"""docs/compatibility.md: what becomes of each field of OpenAI's API and vLLM's server."""

from __future__ import annotations

from collections.abc import Iterator

from docs.generate.markdown import table
from tests.compatibility.endpoints import ENDPOINTS
from tests.compatibility.rows import Row, Table
from tests.compatibility.tables import TABLES

_INTRO = """\
# Compatibility

Every field of a request that OpenAI's API or vLLM's server knows, and what becomes of it here. Made
by `make docs` from the tables in `tests/compatibility/`. The tests there send each field to an
engine and look for its effect, the refusal, or an answer that is the same as without it; they fail
when the `openai` package has a field that has no row. vLLM's fields are those of its server in late
2026, and older ones that clients still send.

* **yes**: it has the effect that it has there.
* **in part**: some values have, and others are refused with a 400.
* **refused**: a 400 whose `param` names the field, unless the value asks for nothing.
* **no effect**: taken, and the answer is the same as without.

A field that neither has is ignored. [api-reference.md](api-reference.md) has the types, defaults
and ranges.
"""
_IS_THERE = {True: "●", False: ""}


def compatibility() -> str:
    """The page."""
    return "\n".join(
        (_INTRO, *_endpoints(), *(line for found in TABLES for line in _fields(found)))
    )


def _endpoints() -> Iterator[str]:
    yield "## Endpoints\n\nOf OpenAI's, one for each resource of the `openai` package and more.\n"
    rows = [(f"`{e.method} {e.path}`", e.of, e.verdict, e.note) for e in ENDPOINTS]
    yield table(("Endpoint", "Of", "Here", "Note"), rows)


def _fields(found: Table) -> Iterator[str]:
    yield f"## {found.path}\n"
    rows = sorted(found.rows, key=lambda row: (row.field not in found.openai, row.field))
    if found.openai:
        yield table(("Field", "OpenAI", "vLLM", "Here", "Note"), (_row(found, row) for row in rows))
    else:
        yield table(("Field", "Here", "Note"), ((f"`{r.field}`", r.verdict, r.note) for r in rows))


def _row(found: Table, row: Row) -> tuple[str, ...]:
    there = (row.field in found.openai, row.field in found.vllm)
    return (f"`{row.field}`", *(_IS_THERE[known] for known in there), row.verdict, row.note)
