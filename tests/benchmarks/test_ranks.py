import json

import pytest

from benchmarks import ranks
from tests.engine.byte_model import write_byte_model


def place(token, *others):
    """A token and the log-probabilities at its place, its own first."""
    return token, {each: -1.0 - index for index, each in enumerate((token, *others))}


def test_outputs_are_compared_up_to_where_they_part():
    alone = [place(1), place(2, 3), place(9)]
    together = [(1, {1: -1.25}), place(3, 2), place(7)]
    assert ranks.compare(alone, together) == {
        "same_tokens": 1,
        "parts": True,
        "close": True,
        "difference": 0.25,
    }


def test_tokens_that_the_other_thinks_unlikely_are_not_close():
    assert not ranks.compare([place(2, 3)], [place(3, 4)])["close"]
    assert not ranks.compare([place(2, 4)], [place(3, 2)])["close"]


def test_equal_outputs_are_close():
    pair = ranks.compare([place(1), place(2)], [place(1), place(2)])
    assert pair == {"same_tokens": 2, "parts": False, "close": True, "difference": 0.0}
    assert ranks.summary([pair]) == {"equal": 1, "close": 1, "of": 1, "largest_difference": 0.0}


@pytest.mark.slow
def test_two_ranks_on_the_cpu_give_the_tokens_of_one(tmp_path):
    model = write_byte_model(tmp_path / "model")
    out = tmp_path / "out.json"
    sizes = ["--requests", "3", "--longest", "20", "--tokens", "6", "--dtype", "float32"]
    ranks.main(["--model", model, *sizes, "--out", str(out)])
    assert json.loads(out.read_text())["summary"]["equal"] == 3
