import threading

import pytest

from benchmarks.serving.background import in_background


def test_work_ends_with_what_it_runs_beside_whatever_becomes_of_that():
    end, seen = threading.Event(), []
    with pytest.raises(ZeroDivisionError), in_background(lambda: seen.append(end.wait(60)), end):
        assert not seen and 1 / 0
    assert seen == [True]
