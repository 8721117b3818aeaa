import itertools

import pytest

from engine.runner.cuda_graphs import DecodeGraphs, graph_sizes
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
    graphs = DecodeGraphs([1, 2, 4, 7], lambda inputs: None)
    sizes = {rows: graphs.size_for(decodes(rows)) for rows in range(1, 9)}
    assert sizes == {1: 1, 2: 2, 3: 4, 4: 4, 5: 7, 6: 7, 7: 7, 8: None}


def test_other_steps_get_none():
    graphs = DecodeGraphs([1, 2, 4], lambda inputs: None)
    assert graphs.size_for(decodes(2, num_tokens=[1, 5])) is None
    assert graphs.size_for(decodes(2, samples=[True, False])) is None
