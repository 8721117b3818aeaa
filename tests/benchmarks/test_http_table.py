"""What `benchmarks.serving.http_table` asks for, computes and prints; no server is started."""

import json

import pytest
import yaml

from benchmarks.serving import http_table as program
from benchmarks.serving import reference
from benchmarks.serving.conversations import Mix
from benchmarks.serving.goals import http_table, served_of_offline
from benchmarks.serving.launched import launch, server_config
from benchmarks.serving.shape_tokenizer import build_tokenizer
from deployments.launch import read_plan

RECORD = {
    "clients": 256,
    "requests": 1280,
    "errors": {"HTTP 503": 2},
    "short": 1,
    "output_tok_s": 14250.0,
    "ttft_ms": {"p50": 250.0, "p99": 900.5},
    "itl_ms": {"p50": 15.0, "p99": 40.0},
    "e2e_ms": {"p50": 4000.0, "p99": 6500.0},
    "cpu_us_per_token": {"ingress": 21.5, "engine_actor": 60.0, "haproxy": 5.0, "client": 12.0},
}
OFFLINE = {"clients": 256, "requests": 1280, "output_tok_s": 15000.0}


def document(**changes):
    machine = {"gpus": ["NVIDIA H200, 143771 MiB, 580"]}
    given = {"model": "qwen2.5-7b", "machine": machine, "records": [RECORD], "offline": [OFFLINE]}
    return given | changes


def cells(table):
    head, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.split("\n")]
    assert all(len(row) == len(head) for row in rows)
    return [list(zip(head, row, strict=True)) for row in rows]


def test_a_line_has_figures_goals_and_the_share_of_offline():
    (row,) = cells(http_table(document()))
    assert ("output tok/s", "14,250.0") in row
    assert ("goal", "15,000.0") in row
    assert ("goal", "300.0") in row
    assert ("errors", "3") in row
    assert ("served / offline", "0.950") in row
    assert ("TTFT p50", "250.0") in row
    assert ("ingress CPU", "21.5") in row
    assert ("engine_replica CPU", "-") in row


def test_goals_are_of_one_gpu_and_model_alone():
    for other in ({"model": "tiny"}, {"machine": {"gpus": []}}):
        (row,) = cells(http_table(document(**other)))
        assert [value for name, value in row if name == "goal"] == ["-", "-"]


def test_an_offline_run_alone_has_a_line():
    (row,) = cells(http_table(document(records=[])))
    assert ("clients", "256") in row
    assert ("offline tok/s", "15,000.0") in row


def test_a_share_of_other_requests_is_refused():
    assert served_of_offline(RECORD, OFFLINE) == 0.95
    with pytest.raises(ValueError, match="--requests"):
        served_of_offline(RECORD, OFFLINE | {"requests": 12})


def test_loops_have_the_requests_of_the_table_unless_told_otherwise():
    assert program._levels([1, 16, 64, 256, 512, 32], None) == [
        (1, 12), (16, 96), (64, 320), (256, 1280), (512, 2048), (32, 160),
    ]  # fmt: skip
    assert program._levels([4], [7]) == [(4, 7)]
    with pytest.raises(ValueError, match="--requests"):
        program._levels([1, 2], [7])


def test_no_two_loops_nor_their_warm_ups_share_a_seed():
    seeds = [
        seed for index in range(5) for seed in (program._seed(index), program._seed(index) - 1)
    ]
    assert len(set(seeds)) == 10


def test_the_reference_gets_the_requests_of_the_load(tmp_path):
    file = tmp_path / "tokenizer.json"
    tokenizer = build_tokenizer(2000)
    tokenizer.save(str(file))
    job = {"input": [5, 9], "output": [2, 4], "seed": 3, "requests": 6, "temperature": 0.7}
    requests = reference.draw(job | {"tokenizer": str(file)})
    drawn = Mix((5, 9), (2, 4)).draw(3)
    for prompt, output in zip(requests.prompts, requests.outputs, strict=True):
        turn = next(drawn).turns[0]
        assert tokenizer.decode(prompt) == turn.text
        assert output == turn.output_tokens
    assert len(requests.prompts) == 6


class CountingEngine:
    """Notes what it was asked for, and makes as many tokens, or one less."""

    def __init__(self, missing=0):
        self.asked, self.missing = [], missing

    def run(self, requests):
        self.asked.append(requests)
        return [[0] * (size - self.missing) for size in requests.outputs]

    def describe(self):
        return {}


def test_the_reference_counts_all_tokens_and_warms_up_with_other_prompts():
    requests = reference.Requests([[1, 2], [3, 4], [5, 6]], [20, 30, 10], 0.7, 0)
    engine = CountingEngine()
    figures = reference.measure(engine, requests, at_once=2)
    assert (figures["requests"], figures["output_tokens"], figures["input_tokens"]) == (3, 60, 6)
    warm_up, timed = engine.asked
    assert warm_up.prompts == [[2, 1], [4, 3]]
    assert max(warm_up.outputs) <= reference.WARM_UP_TOKENS
    assert timed is requests
    with pytest.raises(RuntimeError, match="57 tokens, not 60"):
        reference.measure(CountingEngine(missing=1), requests, at_once=2)


def test_the_launcher_accepts_the_configuration(tmp_path):
    engine = {"model": "smollm2-135m-instruct", "device": "cpu"}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(server_config("bundled", engine, 8123)))
    plan = read_plan(file)
    assert (plan.model, plan.url) == ("bundled", "http://127.0.0.1:8123")
    assert yaml.safe_load(file.read_text())["applications"][0]["route_prefix"] == "/"


def test_a_server_that_ends_at_once_is_told_of_with_its_words(tmp_path):
    config = server_config("none", {"model": str(tmp_path / "nothing")}, 8124)
    with (
        pytest.raises(RuntimeError, match="nothing"),
        launch(config, tmp_path, tmp_path / "server.log", 60.0),
    ):
        pass
