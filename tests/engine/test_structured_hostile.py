"""Grammars that explode: each is refused or followed within its limits, and nobody waits for it."""

import pytest

from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.structured_outputs import process
from engine.structured_outputs.constraints import Constraints
from engine.structured_outputs.grammar import GrammarHost
from engine.structured_outputs.messages import Setup
from engine.structured_outputs.params import StructuredOutputsParams
from tests.engine.byte_model import EOS, write_byte_model
from tests.engine.conftest import TINY_LLAMA, run_core, tiny_config
from tests.engine.test_structured_outputs import HUGE, wire


def chain(rule, last, count=40):
    """Rules of which each refers to the next one as `rule` says."""
    rules = [f"r{i} ::= {rule.replace('x', f'r{i + 1}')}" for i in range(count)]
    return "\n".join(["root ::= r0", *rules, f"r{count} ::= {last}"])


def alternatives(count):
    """A schema whose values are 2 ** count kinds of trees."""
    defs = {f"d{count}": {"type": "null"}}
    for i in range(count):
        inner = {"$ref": f"#/$defs/d{i + 1}"}
        arrays = [{"type": "array", "items": inner, "maxItems": most} for most in (1, 2)]
        defs[f"d{i}"] = {"anyOf": [*arrays, inner]}
    return {"$defs": defs, "$ref": "#/$defs/d0"}


REFUSED = {
    "deep parentheses": ({"regex": "(" * 10_000 + "a" + ")" * 10_000}, "maximum limit"),
    "deep grammar": ({"grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000}, "maximum limit"),
    "look ahead": ({"regex": "(?=a)b"}, "not supported"),
    "reference back": ({"regex": r"(a)\1"}, "not supported"),
    "count": ({"regex": f"a{{{2**32 + 3}}}"}, "repeats something"),
    "long count": ({"regex": f"a{{2, {'9' * 9999}}}"}, "repeats something"),
    "count of a rule": ({"grammar": f'root ::= "a"{{{2**31}}}'}, "repeats something"),
    "properties": ({"json": HUGE}, "too much time"),
    "reference to nothing": ({"json": {"$ref": "#/$defs/x"}}, "Cannot find"),
    "reference to itself": ({"json": {"$ref": "#"}}, "vocabulary can spell"),
    "references in a ring": (
        {
            "json": {
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                "$ref": "#/$defs/a",
            }
        },
        "vocabulary can spell",
    ),
    "recursion on the left": ({"grammar": 'root ::= root "a"'}, "vocabulary can spell"),
    "repetitions of repetitions": (
        {"regex": "((a{1,1000}){1,1000}){60,1000}"},
        "too long to match",
    ),
    "doubled alternatives": ({"grammar": chain("x x | x", '"a"')}, "too long to match"),
}
"""Name → form, and what is said of it."""
FOLLOWED = {
    "stars of stars": {"regex": "((((a|b)*)*)*c)*"},
    "ambiguous": {"regex": "(a|a|ab|b)*c"},
    "long repetition": {"regex": "[ab]{1000000}"},
    "many alternatives": {"regex": "|".join(f"word{i}" for i in range(10_000))},
    "many values": {"json": {"enum": [str(i) for i in range(10_000)]}},
    "long choices": {"choice": [f"{i} " + "a" * 120 for i in range(1000)]},
    "trees": {"json": alternatives(12)},
    "recursion": {"json": {"type": "array", "items": {"$ref": "#"}}},
    "many items": {"json": {"type": "array", "items": {"type": "null"}, "minItems": 10**9}},
    "long text": {"json": {"type": "string", "minLength": 10**6}},
    "doubled rules": {"grammar": chain("x x", '"a" | "b"')},
}
NEVER_SENT = {
    "100,000 values": {"json": {"enum": [str(i) for i in range(100_000)]}},
    "deep arrays": {"json": '{"items":' * 5000 + "{}" + "}" * 5000},
    "wide": {"regex": "a|" * 100_000 + "a"},
    "count in a pattern": {"json": {"pattern": f"^a{{{2**32 + 1}}}$"}},
    "count of properties": {"json": {"maxProperties": 2**32 + 1}},
}


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """Its limits are shorter than the engine's own, so that the test does not take minutes."""
    model = write_byte_model(tmp_path_factory.mktemp("bytes") / "model")
    core = EngineCore(tiny_config(model))
    setup = Setup(model, TINY_LLAMA["vocab_size"], (EOS,), compile_cpu_s=1.0, mask_cpu_s=0.1)
    core.constraints = Constraints(GrammarHost(setup), (EOS,))
    return core


@pytest.fixture
def patient_core(tmp_path):
    return EngineCore(tiny_config(write_byte_model(tmp_path / "model")))


def test_what_explodes_is_refused_and_others_go_on(core):
    alone = run_core(core, [wire("free", max_tokens=40, seed=1)])["free"]
    for rid, (form, _) in REFUSED.items():
        core.add(wire(rid, form, param="guided_x", min_tokens=80))
    core.add(wire("free", max_tokens=40, seed=1))
    free, ends, num_waiting_then = [], {}, None
    while core.has_work:
        for delta in core.step():
            if delta.request_id == "free":
                free += delta.token_ids
                num_waiting_then = len(core.constraints.waiting)
            elif delta.finish_reason is not None:
                ends[delta.request_id] = delta
    assert free == alone[0]
    assert num_waiting_then > 0  # it was done before grammars were
    for rid, (_, words) in REFUSED.items():
        assert (ends[rid].refused, ends[rid].param) == (True, "guided_x"), rid
        assert words in ends[rid].error, rid
    core.check_invariants()


def test_what_only_looks_like_it_is_followed(patient_core):
    wires = [wire(rid, form, max_tokens=30) for rid, form in FOLLOWED.items()]
    outputs = run_core(patient_core, wires, 10**6)
    assert {rid: reason for rid, (_, reason) in outputs.items() if reason == "error"} == {}


@pytest.mark.parametrize("form", NEVER_SENT.values(), ids=NEVER_SENT)
def test_what_is_refused_before_any_engine_sees_it(form):
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutputsParams(**form, param="guided_x").check()
    assert caught.value.param == "guided_x"


@pytest.mark.parametrize(
    "text", ["a{2147483647}", "a{0002147483647}", r"\{9999999999\}", "a{x}", "a{1 2}"]
)
def test_counts_that_are_none_or_not_too_large(text):
    assert not process.repeats_too_often(text)
