"""Bad words: the last token of a sequence is ruled out right after the ones before it."""

from __future__ import annotations

import torch

from engine.sampling.rows import RELUCTANCE, Batch, to_device
from engine.sampling_params import MAX_BAD_WORD_TOKENS
from engine.step import NewRow

_PREFIX = MAX_BAD_WORD_TOKENS - 1
"""Tokens before the last one; a row remembers as many of its output."""
_ANY = -1
"""In a prefix: whatever stands there, as the word is shorter."""
_NOTHING = -2
"""In an output: it has not begun yet."""
_NEVER = -3
"""In a prefix: no output has it."""


class BadWords:
    """`SamplingParams.bad_words_token_ids` of every row, and the last tokens of its output.

    What was sampled last stays on the device, where the next step compares it with the prefixes of
    all words at once. The table widens as rows with more words come.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        shape = (num_rows, 0, MAX_BAD_WORD_TOKENS)
        self._words = torch.empty(shape, dtype=torch.int32, device=device)
        self._tails = torch.empty((num_rows, _PREFIX), dtype=torch.int32, device=device)
        self.rows: set[int] = set()
        """Rows that have bad words."""

    def add_row(self, new: NewRow) -> None:
        """Take over a row for a request, with the output tokens that it brings."""
        self.rows.discard(new.row)
        spellings = new.params.bad_words_token_ids
        if not spellings:
            return
        self.rows.add(new.row)
        if len(spellings) > self._words.shape[1]:
            self._widen(len(spellings))
        words = [[_ANY] * (MAX_BAD_WORD_TOKENS - len(ids)) + [*ids] for ids in spellings]
        words += [_unused()] * (self._words.shape[1] - len(words))
        flat = [token for word in words for token in word]
        self._words[new.row] = to_device(flat, self._device, torch.int32).view(len(words), -1)
        tail = new.token_ids[new.num_prompt_tokens :][-_PREFIX:]
        tail = [_NOTHING] * (_PREFIX - len(tail)) + tail
        self._tails[new.row] = to_device(tail, self._device, torch.int32)

    def _widen(self, count: int) -> None:
        rows, width, _ = self._words.shape
        missing = (1 << (count - 1).bit_length()) - width
        unused = to_device(_unused(), self._device, torch.int32)
        self._words = torch.cat([self._words, unused.expand(rows, missing, -1)], dim=1)

    def active(self, batch: Batch) -> bool:
        """Whether any row of the batch has bad words."""
        return batch.uses(self.rows)

    def apply(self, logits: torch.Tensor, batch: Batch) -> None:
        """Rule out, in the logits [batch, vocab], the tokens that would complete a bad word."""
        places = batch.members(self.rows)
        rows = batch.take(places).row_index
        words = self._words[rows]  # [places, words, tokens]
        prefixes = words[..., :-1]
        fits = (prefixes == self._tails[rows][:, None]) | (prefixes == _ANY)
        starts = to_device([place * self._vocab_size for place in places], self._device)
        last = (words[..., -1] + starts[:, None]).view(-1)
        flat = logits.view(-1)
        # Words may share their last token, which is ruled out if any of them ends with it here.
        lower = torch.where(fits.all(dim=-1).view(-1), flat[last] - RELUCTANCE, torch.inf)
        flat.scatter_reduce_(0, last, lower, "amin")

    def update(self, token_ids: torch.Tensor, batch: Batch) -> None:
        """Remember the tokens [batch] that the batch has just sampled, on the device."""
        places = batch.members(self.rows)
        rows = batch.take(places).row_index
        sampled = token_ids[to_device(places, self._device)].to(torch.int32)
        self._tails[rows] = torch.cat([self._tails[rows][:, 1:], sampled[:, None]], dim=1)


def _unused() -> list[int]:
    """A word that no output completes; its last token only needs to exist."""
    return [_NEVER] * _PREFIX + [0]
