"""Compiles, on CUDA, the sampling kernels that requests of any kind will need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from engine.sampling.rows import Batch
from engine.sampling.sampler import Sampler
from engine.sampling.token_masks import TokenMasks
from engine.sampling_params import SamplingParams
from engine.step import NewRow

_REQUESTS = (
    SamplingParams(seed=0),
    SamplingParams(seed=0, top_k=2),
    SamplingParams(seed=0, presence_penalty=1.0, logprobs=1),
    SamplingParams(seed=0, presence_penalty=1.0, top_k=2, logit_bias={0: 1.0}),
)
"""They reach every variant of every kernel: logits as they come or in float32, with and without
truncation."""


def sampling_warm_ups(
    vocab_size: int, device: torch.device, logits_dtype: torch.dtype
) -> Iterator[Callable[[], None]]:
    """Calls after which no request waits for the compiler; they may run in threads of their own.

    Args:
        vocab_size: width of the logits.
        device: a CUDA device.
        logits_dtype: of the logits to come.
    """
    from engine.kernels.draw import LARGE_BATCH

    yield partial(_mask_once, vocab_size, device)
    for rows, params in product((1, LARGE_BATCH), _REQUESTS):
        yield partial(_sample_once, params, rows, vocab_size, device, logits_dtype)


def _mask_once(vocab_size: int, device: torch.device) -> None:
    masks = TokenMasks.allocate([0], vocab_size, pin_memory=True)
    masks.bits.fill_(-1)
    masks.apply(torch.zeros((1, vocab_size), device=device))


@torch.inference_mode()
def _sample_once(
    params: SamplingParams,
    rows: int,
    vocab_size: int,
    device: torch.device,
    logits_dtype: torch.dtype,
) -> None:
    sampler = Sampler(1, vocab_size, device)
    sampler.add_row(NewRow(0, "warm-up", params, [0], 1))
    logits = torch.zeros((rows, vocab_size), dtype=logits_dtype, device=device)
    # One row several times, unlike a real batch: what it holds does not matter.
    sampler.sample(logits, Batch([0] * rows, [1] * rows, device))
