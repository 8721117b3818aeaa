"""What a model thinks is told from what it answers, however the text comes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.protocols.message_events import Reasoning
from deployments.protocols.reasoning import (
    REASONING_PARSERS,
    thinking_at_end,
    thinking_in_prompt,
)
from tests.deployments.test_json_scan import QUIET, cuts, divide


def split(name: str, pieces: list[str], thinking: bool | None = None) -> tuple[str, str]:
    parser = REASONING_PARSERS[name](thinking)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    thought = [event.text for event in events if isinstance(event, Reasoning)]
    answer = [event.text for event in events if not isinstance(event, Reasoning)]
    assert [isinstance(e, Reasoning) for e in events] == [True] * len(thought) + [False] * len(
        answer
    )
    return "".join(thought), "".join(answer)


@pytest.mark.parametrize(
    ("name", "text", "thinking", "expected"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\nyes", None, ("\nhm\n", "\n\nyes")),
        ("qwen3", "\n<think>hm</think>", None, ("hm", "")),
        ("qwen3", "yes", None, ("", "yes")),
        ("qwen3", " 1 < 2 </think>", None, ("", " 1 < 2 </think>")),
        ("qwen3", "<think>cut </th", None, ("cut </th", "")),
        ("qwen3", "<thi", None, ("", "<thi")),
        ("qwen3", "<think>", None, ("", "")),
        ("qwen3", "hm</think>yes", True, ("hm", "yes")),
        ("qwen3", "\nhm", True, ("\nhm", "")),
        ("qwen3", " ", True, (" ", "")),
        ("qwen3", "<think>hm</think>yes", True, ("hm", "yes")),
        ("qwen3", "<think>so it is", False, ("", "<think>so it is")),
        ("qwen3", "<think>a</think>b</think><think>c", None, ("a", "b</think><think>c")),
        ("deepseek_r1", "hm</think>yes", None, ("hm", "yes")),
        ("deepseek_r1", "<think>\nhm</think>yes", None, ("\nhm", "yes")),
        ("deepseek_r1", "cut", None, ("cut", "")),
        ("deepseek_r1", "yes", False, ("", "yes")),
        ("deepseek_r1", "", None, ("", "")),
    ],
)
def test_split(name: str, text: str, thinking: bool | None, expected: tuple[str, str]):
    assert split(name, [text], thinking) == split(name, list(text), thinking) == expected


@settings(QUIET)
@given(
    st.sampled_from(sorted(REASONING_PARSERS)),
    st.lists(st.sampled_from(["<think>", "</think>", "<th", "a", " ", "\n", "</"])),
    cuts,
    st.sampled_from([None, True, False]),
)
def test_the_split_does_not_depend_on_how_the_text_comes(
    name: str, bits: list[str], cuts: list[int], thinking: bool | None
):
    text = "".join(bits)
    assert split(name, divide(text, cuts), thinking) == split(name, [text], thinking)


def test_what_the_prompt_says():
    assert thinking_in_prompt("<|im_start|>assistant\n<think>\n") is True
    assert thinking_in_prompt("<|im_start|>assistant\n<think>\n\n</think>\n\n") is False
    assert thinking_in_prompt("what is <think>?<|im_end|>\n<|im_start|>assistant\n") is None
    assert thinking_at_end("<think>so far") is True
    assert thinking_at_end("<think>hm</think>yes") is False
    assert thinking_at_end("yes") is None
