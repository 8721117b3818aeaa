"""A runner without a model, and a driver that checks every plan and every delta.

The runner's "keys and values" are hashes of all tokens up to a position. A plan that feeds a wrong
token, or attends over a block that holds something else, cannot go unnoticed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from zlib import crc32

from engine.config import EngineConfig
from engine.embedding import POOLED_PARAMS
from engine.outputs import TokenDelta, TokenLogprobs
from engine.request import EngineRequest, Request
from engine.sampling_params import SamplingParams
from engine.scheduler.scheduler import Scheduler
from engine.step import StepPlan, StepResult
from engine.step_times import UNKNOWN_TIMES, StepTimes

EOS = 0
VOCAB = 12


def pooled(truth: Truth, length: int) -> bytes:
    return str(truth.chain[length - 1]).encode()


def sampled_token(seed: int, position: int) -> int:
    return crc32(f"{seed}/{position}".encode()) % VOCAB


@dataclass
class Truth:
    """A request, what it must produce, and what it produced so far."""

    wire: EngineRequest
    limit: int
    tokens: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)
    got: list[int] = field(default_factory=list)
    prompt_positions: list[int] = field(default_factory=list)
    reason: str | None = None
    stop_reason: int | None = None
    aborted: bool = False
    num_deltas: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.wire.prompt_token_ids + self.wire.output_token_ids
        self.reach(len(self.tokens))

    def reach(self, length: int) -> None:
        while len(self.tokens) < length:
            self.tokens.append(sampled_token(self.wire.params.seed, len(self.tokens)))
        for position in range(len(self.chain), length):
            parent = self.chain[-1] if self.chain else hash(self.wire.cache_salt)
            self.chain.append(hash((parent, self.tokens[position])))

    def expected(self) -> tuple[list[int], str, int | None]:
        """Brute force: sample one by one until a rule says stop."""
        if self.wire.pooling is not None:
            return [], "stop", None
        params, first = self.wire.params, len(self.wire.prompt_token_ids)
        length = first + len(self.wire.output_token_ids)
        start = length
        while True:
            length += 1
            self.reach(length)
            token = self.tokens[length - 1]
            if length - first >= params.min_tokens:
                if token == EOS and not params.ignore_eos:
                    return self.tokens[start:length], "stop", None
                if token in params.stop_token_ids:
                    return self.tokens[start:length], "stop", token
            if length == self.limit:
                return self.tokens[start:length], "length", None


class FakeRunner:
    """Executes plans in order on a cache of one hash a slot."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)
        self.tables = [[0] * num_blocks for _ in range(max_num_seqs)]
        self.last_token: list[int | None] = [None] * max_num_seqs
        self.owner: list[Truth | None] = [None] * max_num_seqs
        self.summed = [0] * max_num_seqs
        """Leading tokens of each row whose hidden states have been seen without a gap."""

    def execute(self, plan: StepPlan, truths: dict[str, Truth]) -> StepResult:
        for new in plan.new_rows:
            truth = truths[new.request_id]
            assert new.token_ids == truth.tokens[: len(new.token_ids)]
            assert new.num_prompt_tokens == len(truth.wire.prompt_token_ids)
            assert new.pooling == truth.wire.pooling
            self.owner[new.row], self.last_token[new.row] = truth, None
            self.summed[new.row] = 0
        for row, (first, blocks) in plan.new_blocks.items():
            assert 0 not in blocks, "the null block was handed out"
            self.tables[row][first : first + len(blocks)] = blocks
        for row, start, count in zip(plan.rows, plan.starts, plan.num_tokens, strict=True):
            self._write(row, start, self._inputs(plan, row, count))
        for row, start, count in zip(plan.rows, plan.starts, plan.num_tokens, strict=True):
            self._attend(row, start + count)
        return self._sample(plan)

    def _slot(self, row: int, position: int) -> int:
        block = self.tables[row][position // self.block_size]
        return block * self.block_size + position % self.block_size

    def _inputs(self, plan: StepPlan, row: int, count: int) -> list[int]:
        ids = plan.input_ids.get(row)
        if ids is None:
            assert count == 1 and self.last_token[row] is not None
            ids = [self.last_token[row]]
        assert len(ids) == count
        return ids

    def _write(self, row: int, start: int, ids: list[int]) -> None:
        truth = self.owner[row]
        truth.reach(start + len(ids))
        assert ids == truth.tokens[start : start + len(ids)], "wrong input tokens"
        for position in range(start, start + len(ids)):
            self.slots[self._slot(row, position)] = truth.chain[position]

    def _attend(self, row: int, length: int) -> None:
        seen = [self.slots[self._slot(row, position)] for position in range(length)]
        assert seen == self.owner[row].chain[:length], "a block holds foreign tokens"

    def _sample(self, plan: StepPlan) -> StepResult:
        result = StepResult([])
        spans = zip(plan.rows, plan.starts, plan.num_tokens, plan.samples, strict=True)
        for row, start, count, samples in spans:
            truth = self.owner[row]
            wire, end = truth.wire, start + count
            if start == self.summed[row]:
                self.summed[row] = end
            if wire.params.prompt_logprobs is not None:
                positions = range(start + 1, min(end + 1, len(wire.prompt_token_ids)))
                result.prompt_logprobs[row] = [
                    TokenLogprobs([truth.tokens[p]], [float(p)], 1) for p in positions
                ]
            if samples:
                truth.reach(end + 1)
                token = self.last_token[row] = truth.tokens[end]
                if wire.pooling is not None:
                    assert wire.pooling == "last" or self.summed[row] == end
                    result.pooled[len(result.token_ids)] = pooled(truth, end)
                result.token_ids.append(token)
                if wire.params.logprobs is not None:
                    result.logprobs[row] = TokenLogprobs([token], [float(end)], 1)
        return result


class Driver:
    """A scheduler with a fake runner; every call checks what it can."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 64,
        budget: int = 64,
        check: bool = True,
        times: StepTimes = UNKNOWN_TIMES,
        **options,
    ) -> None:
        self.config = EngineConfig(**{"max_num_seqs": 8, **options})
        self.budget, self.max_model_len, self.check = budget, max_model_len, check
        self.now = 0.0
        self.scheduler = Scheduler(
            self.config,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_batched_tokens=budget,
            eos_token_ids=(EOS,),
            clock=lambda: self.now,
            times=times,
        )
        self.runner = FakeRunner(num_blocks, block_size, self.config.max_num_seqs)
        self.truths: dict[str, Truth] = {}
        self.live: dict[str, Truth] = {}
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.plans: list[StepPlan] = []
        self.retried: set[str] = set()
        self._idle_plans = 0

    def add(self, request_id: str, prompt: list[int], outputs=(), **options) -> Truth:
        names = ("priority", "cache_salt", "arrival_time", "pooling")
        wire_options = {name: options.pop(name) for name in names if name in options}
        wire_options.setdefault("arrival_time", float(len(self.truths)))
        params = SamplingParams(**{"seed": 0, "ignore_eos": True, "max_tokens": 4, **options})
        if wire_options.get("pooling") is not None:
            params = POOLED_PARAMS
        wire = EngineRequest(
            request_id, prompt, params, output_token_ids=list(outputs), **wire_options
        )
        request = Request.from_wire(wire, self.max_model_len)
        truth = Truth(wire, request.max_total_tokens)
        self.scheduler.add(request)
        self.truths[request_id] = self.live[request_id] = truth
        return truth

    def abort(self, *request_ids: str) -> None:
        self.scheduler.abort(request_ids)
        for request_id in request_ids:
            if request_id in self.live:
                self.live.pop(request_id).aborted = True

    def fail_all(self) -> None:
        deltas = self.scheduler.fail_all("it broke")
        assert {d.request_id for d in deltas} == set(self.live)
        assert all(d.finish_reason == "error" and d.error == "it broke" for d in deltas)
        for truth in self.live.values():
            truth.aborted = True
        self.live.clear()
        self.in_flight.clear()
        self.runner.slots = [None] * len(self.runner.slots)

    def fail_in_flight(self) -> None:
        self._lose(self._concerned(), self.scheduler.fail_in_flight("it broke"))

    def retry_in_flight(self) -> None:
        concerned = self._concerned()
        lost = concerned & self.retried if len(concerned) > 1 else concerned
        self.retried |= concerned
        self._lose(lost, self.scheduler.retry_in_flight("it broke"))

    def _concerned(self) -> set[str]:
        """Requests of the steps in flight."""
        owners = [self.runner.owner[row] for plan, _ in self.in_flight for row in plan.rows]
        return {truth.wire.request_id for truth in owners if truth in self.live.values()}

    def _lose(self, lost: set[str], deltas: list[TokenDelta]) -> None:
        assert sorted(d.request_id for d in deltas) == sorted(lost)
        assert all(d.finish_reason == "error" and d.error == "it broke" for d in deltas)
        for request_id in lost:
            self.live.pop(request_id).aborted = True
        self.in_flight.clear()
        self.runner.slots = [None] * len(self.runner.slots)

    def schedule(self) -> StepPlan:
        plan = self.scheduler.schedule()
        if plan.rows:
            self._check_plan(plan)
            self.in_flight.append((plan, self.runner.execute(plan, self.truths)))
            self.plans.append(plan)
            self._idle_plans = 0
        elif self.live and not self.in_flight:
            self._idle_plans += 1
            assert self._idle_plans < 2, "there is work, but nothing is scheduled"
        return plan

    def update(self) -> list[TokenDelta]:
        deltas = self.scheduler.update(*self.in_flight.popleft())
        assert len({d.request_id for d in deltas}) == len(deltas)
        for delta in deltas:
            self._take(delta)
        return deltas

    def step(self) -> list[TokenDelta]:
        """Schedule, execute and update one step; all steps in flight when there is nothing new."""
        self.schedule()
        return [delta for _ in range(len(self.in_flight)) for delta in self.update()]

    def run(self, ahead: bool = False, max_steps: int = 5000) -> None:
        """Go on until idle, then check what every request got and that all blocks are free."""
        for _ in range(max_steps):
            if not (self.scheduler.has_work or self.in_flight):
                break
            launched = bool(self.schedule().rows)
            if self.in_flight and not (ahead and launched and len(self.in_flight) < 2):
                self.update()
            if self.check:
                self.scheduler.check_invariants()
        assert not self.scheduler.has_work, "some requests never end"
        self.check_idle()

    def check_idle(self) -> None:
        load = self.scheduler.load()
        assert load.free_blocks == load.total_blocks, "blocks leaked"
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert (load.running_tokens, load.waiting_tokens) == (0, 0)
        for truth in self.truths.values():
            assert truth.aborted or truth.reason is not None

    def _take(self, delta: TokenDelta) -> None:
        truth = self.live[delta.request_id]  # a KeyError: a word after its end
        params = truth.wire.params
        assert delta.token_ids or delta.prompt_logprobs or delta.pooled, "a delta says nothing"
        if truth.wire.pooling is not None:
            assert delta.pooled == pooled(truth, len(truth.wire.prompt_token_ids))
        assert not delta.num_cached_tokens or truth.num_deltas == 0
        truth.num_deltas += 1
        known = len(truth.wire.prompt_token_ids) + len(truth.wire.output_token_ids)
        if params.logprobs is not None and delta.token_ids:
            assert [entry.logprobs[0] for entry in delta.logprobs] == [known + len(truth.got)]
        truth.got += delta.token_ids
        truth.prompt_positions += [int(e.logprobs[0]) for e in delta.prompt_logprobs or ()]
        if delta.finish_reason is None:
            return
        del self.live[delta.request_id]
        truth.reason, truth.stop_reason = delta.finish_reason, delta.stop_reason
        assert (truth.got, truth.reason, truth.stop_reason) == truth.expected()
        if params.prompt_logprobs is not None:
            assert truth.prompt_positions == list(range(1, len(truth.wire.prompt_token_ids)))

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.total_tokens <= self.budget
        assert len(set(plan.rows)) == len(plan.rows) <= self.config.max_num_seqs
        assert min(plan.num_tokens) > 0
        singles = [count == 1 for count in plan.num_tokens]
        assert singles == sorted(singles, reverse=True), "rows of one token come first"
        assert not (plan.new_rows and plan.num_preempted), "admission in a step that preempted"
        new = {new_row.row for new_row in plan.new_rows}
        assert new <= set(plan.rows)
        busy = {row for flying, _ in self.in_flight for row in flying.rows}
        owners = self.runner.owner
        for new_row in plan.new_rows:
            if new_row.row in busy:  # only a request that was in flight and has it still
                assert owners[new_row.row].wire.request_id == new_row.request_id
        if self.config.two_phase:
            self._check_one_phase(plan, new)

    def _check_one_phase(self, plan: StepPlan, new: set[int]) -> None:
        decodes = [
            row not in new and self.runner.last_token[row] is not None and count == 1
            for row, count in zip(plan.rows, plan.num_tokens, strict=True)
        ]
        if any(decodes):
            assert not new and set(plan.num_tokens) == {1}, "prefill and decode in one step"
