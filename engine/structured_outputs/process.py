"""The processes that compile grammars and match outputs against them.

One imports xgrammar, which takes seconds, and forks for each grammar, which takes milliseconds. So
a grammar that takes too much time or memory, or crashes the library, ends alone: threads could not
be stopped. Processor time is limited, not time, so that a busy machine refuses nobody.

Run as a program: `python -m engine.structured_outputs.process SETUP`, where standard input is
a Unix socket. Each byte that comes there brings one end of another, on which a new process serves a
grammar, and the memory for its masks.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import xgrammar

from engine.model_source import resolve_model
from engine.structured_outputs.json_schema import TOO_OFTEN, repeats_too_often
from engine.structured_outputs.mask_memory import MaskMemory
from engine.structured_outputs.messages import (
    MaskRequest,
    RowState,
    RowStatus,
    Setup,
    decode_request,
    decode_source,
)
from engine.structured_outputs.params import GrammarSource
from engine.tokenizer import Tokenizer

EARNED_CPU_S = 0.01
"""Processor time that each mask and each token earn."""
MEMORY_BYTES = 512 << 20
"""For each grammar, beyond what the process begins with."""
MAX_WHITESPACE = 32
"""Characters of white space in a row, in JSON; small models would otherwise go on with it."""
MAX_ERROR_LENGTH = 300
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f]")
"""Control characters but the line feed, which may stand between the tokens of JSON."""
_SOURCE_LINE = re.compile(r"\[[\d:]+\] \S+:\d+: (Check failed: \(.*?\) is false: )?")
"""What the library puts before its messages."""


class Vocabulary:
    """The tokens as xgrammar wants them: bytes; special tokens and padding stand for none.

    Args:
        tokenizer: of the model.
        setup: of the process.

    Attributes:
        width: of the logits.
        any: all tokens.
        json: those that a JSON text may hold. xgrammar allows control characters where a schema
            limits a string's length.
    """

    def __init__(self, tokenizer: Tokenizer, setup: Setup) -> None:
        self.width = setup.width
        never = {*tokenizer.special_ids, *setup.eos_token_ids}
        token_bytes = tokenizer.token_bytes(skip_special_tokens=True)
        texts = [b"" if i in never else token_bytes[i] for i in range(setup.width)]
        as_json = [b"" if _CONTROL.search(text) else text for text in texts]
        self.any, self.json = (
            xgrammar.TokenizerInfo(
                each,
                vocab_type=xgrammar.VocabType.RAW,
                vocab_size=setup.width,
                stop_token_ids=list(setup.eos_token_ids),
            )
            for each in (texts, as_json)
        )


def compile_grammar(source: GrammarSource, vocabulary: Vocabulary) -> xgrammar.CompiledGrammar:
    """Compile a grammar.

    Objects and arrays hold what a schema names and nothing else, unless it asks for more than it
    names.

    Raises:
        RuntimeError: there is a mistake in it.
    """
    if source.kind != "json" and repeats_too_often(source.text):
        raise RuntimeError(TOO_OFTEN)
    info = vocabulary.json if source.kind == "json" else vocabulary.any
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    if source.kind == "regex":
        return compiler.compile_regex(source.text)
    if source.kind == "grammar":
        return compiler.compile_grammar(source.text)
    limit = MAX_WHITESPACE if source.any_whitespace else None
    compile_schema = partial(
        compiler.compile_json_schema,
        source.text,
        any_whitespace=source.any_whitespace,
        max_whitespace_cnt=limit,
    )
    try:
        return compile_schema(strict_mode=True)
    except RuntimeError:
        return compile_schema(strict_mode=False)


class Matchers:
    """Follows the outputs of one grammar; made anew, they take all tokens at once.

    Args:
        compiled: the grammar.
    """

    def __init__(self, compiled: xgrammar.CompiledGrammar) -> None:
        self._compiled = compiled
        self._matchers: dict[int, xgrammar.GrammarMatcher] = {}
        self._batch = xgrammar.BatchGrammarMatcher(1)  # its threads would cost more than they gain

    def fill(self, request: MaskRequest, masks: np.ndarray) -> list[RowStatus]:
        """Fill the masks, int32 [rows, ceil(vocab / 32)]; a 1 bit is an allowed token."""
        for matcher_id in request.ended:
            self._matchers.pop(matcher_id, None)
        masks.fill(-1)
        matchers = {
            place: matcher
            for place, row in enumerate(request.rows)
            if (matcher := self._advance(row)) is not None
        }
        self._batch.batch_fill_next_token_bitmask(list(matchers.values()), masks, list(matchers))
        statuses = [RowStatus.DEAD_END] * len(masks)
        for place in np.flatnonzero(masks.any(axis=1)).tolist():
            is_masked = place in matchers
            statuses[place] = RowStatus.MASKED if is_masked else RowStatus.REJECTED
            if is_masked and request.rows[place].unwanted:
                _drop_unwanted(masks[place], request.rows[place].unwanted)
        return statuses

    def _advance(self, row: RowState) -> xgrammar.GrammarMatcher | None:
        """The row's matcher after its new tokens; None if the grammar does not allow them."""
        matcher = self._matchers.get(row.matcher_id)
        if matcher is None:
            matcher = self._matchers[row.matcher_id] = xgrammar.GrammarMatcher(self._compiled)
        allowed = all(map(matcher.accept_token, row.tokens)) and not matcher.is_terminated()
        return matcher if allowed else None


def _drop_unwanted(mask: np.ndarray, tokens: list[int]) -> None:
    """Clear the bits of tokens, unless no other is set."""
    words = mask.view(np.uint32)
    if not any(words.item(token >> 5) >> (token & 31) & 1 for token in tokens):
        return
    before = mask.copy()
    for token in tokens:
        words[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))
    if not mask.any():
        mask[:] = before


def serve_grammar(
    connection: Connection, memory: MaskMemory, vocabulary: Vocabulary, setup: Setup
) -> None:
    """Compile what comes first, tell how that went, and give masks until nobody asks any more."""
    connection.send_bytes(b"")  # it has begun: whatever happens from now on is the grammar's doing
    _limit_memory()
    source = decode_source(connection.recv_bytes())
    signal.setitimer(signal.ITIMER_PROF, setup.compile_cpu_s)  # its signal ends the process
    try:
        matchers = Matchers(compile_grammar(source, vocabulary))
        memory.grow(1)
        matchers.fill(MaskRequest([RowState(-1, [], [])], []), memory.rows(1))
    except Exception as error:
        connection.send_bytes((_reason(error) or "it cannot be compiled").encode())
        return
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    connection.send_bytes(b"")
    budget = setup.mask_cpu_s
    while True:
        request = decode_request(connection.recv_bytes())
        earned = EARNED_CPU_S * sum(1 + len(row.tokens) for row in request.rows)
        budget = min(budget, setup.mask_cpu_s) + earned
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, budget)
        statuses = matchers.fill(request, memory.rows(len(request.rows)))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        budget = max(0.0, budget - (time.process_time() - began))
        connection.send_bytes(bytes(statuses))


def _reason(error: Exception) -> str:
    """The library's message without its source lines."""
    return " ".join(_SOURCE_LINE.sub("", str(error)).split())[:MAX_ERROR_LENGTH]


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Fork a process for each socket that comes, until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine ends by it, and this with the engine
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes' ends
    os.nice(10)  # engines on CPUs want the processors more urgently
    setup = msgspec.json.decode(sys.argv[1], type=Setup)
    vocabulary = Vocabulary(Tokenizer.load(resolve_model(setup.model)), setup)
    control = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    while True:
        data, files, _, _ = socket.recv_fds(control, 1, 2)
        if not data:
            return
        if os.fork() == 0:
            control.close()
            os.close(sys.stdin.fileno())
            try:
                memory = MaskMemory(setup.width, files[1])
                serve_grammar(Connection(files[0]), memory, vocabulary, setup)
            finally:  # most often because nobody asks any more; whatever it is, the engine notices
                os._exit(0)
        for file in files:
            os.close(file)


if __name__ == "__main__":
    main()
