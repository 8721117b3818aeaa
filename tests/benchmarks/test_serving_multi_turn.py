"""What a load could hit at best, and how a routing policy is judged by the engines' journals."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving import multi_turn
from benchmarks.serving.__main__ import main
from benchmarks.serving.answers import Answer
from benchmarks.serving.journal import Admission, EngineJournal
from benchmarks.serving.multi_turn import judge
from benchmarks.serving.prefixes import InfiniteCache


def words(*names: str) -> str:
    return "".join(f" {name}" for name in names)


def test_only_full_blocks_with_the_same_beginning_hit():
    cache = InfiniteCache(block_size=2)
    cache.add(words("a", "b", "c", "d", "e"))
    assert cache.hits(words("a", "b", "c", "d", "e", "f")) == 4
    assert cache.hits(words("a", "b", "c", "x", "e")) == 2
    assert cache.hits(words("c", "d", "a", "b")) == 0
    cache.add(words("c", "d"))
    assert cache.hits(words("c", "d", "c", "d", "z")) == 2


def test_one_token_is_always_left_to_compute():
    cache = InfiniteCache(block_size=2)
    cache.add(words("a", "b", "c", "d"))
    assert cache.hits(words("a", "b", "c", "d")) == 2
    assert cache.hits(words("a", "b", "c", "d", "e")) == 4


def answer(request_id: str, sent: float, prompt: str, text: str, error: str | None = None):
    count = text.count(" ")
    return Answer(prompt, count, sent, request_id, [(sent + 1, text)], 1, count, error)


def test_the_last_token_of_an_answer_was_never_computed():
    first = answer("r", 0.0, words("a", "b", "c"), words("d"))
    again = answer("s", 2.0, words("a", "b", "c", "d", "e"), words("f"))
    assert InfiniteCache(block_size=2).replay([again, first]) == 2
    longer = answer("r", 0.0, words("a", "b", "c"), words("d", "x"))
    cache = InfiniteCache(block_size=2)
    assert cache.replay([again, longer]) == 4
    assert cache.num_tokens == 4


def test_engines_are_judged_by_what_they_admitted():
    prompt = words("a", "b", "c", "d")
    answers = [
        answer("r", 0.0, prompt, words("e", "f", "g")),
        answer("s", 2.0, prompt, words("e")),
        answer("bad", 3.0, prompt, words("e"), error="HTTP 503"),
    ]
    engines = [
        EngineJournal(admissions={"r": [Admission("r", 4, 0), Admission("r", 4, 2)]}),
        EngineJournal(admissions={"s": [Admission("s", 4, 2)], "x": [Admission("x", 9, 9)]}),
    ]
    record = judge(answers, engines, block_size=2)
    assert (record["hit_tokens"], record["infinite_hit_tokens"]) == (2, 2)
    assert record["infinite_cache_tokens"] == 6
    assert record["of_infinite_hits"] == 1.0
    assert record["imbalance"] == {
        "requests": 1.0,
        "computed_tokens": pytest.approx(4 / 3, abs=1e-3),
        "output_tokens": 1.5,
    }
    assert [row["preemptions"] for row in record["engines"]] == [1, 0]


def test_nothing_to_hit_has_no_share():
    assert judge([], [EngineJournal()], 16)["of_infinite_hits"] is None


def test_each_policy_has_a_line(tmp_path, monkeypatch, capsys):
    def measure(*_: object) -> dict:
        spread = dict.fromkeys(("p50", "p90", "p99"), 1.0)
        judged = judge([answer("r", 0.0, words("a"), words("b"))], [EngineJournal()], 16)
        judged["imbalance"] = dict.fromkeys(judged["imbalance"], 1.0)
        bursts = {"4/4/4/4": 10}
        return {"requests": 1, "errors": {}, "ttft_ms": spread, "bursts": bursts} | judged

    class Started:
        def __enter__(self) -> dict:
            return {}

        def __exit__(self, *_: object) -> None:
            pass

    started = []
    monkeypatch.setattr(multi_turn, "_measure_policy", lambda *a: measure() | {"disturbance": 0.5})
    monkeypatch.setattr(
        multi_turn, "serve_fake", lambda words, log: started.append(words) or Started()
    )
    out = tmp_path / "out.json"
    main(["multi-turn", "--policies", "prefix_load", "round_robin", "--fake", "engines=2",
          "--out", str(out)])  # fmt: skip
    assert [r["policy"] for r in json.loads(out.read_text())["records"]] == [
        "prefix_load",
        "round_robin",
    ]
    assert {"engines=2", "step-ms=8", "routing-policy=round_robin"} <= set(started[1])
    assert capsys.readouterr().out.count("10 × 4/4/4/4") == 2
    main(["compare", str(out)])
    assert "| round_robin | 1 | 0 |" in capsys.readouterr().out


def test_settings_must_be_pairs():
    with pytest.raises(SystemExit, match="name=value"):
        main(["multi-turn", "--fake", "engines"])
