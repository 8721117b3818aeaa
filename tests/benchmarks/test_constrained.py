import json
from functools import partial

import pytest
from jsonschema import validate

from benchmarks import constrained
from benchmarks.workloads import Workload
from engine import LLM
from tests.benchmarks.steps import Step
from tests.engine.byte_model import write_byte_model

SMALL = {"load_format": "dummy", "num_kvcache_blocks": 64, "max_model_len": 128, "cpu_threads": 1}
FORM = partial(constrained._form, 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_byte_model(tmp_path_factory.mktemp("bytes") / "model")


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, **SMALL, enable_prefix_caching=False, max_num_seqs=4)


def test_a_record_for_each_number_of_schemas(llm):
    workload = Workload("4x8-24", 4, (8, 8), (24, 24), 0.7)
    records = constrained.measure(llm, workload, [1, 4], 2, FORM)
    assert [(r["rows"], r["schemas"], r["steps"]) for r in records] == [
        (4, number, 2 * 23) for number in (0, 1, 4)
    ]
    free = records[0]["ms_per_step"]
    assert records[0]["share"] == 0
    for entry in records:
        assert 0 < entry["ms_per_step"] <= entry["p90_ms"]
        assert entry["share"] == pytest.approx(entry["ms_per_step"] / free - 1, rel=1e-3, abs=1e-3)


def test_outputs_follow_the_schema_to_their_full_length(llm, monkeypatch):
    generate, seen = llm.generate, []

    def remember(*arguments, **options):
        seen.extend(generate(*arguments, **options))
        return seen

    monkeypatch.setattr(llm, "generate", remember)
    constrained._run(llm, Workload("", 2, (8, 8), (60, 60), 0.7).draw(300, 0), 2, FORM)
    assert len(seen) == 2
    for output in seen:
        assert len(output.outputs[0].token_ids) == 60
        assert output.outputs[0].text == ""
        written = llm.tokenizer.decode(output.outputs[0].token_ids)
        assert "".join(written.split()).startswith('[{"name":')


def test_a_schema_takes_lists_of_so_many_items_or_more():
    item = {"name": "Ada", "age": 36, "member": True, "tags": ["poetry"]}
    validate([item] * 3, constrained.schema(0, 3))
    with pytest.raises(Exception, match="too short"):
        validate([item] * 2, constrained.schema(0, 3))
    assert constrained.schema(0, 3) != constrained.schema(1, 3)
    with pytest.raises(Exception, match="too long"):
        validate([item], constrained.schema(0, 1, max_length=2))


def test_steps_are_timed_from_end_to_end_where_the_device_tells():
    steps = [Step(rows=2, device_s=0.01), Step(rows=2, device_s=0.01, idle_s=0.002)]
    others = [Step(rows=1, device_s=9, idle_s=0), Step(rows=2, decode=False, device_s=9, idle_s=0)]
    assert constrained._step_seconds([*steps, *others], 2) == pytest.approx([0.012])
    assert constrained._step_seconds([Step(rows=2)], 2) == pytest.approx([0.015])


def test_the_command_writes_a_file_and_prints_its_table(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constrained, "LLM", partial(_small_llm, model))
    out = tmp_path / "out.json"
    lengths = ["--rows", "2", "--grammars", "1", "--prompt-tokens", "8", "--output-tokens", "8"]
    constrained.main(["--model", model, *lengths, "--rounds", "1", "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["command"].startswith("python -m benchmarks.constrained --model")
    assert [entry["schemas"] for entry in document["records"]] == [0, 1]
    assert "| 2 | 1 | 7 |" in capsys.readouterr().out


def _small_llm(model, given, *, load_format, **options):
    assert (given, load_format) == (model, "auto")
    return LLM(model, **SMALL, **options)


def test_an_unknown_model_is_named():
    with pytest.raises(SystemExit, match="no model directory or GGUF file 'nowhere'"):
        constrained.main(["--model", "nowhere"])
