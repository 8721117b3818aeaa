"""What a run of a batch takes from the output file of one that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.cli import batch
from deployments.cli.batch_file import open_output
from tests.deployments.cli.test_batch import line

ANSWERED_1 = b'{"custom_id": "1", "response": {"status_code": 200}, "error": null}\n'


def asked(requests: Path, out: Path) -> list[str]:
    """Prompts that a run asks; it is cut off before any answer."""
    file, done = open_output(out)
    with file:
        left = batch._left(
            requests, done, lambda record: file.write(json.dumps(record).encode() + b"\n"), int
        )
        return [request.body["prompt"] for request in left]


@pytest.mark.parametrize(
    "lines", [(line("1", "first"), line("1")), (line("1", method="GET"), line("1", "first"))]
)
def test_a_bad_line_answers_no_other_with_its_id(tmp_path, write_lines, lines):
    """It is told at once, and the run may be cut off while the request is under way."""
    requests, out = write_lines(*lines), tmp_path / "out.jsonl"
    for _ in range(2):
        assert asked(requests, out) == ["first"]
        assert len(out.read_bytes().splitlines()) == 1  # nothing is told twice


def test_a_repeated_id_is_told_after_the_answer_too(tmp_path, write_lines):
    requests, out = write_lines(line("1"), line("1")), tmp_path / "out.jsonl"
    out.write_bytes(ANSWERED_1)
    assert asked(requests, out) == []
    told = json.loads(out.read_bytes().splitlines()[1])
    assert (told["error"]["code"], told["error"]["line"]) == ("duplicate_custom_id", 2)


def test_a_bad_line_is_told_once_though_lines_come_before_it(tmp_path, write_lines):
    out, bad = tmp_path / "out.jsonl", [line("1", method="GET"), line("2"), line("2")]
    assert asked(write_lines(*bad), out) == asked(write_lines(*bad[:2], *bad[1:]), out)
    told = out.read_bytes()
    assert asked(write_lines(line("0", "first"), *bad), out)[0] == "first"
    assert out.read_bytes() == told and len(told.splitlines()) == 2


def test_a_bad_line_that_was_put_right_is_asked(tmp_path, write_lines):
    out = tmp_path / "out.jsonl"
    assert asked(write_lines(line("1", method="GET")), out) == []
    assert asked(write_lines(line("1", "first")), out) == ["first"]


def test_output_is_given_back_as_it_was(tmp_path):
    path = tmp_path / "out.jsonl"
    refused = b'{"custom_id": "a", "response": {"status_code": 400}}\n'
    text = refused + b'{"custom_id": null, "response": null, "error": {"line": 3, "code": "x"}}\n'
    path.write_bytes(text)
    file, done = open_output(path)
    file.close()
    assert path.read_bytes() == text
    assert (done.custom_ids, done.bad_lines) == ({"a"}, {(3, "x")})
    assert str(done.tally) == "0 answered, 1 refused, 1 bad lines"
