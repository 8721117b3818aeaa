"""`trunkline chat`: a chat in the terminal with a model that a server runs."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing
from typing import Any

from deployments.cli.client import Client
from deployments.cli.errors import CommandError
from deployments.cli.sampling import given_options
from deployments.cli.terminal import DIM, PLAIN, WordWrap, is_terminal, width, write

HELP = """\
/system TEXT  set the system message
/system       show it
/reset        forget the chat
/exit         leave; so does Ctrl-D
Ctrl-C stops an answer."""


def run(options: argparse.Namespace) -> int:
    """Chat until the input ends; returns the exit status, 1 when a piped chat had an error.

    Raises:
        CommandError: there is no server.
    """
    with asyncio.Runner() as runner:
        model = options.model or runner.run(_first_model(options.url))
        fields = {"model": model, **given_options(options)}
        chat = Chat(options.url, fields, options.system, styled=is_terminal())
        return _talk(chat, runner)


async def _first_model(url: str) -> str:
    async with Client(url) as client:
        return await client.first_model()


class Chat:
    """A conversation.

    Args:
        url: of the server.
        fields: of each request, beside its messages.
        system: the system message, if any.
        styled: whether a person types and reads it in a terminal: lines break between words, and
            thinking is shown.
    """

    def __init__(self, url: str, fields: dict[str, Any], system: str | None, styled: bool) -> None:
        self.url = url
        self.fields = fields
        self.system = system
        self.styled = styled
        self.turns: list[dict[str, str]] = []
        self._said = ""

    async def answer(self, text: str) -> None:
        """Ask, and write the answer as it comes.

        Raises:
            CommandError: the server fails; the question counts as not asked.
        """
        self.turns.append({"role": "user", "content": text})
        self._said = ""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {**self.fields, "messages": system + self.turns}
        writer = _Writer(self.styled)
        try:
            async with (
                Client(self.url) as client,
                aclosing(client.stream("/v1/chat/completions", body)) as choices,
            ):
                async for choice in choices:
                    delta = choice.get("delta") or {}
                    writer.think(delta.get("reasoning_content") or "")
                    writer.say(delta.get("content") or "")
                    self._said += delta.get("content") or ""
        finally:
            writer.end()
            self._keep()

    def _keep(self) -> None:
        """Remember what was said, even if it was stopped; nothing said leaves no trace."""
        if self._said:
            self.turns.append({"role": "assistant", "content": self._said})
        else:
            self.turns.pop()

    def obey(self, line: str) -> bool:
        """Carry out a line that begins with a slash; returns whether the chat goes on."""
        command, _, rest = line.partition(" ")
        match command:
            case "/exit":
                return False
            case "/reset":
                self.turns.clear()
                _note("The chat begins anew.")
            case "/system" if rest.strip():
                self.system = rest.strip()
            case "/system":
                _note(self.system or "There is no system message.")
            case "/help":
                _note(HELP)
            case _:
                _note(f"There is no {command}; /help lists what there is.")
        return True


def _talk(chat: Chat, runner: asyncio.Runner) -> int:
    if chat.styled:
        import readline  # noqa: F401  # gives input() its editing keys and history

        _note(f"{chat.fields['model']} at {chat.url}; /help lists commands")
    status = 0
    while (line := _read(chat.styled)) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if not chat.obey(line.strip()):
                break
            continue
        try:
            runner.run(chat.answer(line))
        except KeyboardInterrupt:
            if not chat.styled:
                raise
            _note("[stopped]")
        except CommandError as error:
            print(f"trunkline: {error}", file=sys.stderr)
            status = 0 if chat.styled else 1
    return status


def _read(styled: bool) -> str | None:
    """The next line of the input; None at its end."""
    if not styled:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print("\n/exit leaves", flush=True)
        except EOFError:
            print()
            return None


def _note(text: str) -> None:
    """Say something that is not the model's: to stderr, so that a pipe gets answers alone."""
    if sys.stderr.isatty():
        wrap = WordWrap(width())
        text = f"{DIM}{wrap.feed(text)}{wrap.end()}{PLAIN}"
    print(text, file=sys.stderr, flush=True)


class _Writer:
    """Writes one answer to stdout."""

    def __init__(self, styled: bool) -> None:
        self._styled = styled
        self._wrap = WordWrap(width())
        self._thinks = False

    def think(self, text: str) -> None:
        if not self._styled or not text:
            return
        self._write(("" if self._thinks else DIM) + self._wrap.feed(text))
        self._thinks = True

    def say(self, text: str) -> None:
        if not text:
            return
        if not self._styled:
            write(text)
            return
        if self._thinks:
            self._write(f"{self._wrap.end()}{PLAIN}{self._wrap.feed(chr(10))}")
            self._thinks = False
        self._write(self._wrap.feed(text))

    def end(self) -> None:
        rest = self._wrap.end() if self._styled else ""
        self._write(f"{rest}{PLAIN if self._thinks else ''}\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
