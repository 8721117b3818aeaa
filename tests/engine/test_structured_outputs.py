"""Outputs that follow grammars, on a tiny random model: every way to run gives the same tokens."""

import itertools
import json
import os
import subprocess

import pytest
import torch
from jsonschema import validate

from engine.core import EngineCore
from engine.errors import InvalidRequest, StepFailed
from engine.llm import LLM
from engine.model_source import resolve_model
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.structured_outputs import constraints
from engine.structured_outputs.constraints import Constraints
from engine.structured_outputs.grammar import MAX_STARTS, GrammarHost
from engine.structured_outputs.messages import Setup
from engine.structured_outputs.params import StructuredOutputsParams
from engine.tokenizer import Tokenizer
from tests.engine.byte_model import EOS, write_byte_model
from tests.engine.conftest import TINY_LLAMA, request, run_core, tiny_config

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -5, "maximum": 130},
        "b": {"enum": ["x", "éé", None]},
        "c": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "d": {"type": "string", "maxLength": 3},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
JSON = {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}
PHONE = {"regex": r"(\d{3}-)?\d{4}"}
STRINGS = {f"p{i}": {"type": "string", "maxLength": i} for i in range(1000)}
HUGE = json.dumps({"type": "object", "properties": STRINGS})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_byte_model(tmp_path_factory.mktemp("bytes") / "model")


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.load(resolve_model(model))


@pytest.fixture(scope="module")
def host(model, tmp_path_factory):
    """Shared by all engines here, as its start takes seconds.

    It starts in a folder with a module that has the name of a library's.
    """
    folder = tmp_path_factory.mktemp("work")
    (folder / "queue.py").write_text("raise SystemExit('imported from the working folder')")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield GrammarHost(
            Setup(model, TINY_LLAMA["vocab_size"], (EOS,), compile_cpu_s=1.0, mask_cpu_s=0.1)
        )


@pytest.fixture
def make_core(model, host):
    def make(**options):
        core = EngineCore(tiny_config(model, **options))
        core.constraints = Constraints(host, (EOS,))
        return core

    return make


def wire(rid, form=None, outputs=(), param="structured_outputs", **params):
    asked = StructuredOutputsParams(**form, param=param) if form else None
    options = {"max_tokens": 80, "ignore_eos": False, "structured_outputs": asked, **params}
    return request(rid, [5 + len(rid), 7, *map(ord, rid)], outputs, **options)


def mixed():
    """Constrained and free requests in turn, greedy and drawn, with every kind of row state."""
    kinds = [
        (JSON, {"temperature": 1.0, "seed": 1}),
        (None, {"temperature": 1.0, "seed": 2, "top_k": 20}),
        (PHONE, {"temperature": 0.0}),
        (None, {"temperature": 0.0, "repetition_penalty": 1.2}),
        (JSON, {"temperature": 1.0, "seed": 3, "top_p": 0.8, "repetition_penalty": 1.1}),
        ({"choice": ["red", "green", "blue é"]}, {"temperature": 1.0, "seed": 4, "logprobs": 2}),
        (None, {"temperature": 1.0, "seed": 5, "min_tokens": 4, "logit_bias": {9: 3.0}}),
        (PHONE, {"temperature": 1.0, "seed": 6, "min_tokens": 2}),
        (JSON, {"temperature": 1.0, "seed": 7, "max_tokens": 9}),
    ]
    return [
        wire(f"r{i}", form, **{"max_tokens": 80 if form else 20, **params})
        for i, (form, params) in enumerate(kinds)
    ]


def check_form(each, tokens, reason, tokenizer):
    text = tokenizer.decode(tokens)
    asked = each.params.structured_outputs
    if asked is None or each.params.max_tokens == 9:
        return
    assert reason == "stop"
    assert tokens[-1] == EOS
    if asked.json is not None:
        validate(json.loads(text), SCHEMA)
    elif asked.regex is not None:
        assert len(text) in (4, 8)
        assert text.replace("-", "").isdigit()
    else:
        assert text in asked.choice


@pytest.fixture(scope="module")
def alone(model, host):
    """Each request by itself: the reference."""
    core = EngineCore(tiny_config(model, enable_prefix_caching=False))
    core.constraints = Constraints(host, (EOS,))
    return {each.request_id: run_core(core, [each], 10**6)[each.request_id] for each in mixed()}


def test_outputs_have_their_form(alone, tokenizer):
    for each in mixed():
        check_form(each, *alone[each.request_id], tokenizer)
    assert alone["r8"][1] == "length"
    assert len({alone[rid][0][0] for rid in alone}) > 3


WAYS = {
    "batch": {},
    "one step ahead": {"async_scheduling": True},
    "chunked, one step ahead": {"max_num_batched_tokens": 16, "async_scheduling": True},
    "few rows, one step ahead": {"max_num_seqs": 3, "async_scheduling": True},
    "forced preemption": {"force_preempt_every": 3},
    "forced preemption, one step ahead": {"force_preempt_every": 3, "async_scheduling": True},
    "two-phase": {"two_phase": True, "async_scheduling": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_same_tokens_every_way(make_core, alone, way):
    core = make_core(**WAYS[way])
    outputs = run_core(core, mixed(), 10**6)
    assert outputs == alone
    if "preemption" in way:
        assert core.load().num_preemptions > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_resumed_outputs_go_on_as_they_would_have(make_core, alone, ahead):
    core = make_core(async_scheduling=ahead)
    resumed = []
    for each in mixed():
        tokens = alone[each.request_id][0]
        outputs = tokens[: len(tokens) // 2]
        resumed.append(wire(each.request_id, outputs=outputs))
        resumed[-1].params = each.params
    assert run_core(core, resumed, 10**6) == alone


@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_are_ruled_out_but_where_nothing_else_is_allowed(make_core, tokenizer, ahead):
    a, c, y = tokenizer.encode("acy")
    rules = {
        "allowed": {"allowed_token_ids": [a]},
        "bad": {"bad_words_token_ids": [[c], [y]]},
        "both": {"allowed_token_ids": [a, c], "bad_words_token_ids": [[a, a]]},
    }
    form = {"regex": "[ac]{6}xyz"}
    wires = [wire(rid, form, temperature=1.0, seed=4, **fields) for rid, fields in rules.items()]
    outputs = run_core(make_core(async_scheduling=ahead), wires, 10**6)
    texts = {rid: tokenizer.decode(tokens) for rid, (tokens, _) in outputs.items()}
    assert {reason for _, reason in outputs.values()} == {"stop"}
    assert all(len(text) == 9 and text.endswith("xyz") for text in texts.values())
    assert texts["allowed"] == texts["bad"] == "aaaaaaxyz"
    assert "aa" not in texts["both"]


def test_the_end_is_kept_back_but_where_nothing_else_is_allowed(make_core, tokenizer):
    forms = {
        "ignored": ({"regex": "a{3,6}"}, {"ignore_eos": True}),
        "short": ({"regex": "a{3,6}"}, {"min_tokens": 50}),
        "stops": ({"regex": "[ab]{9}"}, {"stop_token_ids": tokenizer.encode("b")}),
        "single": ({"choice": ["true"]}, {"min_tokens": 60, "ignore_eos": True}),
    }
    wires = [wire(rid, form, temperature=1.0, **more) for rid, (form, more) in forms.items()]
    outputs = run_core(make_core(async_scheduling=True), wires, 10**6)
    texts = {rid: (tokenizer.decode(tokens), why) for rid, (tokens, why) in outputs.items()}
    assert texts["ignored"] == texts["short"] == ("aaaaaa", "stop")
    assert texts["single"] == ("true", "stop")
    assert texts["stops"][1] == "stop"


def deltas_of(core, steps=10**6):
    """Everything that is told until there is no work left."""
    told = []
    while core.has_work:
        told += core.step()
    return told


@pytest.mark.parametrize("ahead", [False, True])
def test_useless_grammars_are_refused_and_others_go_on(make_core, alone, ahead):
    core = make_core(async_scheduling=ahead)
    bad = {
        "syntax": ({"regex": "(a"}, "parenthesis is not closed"),
        "schema": ({"json": '{"type": "strin"}'}, 'Unsupported type "strin"'),
        "rules": ({"grammar": "root ::= x"}, '"x" is not defined'),
        "huge": ({"json": HUGE}, "too much time"),
        "slow": ({"regex": "((a{1,100}){1,100}){1,100}"}, "too long to match"),
    }
    for rid, (form, _) in bad.items():
        core.add(wire(rid, form, param="guided_x", min_tokens=70))
    good = mixed()[1]
    core.add(good)
    told = deltas_of(core)
    ends = {delta.request_id: delta for delta in told if delta.finish_reason is not None}
    for rid, (_, words) in bad.items():
        assert ends[rid].refused
        assert ends[rid].param == "guided_x"
        assert ends[rid].error.startswith("guided_x ")
        assert words in ends[rid].error
        assert "/" not in ends[rid].error  # nothing of the inside
    tokens = [t for delta in told if delta.request_id == good.request_id for t in delta.token_ids]
    assert tokens == alone[good.request_id][0]
    core.check_invariants()
    core.add(wire("huge-again", bad["huge"][0]))
    (end,) = deltas_of(core)
    assert end.refused


@pytest.mark.parametrize("ahead", [False, True])
def test_masked_samplings_that_fail_are_tried_again(make_core, alone, monkeypatch, ahead):
    core = make_core(async_scheduling=ahead)
    run_core(core, mixed(), 10**6)  # now all grammars are there, and all begin together
    sampler = core.runner.sampler
    sample, calls = sampler.sample, itertools.count()

    def fail_once(logits, batch, masks=None):
        if masks is not None and next(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(logits, batch, masks)

    monkeypatch.setattr(sampler, "sample", fail_once)
    tokens = {each.request_id: [] for each in mixed()}
    failures = 0
    for each in mixed():
        core.add(each)
    while core.has_work:
        try:
            deltas = core.step()
        except StepFailed as failure:
            deltas, failures = failure.deltas, failures + 1
        core.check_invariants()
        for delta in deltas:
            tokens[delta.request_id] += delta.token_ids
    assert failures == 1
    assert tokens == {rid: outputs for rid, (outputs, _) in alone.items()}


def test_what_waits_for_a_grammar_counts_and_can_be_aborted(make_core, alone):
    core = make_core()
    core.add(wire("w1", {"regex": "[0-9]{7}x"}))
    core.add(mixed()[1])
    assert core.has_work
    assert core.load().num_waiting == 2
    core.abort(["w1"])
    assert core.load().num_waiting == 1
    assert {delta.request_id for delta in deltas_of(core)} == {"r1"}


def test_everything_is_told_when_the_engine_fails(make_core):
    core = make_core()
    core.add(wire("w1", {"regex": "[0-9]{7}y"}))
    core.add(wire("w2"))
    core.step()
    assert {delta.request_id for delta in core.fail_all("lost")} == {"w1", "w2"}
    assert not core.has_work


def test_equal_grammars_are_compiled_once_and_the_unused_make_room(make_core, monkeypatch):
    monkeypatch.setattr(constraints, "MAX_GRAMMARS", 2)
    core = make_core()
    run_core(core, [wire(f"n{i}", PHONE, seed=i, temperature=1.0) for i in range(4)], 10**6)
    grammars = core.constraints._grammars
    assert len(grammars) == 1
    forms = [{"regex": f"{i}|b"} for i in range(5)]  # more than there is room for at once
    outputs = run_core(core, [wire(f"m{i}", form) for i, form in enumerate(forms)], 10**6)
    assert {why for _, why in outputs.values()} == {"stop"}
    assert len(grammars) <= 2


def test_a_process_that_is_killed_takes_only_its_requests(make_core, alone):
    core = make_core()
    core.add(wire("w1", {"regex": "[0-9]{60}"}))
    core.add(mixed()[1])
    told = []
    while not any(delta.request_id == "w1" for delta in told):
        told += core.step()
    (grammar,) = core.constraints._grammars.values()
    grammar.connection.close()
    told += deltas_of(core)
    (end,) = [d for d in told if d.request_id == "w1" and d.finish_reason is not None]
    assert end.refused
    tokens = [t for delta in told if delta.request_id == "r1" for t in delta.token_ids]
    assert tokens == alone["r1"][0]


def test_a_process_that_cannot_start_is_no_fault_of_the_request(model, monkeypatch):
    core = EngineCore(tiny_config(model))
    starts = []

    def fail(*command, **options):
        starts.append(command)
        raise BlockingIOError("no process is left")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", fail)
        core.add(wire("w1", PHONE))
        (end,) = deltas_of(core)
    assert (end.finish_reason, end.refused) == ("error", False)
    assert "cannot start" in end.error and "try again" in end.error
    assert len(starts) == MAX_STARTS
    assert run_core(core, [wire("w2", PHONE)], 10**6)["w2"][1] == "stop"


def test_a_process_that_ends_as_it_starts_is_started_again(model, monkeypatch):
    core = EngineCore(tiny_config(model))
    host = core.constraints._host
    host.setup.model = os.devnull  # no model
    discard = host.discard

    def repair(control):
        discard(control)
        host.setup.model = model

    monkeypatch.setattr(host, "discard", repair)
    assert run_core(core, [wire("w1", PHONE)], 10**6)["w1"][1] == "stop"
    assert host.failed_starts == 0


def test_models_without_an_end_or_a_tokenizer_are_told_apart(make_core, tiny_model, monkeypatch):
    core = make_core()
    core.info = type(core.info)(**{**_fields(core.info), "eos_token_ids": ()})
    with pytest.raises(InvalidRequest, match="end-of-sequence") as caught:
        core.add(wire("w1", PHONE, param="response_format"))
    assert caught.value.param == "response_format"
    llm = LLM(tiny_model, load_format="dummy", max_model_len=64, num_kvcache_blocks=16)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**PHONE))
    with pytest.raises(InvalidRequest, match="needs a tokenizer"):
        llm.generate({"prompt_token_ids": [5]}, params, use_tqdm=False)


def _fields(info):
    return {name: getattr(info, name) for name in info.__dataclass_fields__}


def test_offline_calls(model, host):
    llm = LLM(model, load_format="dummy", max_model_len=128, num_kvcache_blocks=64)
    llm.core.constraints = Constraints(host, (EOS,))
    colours = ["red", "blue"]
    params = SamplingParams(n=3, seed=1, structured_outputs=StructuredOutputsParams(choice=colours))
    (output,) = llm.generate("a", params, use_tqdm=False)
    assert {each.text for each in output.outputs} <= set(colours)
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(a"))
    with pytest.raises(InvalidRequest, match="not closed") as caught:
        llm.generate("a", bad, use_tqdm=False)
    assert caught.value.param == "structured_outputs"
    (output,) = llm.generate("a", params, use_tqdm=False)  # the engine goes on
    assert len(output.outputs) == 3


def test_wire_requests_carry_the_form():
    import msgspec

    sent = wire("w1", JSON, param="response_format")
    data = msgspec.msgpack.encode(sent)
    assert msgspec.msgpack.decode(data, type=EngineRequest) == sent
