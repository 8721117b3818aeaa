"""The sampler: logits in, next tokens out, vectorised over the rows of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.outputs import TokenLogprobs
from engine.sampling.allowed_tokens import AllowedTokens
from engine.sampling.bad_words import BadWords
from engine.sampling.gumbel import gumbel_argmax, stream_keys, token_words
from engine.sampling.logit_bias import LogitBias
from engine.sampling.logprobs import LogprobTensors, gather_logprobs
from engine.sampling.min_tokens import MinTokens
from engine.sampling.penalties import Penalties
from engine.sampling.rows import Batch, RowParameter, RowTable, to_device
from engine.sampling.token_masks import TokenMasks
from engine.sampling.truncation import Truncation
from engine.step import NewRow

_CPU_CHUNK_ROWS = 8
"""Rows that draw together on the CPU: few enough for the cache, enough to pay for the calls."""
_NUM_PARAMETERS = 8
"""Numbers of a row: temperature, seed, three of the truncation, three of the penalties."""


@dataclass(slots=True)
class SamplerOutput:
    """What a step sampled; tensors are on the device and may not be computed yet."""

    token_ids: torch.Tensor
    """int64 [batch]."""
    logprobs: LogprobTensors | None = None
    """Of the rows in `logprob_rows`, in their order."""
    logprob_rows: list[int] | None = None
    num_top: list[int] | None = None
    """Alternatives that each of these rows asked for."""

    def host_logprobs(self) -> dict[int, TokenLogprobs]:
        """Row → log-probabilities of its sampled token, for rows that asked.

        Waits for the device.
        """
        if self.logprobs is None or self.logprob_rows is None or self.num_top is None:
            return {}
        return dict(zip(self.logprob_rows, self.logprobs.to_host(self.num_top), strict=True))


class Sampler:
    """Draws the next token of every row of a batch.

    A request's parameters are kept by row on the device; the host knows which rows use which
    feature, so that a feature costs nothing where nobody uses it. What depends on sampled tokens is
    updated on the device: a step can be sampled before the host knows the tokens of the last one.

    Order: log-probabilities of the raw logits; logit bias, minimum length, penalties, allowed
    tokens, bad words, masks of structured outputs; then the largest logit for greedy rows, and
    temperature, min_p, top_k, top_p and a Gumbel-max draw for the others.

    Args:
        max_num_seqs: rows.
        vocab_size: width of the logits.
        device: where logits come from.
        eos_token_ids: tokens that end an output unless `ignore_eos`.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self._device = device
        self._words: torch.Tensor | None = None
        self._vocab_size = vocab_size
        self._table = RowTable(max_num_seqs, _NUM_PARAMETERS, device)
        self._seeds = RowParameter(self._table, 0, torch.int64)
        self._temperature = RowParameter(self._table, 0.0)
        self._num_top: dict[int, int] = {}
        self._penalties = Penalties(self._table, max_num_seqs, vocab_size, device)
        self._bad_words = BadWords(max_num_seqs, vocab_size, device)
        self._truncation = Truncation(self._table, vocab_size)
        self._edits = (
            LogitBias(max_num_seqs, vocab_size, device),
            MinTokens(max_num_seqs, vocab_size, device, eos_token_ids),
            self._penalties,
            AllowedTokens(max_num_seqs, vocab_size, device),
            self._bad_words,
        )

    def add_row(self, new_row: NewRow) -> None:
        """Give a row to a request, new or resumed; nothing of the row's last request stays.

        `params.seed` must be set, and token ids must be inside the vocabulary.
        """
        params, row = new_row.params, new_row.row
        self._temperature.set(row, 0.0 if params.greedy else params.temperature)
        self._seeds.set(row, 0 if params.greedy or params.seed is None else params.seed)
        self._num_top.pop(row, None)
        if params.logprobs is not None:
            self._num_top[row] = params.logprobs
        self._truncation.add_row(new_row)
        for feature in self._edits:
            feature.add_row(new_row)

    def sample(
        self, logits: torch.Tensor, batch: Batch, masks: TokenMasks | None = None
    ) -> SamplerOutput:
        """Draw one token a row, without waiting for the device.

        Args:
            logits: [batch, vocab] of any float type; float32 ones may be overwritten.
            batch: the row and position of each line of `logits`.
            masks: tokens that some of the rows may draw.
        """
        self._table.upload()
        edits = [feature for feature in self._edits if feature.active(batch)]
        is_edited = bool(edits) or masks is not None
        asked, raw = batch.members(self._num_top.keys()), logits
        if is_edited or not batch.fused:
            logits = logits.float().contiguous()
        if asked and is_edited and logits is raw:  # they are about to be changed
            raw = logits.clone()
        for feature in edits:
            feature.apply(logits, batch)
        if masks is not None:
            masks.apply(logits)
        token_ids = self._draw_fused(logits, batch) if batch.fused else self._draw(logits, batch)
        for history in (self._penalties, self._bad_words):
            if history in edits:
                history.update(token_ids, batch)
        output = SamplerOutput(token_ids)
        if asked:
            self._add_logprobs(output, raw, batch, asked)
        return output

    def _add_logprobs(
        self, output: SamplerOutput, raw: torch.Tensor, batch: Batch, asked: list[int]
    ) -> None:
        rows = [batch.rows[place] for place in asked]
        num_top = [self._num_top[row] for row in rows]
        token_ids, places = output.token_ids, None
        if len(asked) < len(batch.rows):
            places = to_device(asked, self._device)
            token_ids = token_ids[places]
        output.logprobs = gather_logprobs(raw, token_ids, max(num_top), places)
        output.logprob_rows, output.num_top = rows, num_top

    def _draw_fused(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The same as `_draw` in one launch or, if tokens are dropped, two."""
        from engine.kernels.draw import draw

        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        threshold = None
        if self._truncation.active(batch):
            threshold = self._truncation.threshold(logits, batch, self._temperature)
        rows, positions = batch.row_index, batch.position_index
        temperature, seeds = self._temperature.values, self._seeds.values
        return draw(logits, rows, positions, temperature, seeds, threshold)

    def _draw(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Largest logit for greedy rows, a random draw for the others; int64 [batch]."""
        noisy = batch.members(self._temperature.rows)
        if not noisy:
            return logits.argmax(dim=-1)
        token_ids = torch.empty(len(batch.rows), dtype=torch.int64, device=self._device)
        greedy = [
            place for place, row in enumerate(batch.rows) if row not in self._temperature.rows
        ]
        if greedy:
            index = to_device(greedy, self._device)
            token_ids[index] = logits[index].argmax(dim=-1)
        noisy = self._truncation.group(noisy, batch)
        for start in range(0, len(noisy), _CPU_CHUNK_ROWS):
            places = noisy[start : start + _CPU_CHUNK_ROWS]
            index = to_device(places, self._device)
            token_ids[index] = self._draw_random(logits[index], batch.take(places))
        return token_ids

    def _draw_random(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self._words is None:
            self._words = token_words(self._vocab_size, self._device)
        logits.div_(self._temperature.select(batch.row_index))
        if self._truncation.active(batch):
            self._truncation.apply(logits, batch)
        seeds = self._seeds.select(batch.row_index).squeeze(-1)
        return gumbel_argmax(logits, self._words, stream_keys(seeds, batch.position_index))
