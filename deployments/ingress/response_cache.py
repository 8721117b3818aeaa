"""Answers to requests that come again, kept by an ingress replica: off by default.

Kept is what the engines said, not what clients read: a hit goes through the same detokenizer, stop
strings and writers as a live answer, so that all endpoints share entries and none knows of them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from hashlib import sha256

import msgspec

from deployments.wire import encode, merge_delta
from engine.job import Job
from engine.outputs import TokenDelta

CHUNK_TOKENS = 256
"""Tokens that are encoded, and told again, at a time: other streams wait for no more."""
ENTRY_BYTES, CHUNK_BYTES = 512, 64
"""What Python takes for an entry and for each of its chunks, beside their contents; rounded up."""

_decode = msgspec.msgpack.Decoder(list[TokenDelta]).decode

Entry = tuple[bytes, ...]
"""Encoded lists of deltas, whose request ids are the places of completions among their prompt's."""


class ResponseCache:
    """What the engines of one model said, by prompt; the entries used longest ago go first.

    Args:
        max_bytes: that all entries may take; 0 keeps nothing.

    Attributes:
        num_bytes: that all entries take, what Python adds included.
        num_queries: prompts that were looked up.
        num_hits: of these, prompts that were found.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_queries = 0
        self.num_hits = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def recall(self, jobs: Sequence[Job], owner: bytes) -> Recall:
        """Look up what can be answered from here.

        Args:
            jobs: of one request.
            owner: whose request it is; owners never get each other's answers, as a quick one would
                tell what the other has asked.
        """
        keys = {
            job.request_id: answer_key(job, owner)
            for job in jobs
            if self.max_bytes and is_deterministic(job)
        }
        return Recall(self, jobs, keys)

    def get(self, key: bytes) -> Entry | None:
        """The entry of a key, which counts as used now."""
        self.num_queries += 1
        if (entry := self._entries.get(key)) is not None:
            self.num_hits += 1
            self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep an entry, unless it alone is too large, and drop others for it."""
        if (size := entry_bytes(entry)) > self.max_bytes:
            return
        if (old := self._entries.pop(key, None)) is not None:
            self.num_bytes -= entry_bytes(old)
        self._entries[key] = entry
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= entry_bytes(self._entries.popitem(last=False)[1])


def is_deterministic(job: Job) -> bool:
    """Whether the same request would get the same answer: it is greedy, or the client gave its
    seed, on which alone, with the position, the noise depends."""
    return job.params.greedy or job.params.seed is not None


def answer_key(job: Job, owner: bytes) -> bytes:
    """Hash of all that decides what a model says to a prompt, and of who may hear it."""
    params = job.params
    if params.greedy:  # then there is no noise
        params = msgspec.structs.replace(params, seed=None)
    request = next(iter(job.requests.values()))
    told = (owner, request.cache_salt, request.pooling, job.prompt_token_ids, params)
    return sha256(msgspec.msgpack.encode(told)).digest()


def entry_bytes(entry: Entry) -> int:
    """What an entry takes, with its key."""
    return ENTRY_BYTES + sum(CHUNK_BYTES + len(chunk) for chunk in entry)


class Recall:
    """One request's dealings with the cache.

    Args:
        cache: where to look, and to keep what has come.
        jobs: of the request.
        keys: of those that the cache is for, by their ids.

    Attributes:
        missing: jobs for the engines.
        is_hit: whether nothing is missing; None where the cache was not asked.
    """

    def __init__(self, cache: ResponseCache, jobs: Sequence[Job], keys: dict[str, bytes]) -> None:
        self._cache = cache
        self._keys = keys
        self._known: list[tuple[Job, Entry]] = []
        self.missing: list[Job] = []
        for job in jobs:
            key = keys.get(job.request_id)
            if key is not None and (entry := cache.get(key)) is not None:
                self._known.append((job, entry))
            else:
                self.missing.append(job)
        self.is_hit = not self.missing if keys else None

    def around(self, live: AsyncIterator[list[TokenDelta]]) -> AsyncIterator[list[TokenDelta]]:
        """What is known, and then what comes of the jobs that are missing.

        What comes is kept if the consumer takes all of it and every job has ended by itself.
        """
        return self._tell(live) if self._keys else live

    async def _tell(self, live: AsyncIterator[list[TokenDelta]]) -> AsyncIterator[list[TokenDelta]]:
        for job, entry in self._known:
            for chunk in entry:
                yield _addressed(chunk, job)
                await asyncio.sleep(0)  # others may have tokens to write
        recordings = [Recording(job) for job in self.missing if job.request_id in self._keys]
        by_request = {request_id: r for r in recordings for request_id in r.job.requests}
        async for deltas in live:
            for delta in deltas:
                if (recording := by_request.get(delta.request_id)) is not None:
                    recording.add(delta)
            yield deltas
        for recording in recordings:
            if recording.is_whole:
                self._cache.put(self._keys[recording.job.request_id], recording.entry())


class Recording:
    """Writes down what the engines say of a prompt while it comes.

    Args:
        job: of the prompt.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._places = {request_id: str(at) for at, request_id in enumerate(job.requests)}
        self._chunks: list[bytes] = []
        self._open: dict[str, TokenDelta] = {}
        self._num_open = 0
        """Tokens in `_open`, scored ones of the prompt included."""

    def add(self, delta: TokenDelta) -> None:
        """Take a delta of one of the job's requests."""
        place = self._places[delta.request_id]
        if (known := self._open.get(place)) is not None:
            merge_delta(known, delta)
        else:  # a copy, as it will grow
            ids = list(delta.token_ids)
            self._open[place] = msgspec.structs.replace(delta, request_id=place, token_ids=ids)
        self._num_open += len(delta.token_ids) + len(delta.prompt_logprobs or ())
        if self._num_open >= CHUNK_TOKENS:
            self._close_chunk()

    @property
    def is_whole(self) -> bool:
        """Whether all completions have ended, and none was broken off."""
        ended = (processor.finish_reason for processor in self.job.processors.values())
        return all(reason in ("stop", "length") for reason in ended)

    def entry(self) -> Entry:
        """All of it."""
        self._close_chunk()
        return tuple(self._chunks)

    def _close_chunk(self) -> None:
        if self._open:
            self._chunks.append(encode(list(self._open.values())))
        self._open, self._num_open = {}, 0


def _addressed(chunk: bytes, job: Job) -> list[TokenDelta]:
    """The deltas of a chunk as they would come for a job."""
    request_ids = list(job.requests)
    deltas = _decode(chunk)
    for delta in deltas:
        delta.request_id = request_ids[int(delta.request_id)]
    return deltas
