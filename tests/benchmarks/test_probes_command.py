"""What `python -m benchmarks.probes` writes, and the probes that need no GPU."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.probes import __main__ as command
from benchmarks.probes import gpu_samples, ingress, masks, metrics
from benchmarks.probes.bench import Sustained
from benchmarks.probes.records import record, skipped, table
from tests.benchmarks.toy_bench import ToyBench
from tests.engine.byte_model import write_byte_model


def test_samples_of_the_gpu_tolerate_unknown_fields(monkeypatch):
    def run(words, **_):
        fields = words[2].removeprefix("--query-gpu=").split(",")
        if "clocks_event_reasons.hw_slowdown" in fields:
            raise subprocess.CalledProcessError(2, words)
        told = {
            "clocks.sm": "1,",
            "power.draw": "[N/A]",
            "clocks_event_reasons.sw_power_cap": "Not Active",
        }
        return SimpleNamespace(stdout=", ".join(told.get(f, "7").strip(",") for f in fields) + "\n")

    monkeypatch.setattr(gpu_samples.subprocess, "run", run)
    known = gpu_samples._known_fields("GPU-of-this-test")
    assert "power.draw" not in known and "clocks_event_reasons.hw_slowdown" not in known
    assert gpu_samples._query("GPU", known)["clocks_event_reasons.sw_power_cap"] == "Not Active"


def test_summary_is_of_the_later_samples():
    cap = "clocks_event_reasons.sw_power_cap"
    states = ["Not Active", "Not Active", "Active", "Not Active"]
    samples = [
        {"clocks.sm": mhz, cap: state}
        for mhz, state in zip(["1980", "1900", "1500", "1400"], states, strict=True)
    ]
    assert gpu_samples.summarise(samples) == {"clocks.sm": 1450.0, cap: 0.5}
    assert gpu_samples.summarise([]) == {}


def test_the_settled_pass_is_of_the_second_half():
    assert Sustained([1.0, 9.0, 3.0, 5.0, 4.0], []).settled == 4.0


def test_table_of_records():
    entry = record("copy", {"bytes": 8}, 2.0, nbytes=4e6, of_copy=0.5, gpu={"clocks.sm": 1400.0})
    lines = table([{"name": "a", **entry}, {"name": "b", **skipped("c", "why")}]).split("\n")
    assert lines[2] == (
        "| a | copy | bytes 8 | 2.0 | 2,000.0 |  | of_copy 0.5; gpu clocks.sm 1400 |"
    )
    assert lines[3] == "| b | c |  |  |  |  | skipped why |"


def run_command(tmp_path, monkeypatch, measure, names):
    monkeypatch.setattr(
        command, "import_module", lambda name: SimpleNamespace(measure=measure(name))
    )
    options = command._parse([*names, "--out", str(tmp_path / "out.json")])
    command.run(ToyBench(), names, options)


def test_the_file_tells_what_was_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BENCH_COMMIT", "abc")

    def measure(module):
        return lambda bench, shapes: [record(module, {"models": len(shapes)}, 1.0)]

    run_command(tmp_path, monkeypatch, measure, ["rotary", "decode-attention"])
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["commit"] == "abc" and "torch" in document["versions"]
    assert document["command"].startswith("python -m benchmarks.probes rotary decode-attention")
    assert [(r["name"], r["method"]) for r in document["records"]] == [
        ("rotary", "benchmarks.probes.rotary"),
        ("decode-attention", "benchmarks.probes.decode_attention"),
    ]
    assert document["records"][0]["shape"] == {"models": 2}
    assert "| rotary | benchmarks.probes.rotary | models 2 | 1.0 |" in capsys.readouterr().out


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    def measure(module):
        def records(bench, shapes):
            yield record("first", {}, 1.0)
            raise RuntimeError("out of luck")

        return records

    with pytest.raises(RuntimeError, match="out of luck"):
        run_command(tmp_path, monkeypatch, measure, ["rotary"])
    assert len(json.loads((tmp_path / "out.json").read_text())["records"]) == 1


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        command._parse(["rotory"])
    assert "no probe is called rotory" in capsys.readouterr().err


def test_ingress():
    found = list(ingress.measure(num_tokens=120, messages=(1, 3), chats=20))
    assert [(r["method"], r["shape"]["messages"]) for r in found] == [
        (method, messages)
        for messages in (1, 3)
        for method in ("whole", "next turn", "validate", "template", "encode")
        if (method, messages) != ("next turn", 1)
    ]
    assert all(100 <= r["shape"]["tokens"] <= 140 for r in found)
    assert all(0 < r["microseconds"] <= r["p90"] for r in found)


def test_masks(tmp_path):
    cases = ((1, 1), (3, 2))
    model = write_byte_model(tmp_path / "model")
    found = list(masks.measure([model], steps=30, cases=cases))
    assert [(r["method"], r["shape"]["rows"], r["shape"].get("grammars")) for r in found] == [
        ("fill", 1, None),
        ("fill", 3, None),
        ("masks", 1, 1),
        ("masks", 3, 2),
    ]
    assert all(0 < r["microseconds"] <= r["p90"] for r in found)


def test_metrics():
    found = list(metrics.measure(rounds=3, calls=200))
    assert [r["method"] for r in found] == ["token", "request", "samples of a model"]
    assert all(0 < r["microseconds"] <= r["p90"] + 0.1 for r in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        command.main(["rotary"])
