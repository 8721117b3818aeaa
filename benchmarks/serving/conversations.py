"""What is sent: conversations of one or more turns, of words that are one token each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

_TEXT = """
time year people way day man thing woman life child world school state family group country hand
part place case week company system program work number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city name team minute idea body
back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force order light voice rain river mountain
window table paper music summer winter garden letter street market horse bird fish tree stone
fire wind snow sea ship train road bridge field forest island coffee bread milk sugar salt
"""
WORDS = _TEXT.split()
"""Each, after a space, is one token in the vocabularies of GPT-2 and its kind, so that a text's
length in tokens is known without a tokenizer. Answers tell the true number."""

Range = tuple[int, int]
"""Least and most tokens, both included."""


@dataclass(frozen=True)
class Turn:
    """What a user says, and how many tokens are asked of the answer."""

    text: str
    output_tokens: int
    pause_s: float = 0.0
    """Seconds that the user thinks before."""


@dataclass(frozen=True)
class Conversation:
    """Each turn's prompt is all that was said before it, answers included, and its own text."""

    prefix: str
    turns: list[Turn]


@dataclass(frozen=True)
class Mix:
    """Distribution of conversations."""

    input_tokens: Range
    """Of a turn, without what was said before."""
    output_tokens: Range
    turns: int = 1
    prefix_tokens: int = 0
    """Of the text that conversations begin with."""
    prefixes: int = 1
    """How many such texts there are; each conversation begins with one of them."""
    think_s: float = 0.0
    """Mean of the pauses before turns, the first included; they are exponential."""

    def draw(self, seed: int) -> Iterator[Conversation]:
        """Conversations without end; the same for the same seed."""
        rng = random.Random(seed)
        prefixes = [_words(rng, self.prefix_tokens) for _ in range(self.prefixes)]
        while True:
            turns = [self._draw_turn(rng) for _ in range(self.turns)]
            yield Conversation(rng.choice(prefixes), turns)

    def _draw_turn(self, rng: random.Random) -> Turn:
        text = _words(rng, rng.randint(*self.input_tokens))
        output_tokens = rng.randint(*self.output_tokens)
        pause_s = rng.expovariate(1 / self.think_s) if self.think_s else 0.0
        return Turn(text, output_tokens, pause_s)


def arrivals(rate: float, burst: int, seed: int) -> Iterator[float]:
    """Seconds after the start at which conversations arrive, `rate` a second, without end.

    A Poisson process of groups of `burst` that arrive together.
    """
    rng, now = random.Random(seed), 0.0
    while True:
        now += rng.expovariate(rate / burst)
        yield from [now] * burst


def echo(prompt: str, tokens: int) -> str:
    """What the fake engine answers: the prompt's words over and over."""
    words = prompt.split(" ")[1:]
    return "".join(f" {words[i % len(words)]}" for i in range(tokens))


def count_words(text: str) -> int:
    """Tokens in a text of `WORDS`."""
    return text.count(" ")


def _words(rng: random.Random, count: int) -> str:
    return "".join(f" {word}" for word in rng.choices(WORDS, k=count))
