"""llama.cpp through llama-cpp-python's low-level interface, batched as its own server does.

Runs in any interpreter that has llama-cpp-python and numpy; nothing else of this project's needs.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.engines import Engine
from benchmarks.workloads import Requests

_FLOAT32_CACHE = 0
"""llama.cpp's number for float32 in `type_k` and `type_v`."""


@dataclass(eq=False)
class _Sequence:
    slot: int
    prompt: list[int]
    wanted: int
    position: int = 0
    """Tokens in the cache."""
    output: list[int] = field(default_factory=list)
    row: int = -1
    """Row of this step's batch whose logits are this sequence's; -1 has none."""

    def pending(self) -> list[int]:
        """Tokens that are known and not yet in the cache."""
        return self.prompt[self.position :] or self.output[-1:]


class LlamaCpp(Engine):
    """Continuous batching over `slots` sequences: decodes first, then prompts in chunks."""

    def __init__(
        self,
        model: str,
        load_format: str,
        slots: int = 32,
        batch_tokens: int = 512,
        kv_cache: str = "float16",
    ) -> None:
        """Load `model`, a GGUF file.

        Args:
            model: path of the file.
            load_format: anything but `dummy`, which llama.cpp does not have.
            slots: most sequences that run at once.
            batch_tokens: most tokens in one decode call.
            kv_cache: `float16`, llama.cpp's default, or `float32`.
        """
        if load_format == "dummy":
            raise ValueError("llama.cpp cannot run a model without weights")
        llama_cpp.llama_backend_init()
        # Keeps llama.cpp's log out of the output; held, as ctypes does not hold callbacks.
        self._log = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._log, None)
        self._model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise FileNotFoundError(f"llama.cpp cannot load '{model}'")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._slots, self._batch_tokens, self._kv_cache = slots, batch_tokens, kv_cache

    def run(self, requests: Requests) -> list[list[int]]:
        """Generate, each batch with a context sized for its requests."""
        batches = requests.batches(self._slots)
        return [tokens for batch in batches for tokens in self._run(batch)]

    def _run(self, requests: Requests) -> list[list[int]]:
        slots = min(self._slots, len(requests.prompts))
        pairs = list(zip(requests.prompts, requests.outputs, strict=True))
        longest = max(len(prompt) + wanted for prompt, wanted in pairs)
        context = self._make_context(slots, longest)
        batch = llama_cpp.llama_batch_init(self._batch_tokens, 0, 1)
        noise = np.random.default_rng(requests.seed)
        waiting = deque(_Sequence(-1, prompt, wanted) for prompt, wanted in pairs)
        sequences = list(waiting)
        running: list[_Sequence] = []
        free = list(range(slots))
        try:
            while waiting or running:
                while waiting and free:
                    waiting[0].slot = free.pop()
                    running.append(waiting.popleft())
                _fill(batch, running, self._batch_tokens)
                if llama_cpp.llama_decode(context, batch):
                    raise RuntimeError("llama_decode failed")
                self._sample(context, running, requests.temperature, noise)
                free += _retire(context, running)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
        return [sequence.output for sequence in sequences]

    def _make_context(self, slots: int, longest: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = slots
        params.n_ctx = slots * (-(-longest // 256) * 256)
        params.n_batch = params.n_ubatch = self._batch_tokens
        params.kv_unified = True  # measured: three times the decode speed at 16 sequences
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        if self._kv_cache == "float32":
            params.type_k = params.type_v = _FLOAT32_CACHE
        return llama_cpp.llama_init_from_model(self._model, params)

    def _sample(
        self, context: Any, running: list[_Sequence], temperature: float, noise: Any
    ) -> None:
        for sequence in running:
            if sequence.row < 0:
                continue
            pointer = llama_cpp.llama_get_logits_ith(context, sequence.row)
            logits = np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
            if temperature:
                logits = logits / temperature + noise.gumbel(size=self.vocab_size)
            sequence.output.append(int(logits.argmax()))


def _retire(context: Any, running: list[_Sequence]) -> list[int]:
    """Drop the sequences that are complete and their cache; return their slots."""
    done = [sequence for sequence in running if len(sequence.output) == sequence.wanted]
    for sequence in done:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), sequence.slot, -1, -1)
        running.remove(sequence)
    return [sequence.slot for sequence in done]


def _fill(batch: Any, running: list[_Sequence], capacity: int) -> None:
    """Put each sequence's pending tokens into `batch`, decoding ones first, up to `capacity`."""
    used = 0
    for sequence in sorted(running, key=lambda s: not s.output):
        tokens = sequence.pending()[: capacity - used]
        last = sequence.position + len(tokens) >= len(sequence.prompt)
        for offset, token in enumerate(tokens):
            at = used + offset
            batch.token[at] = token
            batch.pos[at] = sequence.position + offset
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = sequence.slot
            batch.logits[at] = last and offset == len(tokens) - 1
        used += len(tokens)
        sequence.position += len(tokens)
        sequence.row = used - 1 if tokens and last else -1
    batch.n_tokens = used
