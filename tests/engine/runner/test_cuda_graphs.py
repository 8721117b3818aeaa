import itertools

import pytest

from engine.runner.cuda_graphs import StepGraphs, graph_sizes, padded_graph_sizes
from engine.step import StepPlan


@pytest.mark.parametrize("most", [1, 2, 3, 5, 31, 32, 33, 200, 256, 257, 512, 513, 1000, 4096])
def test_sizes_rise_to_the_largest_batch(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    for below, above in itertools.pairwise(sizes):
        assert above - below <= max(below, 8)  # padding at most doubles a small batch …
        assert above - below <= 64  # … and adds little to a large one


def decodes(rows, **changes):
    plan = StepPlan(1, [*range(rows)], [9] * rows, [1] * rows, [True] * rows)
    for name, value in changes.items():
        setattr(plan, name, value)
    return plan


def test_a_plan_gets_the_smallest_graph_that_holds_it():
    graphs = StepGraphs([1, 2, 4, 7], num_rows, no_batch, no_batch, float)
    sizes = {rows: graphs.size_for(decodes(rows)) for rows in range(1, 9)}
    assert sizes == {1: 1, 2: 2, 3: 4, 4: 4, 5: 7, 6: 7, 7: 7, 8: None}


def test_plans_that_are_too_large_or_of_another_kind_get_none():
    assert StepGraphs([1, 2, 4], num_rows, no_batch, no_batch, float).size_for(decodes(5)) is None
    assert StepGraphs([], num_rows, no_batch, no_batch, float).size_for(decodes(1)) is None
    graphs = StepGraphs([1, 2, 4], lambda plan: None, no_batch, no_batch, float)
    assert graphs.size_for(decodes(2)) is None


@pytest.mark.parametrize("most", [8, 64, 100, 512, 1000, 16384])
def test_padded_sizes_fit_the_budget(most):
    sizes = padded_graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert all(size <= most for size in sizes)
    assert not sizes or sizes[-1] > min(most, 1024) - 128


def num_rows(plan):
    return len(plan.rows)


def no_batch(*_):
    raise AssertionError
