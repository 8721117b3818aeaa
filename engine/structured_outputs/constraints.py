"""The requests of an engine whose outputs follow grammars."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from multiprocessing.connection import wait

from engine.kv_cache.block_pool import InvariantViolation
from engine.request import Request
from engine.sampling.token_masks import TokenMasks
from engine.structured_outputs.grammar import MAX_STARTS, Grammar, GrammarHost
from engine.structured_outputs.messages import RowState, RowStatus
from engine.structured_outputs.params import GrammarSource

MAX_GRAMMARS = 128
"""Grammars kept, each a process of a few megabytes. With as many in use, further ones wait."""
MAX_COMPILING = 4
"""Grammars compiled at a time; each takes a processor."""
IDLE_WAIT_S = 0.01
"""An engine with nothing else to do waits so long for a grammar before it looks for commands."""
_REASONS = {
    RowStatus.REJECTED: "does not allow a token that was generated.",
    RowStatus.DEAD_END: "allows nothing here that the model's vocabulary can spell.",
}


class Constraints:
    """Compiles grammars while nobody else waits, and gives the masks of every step.

    What a mask depends on are the grammar and the output's tokens alone. So preemption changes
    nothing, and an output that began on another engine goes on with its first mask here.

    Args:
        host: starts the grammars' processes.
        eos_token_ids: of the model.
        pin_memory: put masks where they can be copied to a GPU.
    """

    def __init__(
        self, host: GrammarHost, eos_token_ids: Collection[int], pin_memory: bool = False
    ) -> None:
        self.waiting: deque[Request] = deque()
        """Requests whose grammars are compiled, or wait to be, in the order in which they came."""
        self._host = host
        self._eos_token_ids = list(eos_token_ids)
        self._pin_memory = pin_memory
        self._grammars: OrderedDict[GrammarSource, Grammar] = OrderedDict()

    def add(self, request: Request) -> None:
        """Let a request wait for its grammar, which may be there already."""
        self.waiting.append(request)

    def abort(self, request_ids: Collection[str]) -> None:
        """Forget requests that still wait; unknown ids are ignored."""
        self.waiting = deque(r for r in self.waiting if r.request_id not in request_ids)

    def take_ready(self, may_wait: bool) -> tuple[list[Request], list[tuple[Request, str]]]:
        """Requests whose grammars have been compiled, and those whose grammars cannot be.

        Args:
            may_wait: for `IDLE_WAIT_S` at most, if there is none.

        Returns:
            The first, and (request, why not) of the second.
        """
        ready: list[Request] = []
        refused: list[tuple[Request, str]] = []
        waiting, self.waiting, has_room = self.waiting, deque(), True
        for grammar in self._grammars.values():
            grammar.poll()
        for request in waiting:
            has_room = self._place(request, has_room) and has_room
            if request.matcher is None or request.matcher.grammar.compiling:
                self.waiting.append(request)
            elif error := request.matcher.grammar.error:
                if request.matcher.grammar.never_started and self._host.failed_starts < MAX_STARTS:
                    request.matcher = None  # it gets another grammar next time
                    self.waiting.append(request)
                else:
                    refused.append((request, error))
            else:
                ready.append(request)
        if may_wait and not ready and not refused:
            wait([g.connection for g in self._grammars.values() if g.compiling], IDLE_WAIT_S)
        return ready, refused

    def masks(
        self, rows: Iterable[tuple[int, Request]], vocab_size: int
    ) -> tuple[TokenMasks | None, list[tuple[Request, str]]]:
        """What each of the requests may sample next; all their tokens so far must be known.

        Args:
            rows: (place among the rows that sample, request); finished ones are left out.
            vocab_size: width of the logits.

        Returns:
            The masks, if there are any; and (request, why it cannot go on).
        """
        groups: dict[Grammar, list[tuple[int, Request]]] = {}
        for place, request in rows:
            if request.matcher is not None and not request.finished:
                groups.setdefault(request.matcher.grammar, []).append((place, request))
        if not groups:
            return None, []
        for grammar, members in groups.items():  # their processes work side by side
            grammar.ask([self._state(request) for _, request in members])
        places = [place for members in groups.values() for place, _ in members]
        masks = TokenMasks.allocate(places, vocab_size, self._pin_memory)
        errors: list[tuple[Request, str]] = []
        begin, bits = 0, masks.bits.numpy()
        for grammar, members in groups.items():
            part = bits[begin : begin + len(members)]
            begin += len(members)
            for status, (_, request), mask in zip(
                grammar.collect(part), members, part, strict=True
            ):
                if status != RowStatus.MASKED:
                    mask[:] = -1  # whatever is sampled is dropped
                    errors.append((request, grammar.error or _REASONS[RowStatus(status)]))
        return masks, errors

    def _state(self, request: Request) -> RowState:
        """What the grammar's process must know for the next mask."""
        matcher, params = request.matcher, request.params
        if matcher is None:
            raise InvariantViolation(f"request {request.request_id} has no grammar")
        tokens = request.token_ids[request.num_prompt_tokens + matcher.num_sent :]
        matcher.num_sent += len(tokens)
        too_short = request.num_output_tokens < params.min_tokens
        unwanted = self._eos_token_ids if too_short or params.ignore_eos else []
        if too_short:
            unwanted = [*unwanted, *params.stop_token_ids]
        return RowState(matcher.matcher_id, tokens, unwanted)

    def _place(self, request: Request, has_room: bool) -> bool:
        """Give a request its grammar; False if that is a new one for which there is no room."""
        options = request.params.structured_outputs
        if request.matcher is not None or options is None:
            return True
        source = options.source()
        grammar = self._grammars.get(source)
        if grammar is not None and grammar.may_be_retried:
            grammar = None
        if grammar is None:
            if not has_room or not self._make_room():
                return False
            grammar = self._grammars[source] = Grammar(source, self._host)
        self._grammars.move_to_end(source)
        request.matcher = grammar.matcher()
        return True

    def _make_room(self) -> bool:
        """Whether one more grammar may be compiled; drops the one unused for longest if need be."""
        if sum(grammar.compiling for grammar in self._grammars.values()) >= MAX_COMPILING:
            return False
        if len(self._grammars) < MAX_GRAMMARS:
            return True
        unused = next((s for s, grammar in self._grammars.items() if not grammar.in_use), None)
        if unused is not None:
            self._grammars.pop(unused).close()
        return unused is not None
