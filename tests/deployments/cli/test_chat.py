"""`trunkline chat` and `trunkline complete` against a server that repeats the prompt."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import httpx
import pytest

import engine
from deployments.cli import client
from deployments.cli.chat import Chat
from deployments.cli.main import main
from engine import SamplingParams
from engine.output_processor import TextDelta
from tests.deployments.cli.conftest import MODEL, serve_fake
from tests.deployments.plane import bundled_tokenizer
from tests.integration.server import ROOT

COMMAND = [sys.executable, "-m", "deployments.cli"]


def chat(monkeypatch, capsys, url: str, lines: str, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status = main(["chat", "--url", url, "--max-tokens", "60", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def echo(url: str, *turns: tuple[str, str]) -> str:
    """What the server answers to a conversation."""
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"model": MODEL, "messages": messages, "max_tokens": 60}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def test_piped_chat_keeps_the_conversation(url, monkeypatch, capsys):
    status, out, err = chat(
        monkeypatch, capsys, url, "Hi there\n\nAnd now?\n", "--system", "Be kind"
    )
    first = echo(url, ("system", "Be kind"), ("user", "Hi there"))
    turns = (("system", "Be kind"), ("user", "Hi there"), ("assistant", first))
    second = echo(url, *turns, ("user", "And now?"))
    assert (status, err) == (0, "")
    assert out == f"{first}\n{second}\n"  # no prompts, no colours
    assert "Be kind" in first


def test_commands_of_the_chat(url, monkeypatch, capsys):
    lines = "/system Be brief\n/system\nHi\n/reset\nHo\n/nonsense\n/exit\nnever said\n"
    status, out, err = chat(monkeypatch, capsys, url, lines)
    system = ("system", "Be brief")
    assert out == "".join(f"{echo(url, system, ('user', said))}\n" for said in ("Hi", "Ho"))
    assert err.splitlines() == [
        "Be brief",
        "The chat begins anew.",
        "There is no /nonsense; /help lists what there is.",
    ]
    assert status == 0


def test_piped_chat_goes_on_after_an_error_and_tells(url, monkeypatch, capsys):
    status, out, err = chat(monkeypatch, capsys, url, "word " * 9000 + "\nHi\n")
    assert (status, out) == (1, f"\n{echo(url, ('user', 'Hi'))}\n")
    assert err.startswith("trunkline: the server answered 400: ") and "prompt" in err


def test_thinking_is_dim_in_a_terminal_and_left_out_of_a_pipe(url, capsys):
    said = "<think>hm, so</think>Four."
    count = len(bundled_tokenizer().encode(said))
    template = "{{ messages[0].content }}"  # what the core then repeats
    fields = {"model": MODEL, "max_tokens": count, "chat_template": template}
    for styled, shown in ((True, "\x1b[2mhm, so\x1b[0m\nFour.\n"), (False, "Four.\n")):
        talk = Chat(url, fields, None, styled=styled)
        asyncio.run(talk.answer(said))
        assert capsys.readouterr().out == shown
        assert talk.turns[1] == {"role": "assistant", "content": "Four."}


@pytest.mark.parametrize("command", [["chat"], ["complete", "-"]])
def test_a_model_steers_no_terminal_even_if_the_input_is_a_pipe(url, monkeypatch, capsys, command):
    steering = "A\x1b]0;a title\x07\x1b[2J\x9b5mB"
    for terminal, shown in ((True, "A]0;a title[2J5mB"), (False, steering)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{steering}\n"))
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=terminal: answer)
        assert main([*command, "--url", url, "--max-tokens", "60"]) == 0
        assert shown in capsys.readouterr().out


def test_no_server_is_one_sentence(capsys):
    assert main(["chat", "--url", "127.0.0.1:9"]) == 1
    assert capsys.readouterr().err == (
        "trunkline: nothing answers at http://127.0.0.1:9; start a server with `trunkline serve`, "
        "or name one with --url.\n"
    )
    assert main(["complete", "x", "--url", "ftp://host"]) == 1
    assert "http://" in capsys.readouterr().err


def test_complete_writes_the_text_alone(url, monkeypatch, capsys):
    tokenizer = bundled_tokenizer()
    prompt = "Grüße, 世界 🙂 and more of it"
    count = str(len(tokenizer.encode(prompt)))
    assert main(["complete", prompt, "--url", f"{url}/v1/", "--max-tokens", count]) == 0
    assert capsys.readouterr().out == prompt + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    assert main(["complete", "-", "--url", url, "--max-tokens", count, "--model", MODEL]) == 0
    assert capsys.readouterr().out == prompt + "\n"


def test_complete_without_a_server(monkeypatch, capsys):
    class Model:
        def __init__(self, model: str) -> None:
            assert model == "here"

        def stream(self, prompt: str, params: SamplingParams) -> Iterator[TextDelta]:
            assert (prompt, params) == ("Hi", SamplingParams(max_tokens=9, temperature=0.0))
            yield from (TextDelta("a"), TextDelta("b c"))

    monkeypatch.setattr(engine, "LLM", Model, raising=False)
    words = ["complete", "Hi", "--offline", "here", "--max-tokens", "9", "--temperature", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out == "ab c\n"
    assert main([*words, "--temperature", "-1"]) == 1
    assert capsys.readouterr().err.startswith("trunkline: temperature")


def test_complete_tells_what_the_server_refuses(url, capsys):
    assert main(["complete", "x", "--url", url, "--temperature", "-1"]) == 1
    assert re.fullmatch(
        r"trunkline: the server answered 400: temperature .*\n", capsys.readouterr().err
    )
    assert main(["complete", "x", "--url", url, "--model", "other"]) == 1
    assert "404: The model 'other' does not exist" in capsys.readouterr().err


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(client.KEY_VARIABLE, "secret")
    assert client.Client("http://host")._headers == {"Authorization": "Bearer secret"}
    assert client.KEY_VARIABLE in client.describe(401, b"")


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b'{"error": "x"}', b'{"error": {}}', b'{"error": {"message": null}}'],
)
def test_strange_errors_are_a_sentence_too(body):
    assert client.describe(502, body) == "the server answered 502."


def test_what_a_server_says_of_an_error_steers_no_terminal():
    body = b'{"error": {"message": "no\\u001b]0;a title\\u0007 more"}}'
    assert client.describe(503, body) == "the server answered 503: no]0;a title more"


class Terminal:
    """A terminal of 40 columns with a chat in it."""

    def __init__(self, url: str) -> None:
        self._fd, child = pty.openpty()
        termios.tcsetwinsize(child, (20, 40))
        self.text = ""
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        # A shell's `&` has everything below it ignore the signal; a terminal does not.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [*COMMAND, "chat", "--url", url, "--max-tokens", "3000"],
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=ROOT,
            env={**environment, "TERM": "xterm"},
            start_new_session=True,
        )
        signal.signal(signal.SIGINT, before)
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, words: str) -> None:
        deadline = time.monotonic() + 60
        while words not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self._fd], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._fd, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert words in self.text, self.text

    def close(self) -> int:
        os.close(self._fd)
        return self.process.wait(30)


def test_chat_in_a_terminal_of_40_columns():
    with serve_fake(step_s=0.01) as url:
        terminal = Terminal(url)
        terminal.expect("> ")
        terminal.type("tell me of engines and trunks\r")
        terminal.expect("user\r\n")
        terminal.expect("assistant")
        terminal.process.send_signal(signal.SIGINT)  # as the terminal does at Ctrl-C
        terminal.expect("[stopped]")
        terminal.type("/exit\r")
        assert terminal.process.wait(30) == 0
        terminal.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[a-z]", "", terminal.text).replace("\r", "").split("\n")
    assert max(map(len, lines)) <= 40
    assert "Traceback" not in terminal.text
