"""Log-probabilities of chosen tokens and of the likeliest ones, of the model's raw distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.outputs import TokenLogprobs

LOGITS_AT_A_TIME = 1 << 24
"""Most logits worked on together. Their float32 copies and what is computed of them take 9 bytes
each, and the model's own logits of prompt tokens up to 4 more: less than 256 MiB in all."""


@dataclass(slots=True)
class LogprobTensors:
    """Log-probabilities at several positions, on the device; column 0 is the chosen token."""

    token_ids: torch.Tensor
    """int64 [positions, 1 + alternatives]."""
    logprobs: torch.Tensor
    """float32 [positions, 1 + alternatives]."""
    ranks: torch.Tensor
    """int64 [positions]."""

    def to_pinned(self) -> LogprobTensors:
        """Copies in pinned host memory, complete once the device has come so far."""
        return LogprobTensors(*map(_to_pinned, (self.token_ids, self.logprobs, self.ranks)))

    def to_host(self, num_top: list[int]) -> list[TokenLogprobs]:
        """Fetch them, with `num_top[i]` alternatives at position i. Waits for the device."""
        columns = zip(
            self.token_ids.tolist(),
            self.logprobs.tolist(),
            self.ranks.tolist(),
            num_top,
            strict=True,
        )
        return [
            TokenLogprobs(ids[: 1 + count], logprobs[: 1 + count], rank)
            for ids, logprobs, rank, count in columns
        ]


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def gather_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    num_top: int,
    places: torch.Tensor | None = None,
) -> LogprobTensors:
    """Log-probabilities of a token at each position and of the likeliest ones.

    Args:
        logits: raw logits, of any float type, [lines, vocab]; left as they are.
        token_ids: the tokens to look up, int64 [positions].
        num_top: alternatives at each position.
        places: line of each position, int64 [positions]; None if there is one line for each.
    """
    size = rows_at_a_time(logits.shape[-1])
    parts = []
    for start in range(0, max(len(token_ids), 1), size):
        part = slice(start, start + size)
        lines = logits[part] if places is None else logits[places[part]]
        parts.append(_gather(lines.float(), token_ids[part], num_top))
    if len(parts) == 1:
        return parts[0]
    return LogprobTensors(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.ranks for part in parts]),
    )


def rows_at_a_time(vocab_size: int) -> int:
    """Rows of logits that are worked on together, so that temporaries stay in their bound."""
    return max(1, LOGITS_AT_A_TIME // vocab_size)


def _gather(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> LogprobTensors:
    """The same of float32 logits, all at once."""
    chosen = logits.gather(-1, token_ids[:, None])
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    ranks = (logits > chosen).sum(dim=-1) + 1
    ids, values = token_ids[:, None], chosen
    if num_top:
        top = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
        ids = torch.cat([ids, top.indices], dim=-1)
        values = torch.cat([values, top.values], dim=-1)
    return LogprobTensors(ids, values - normaliser, ranks)


def prompt_logprobs(
    logits: torch.Tensor, target_ids: torch.Tensor, num_top: int
) -> list[TokenLogprobs]:
    """Log-probabilities of prompt tokens, for one chunk of a prompt. Waits for the device.

    Args:
        logits: raw logits, float [positions, vocab].
        target_ids: the token that follows each position, int64 [positions].
        num_top: alternatives at each position.
    """
    tensors = gather_logprobs(logits, target_ids, num_top)
    return tensors.to_host([num_top] * len(target_ids))
