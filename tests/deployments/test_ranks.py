import gc

from deployments import ranks
from engine.config import EngineConfig


def test_the_collector_is_spared_what_a_start_has_made(monkeypatch):
    made = [[] for _ in range(1000)]
    monkeypatch.setattr(ranks, "start_engine", lambda config, launch: made)
    try:
        assert ranks.start_ranked_engine(EngineConfig()) is made
        assert gc.get_freeze_count() > len(made)
    finally:
        gc.unfreeze()
