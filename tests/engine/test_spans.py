"""How the keys of decode rows are divided."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.spans import SpanPlan

LENGTHS = st.lists(st.integers(0, 300) | st.integers(0, 40_000), max_size=40)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 600), st.integers(1, 64), st.none() | st.integers(1, 5000))
def test_spans_cover_the_keys_and_fit_where_they_go(lengths, programs, num_kv, window):
    plan = SpanPlan(max(1, programs // num_kv), window)
    found = plan.divide(np.array(lengths, dtype=np.int64))
    assert len(found) <= plan.most(len(lengths))
    for row, length in enumerate(lengths):
        of_row = found[found[:, 0] == row]
        assert of_row[:, 1].tolist() == [*range(len(of_row))]
        assert (of_row[:, 2] == len(of_row)).all() and len(of_row) <= 32
        assert (of_row[:, 3] == length).all()
        assert bool(length) == bool(len(of_row))
    seen = found[:, 3] if window is None else np.minimum(found[:, 3], window)
    assert (np.diff(seen) <= 0).all()
    split = found[:, 2] > 1
    assert split.sum() * num_kv <= 2 * programs and not split[split.sum() :].any()


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([480] * 4, [4] * 4),  # not divided by less than 128
        ([500] * 64, [2] * 64),  # all fit at a time
        ([500] * 200, [1] * 200),
        ([800, 160], [7, 2]),
        ([8000, 300, 300], [32, 3, 3]),
        ([8000, *[300] * 64], [25, *[1] * 64]),  # about as long as the others
        ([30_000, *[500] * 200], [30, *[1] * 200]),
    ],
)
def test_long_rows_have_more_spans(lengths, counts):
    found = SpanPlan(132).divide(np.array(lengths))
    assert [(found[:, 0] == row).sum() for row in range(len(lengths))] == counts


def test_keys_beyond_the_window_do_not_count():
    windowed = SpanPlan(66, 4096).divide(np.array([32_000, 32_000, 4096, 4096]))
    alike = SpanPlan(66).divide(np.array([4096] * 4))
    assert windowed[:, :3].tolist() == alike[:, :3].tolist()


def test_backends_without_spans_get_none():
    plan = SpanPlan(0)
    assert plan.divide(np.array([5, 7])).shape == (0, 4) and plan.most(2) == 0
