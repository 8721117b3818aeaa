"""Which part of each parameter a rank has.

Megatron's partition (Shoeybi et al. 2019, arXiv:1909.08053): a rank has some of the heads and some
of the feed-forward's inner width, and what it adds to the residual stream is summed over the ranks
after attention and after the feed-forward. The model's head is split by rows of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.model_config import ModelConfig
from engine.parallel.group import TensorGroup

_BY_OUTPUT = frozenset(("q_proj", "gate_proj", "up_proj"))
_BY_KV_HEAD = frozenset(("k_proj", "v_proj"))
_BY_INPUT = frozenset(("o_proj", "down_proj"))


def vocabulary_share(vocab_size: int, group: TensorGroup) -> slice:
    """The tokens whose logits a rank computes; the last rank may have fewer than the others."""
    width = math.ceil(vocab_size / group.size)
    first = min(group.rank * width, vocab_size)
    return slice(first, min(first + width, vocab_size))


@dataclass(frozen=True)
class Partition:
    """The parts of a checkpoint's tensors that belong to one rank.

    Args:
        shape: of the whole model.
        group: names the rank.
    """

    shape: ModelConfig
    group: TensorGroup

    def part(self, name: str, sizes: tuple[int, ...]) -> tuple[slice, ...]:
        """Which part of a tensor this rank has.

        Args:
            name: Hugging Face's, such as `model.layers.0.mlp.up_proj.weight`.
            sizes: of the whole tensor.
        """
        if self.group.size == 1:
            return ()
        *_, owner, kind = name.split(".")
        if owner in _BY_KV_HEAD:
            return (self._kv_rows(sizes[0]),)
        if owner == "lm_head":
            return (vocabulary_share(sizes[0], self.group),)
        if owner in _BY_OUTPUT:
            return (self._share(sizes[0]),)
        if owner in _BY_INPUT and kind == "weight":
            return (slice(None), self._share(sizes[1]))
        return ()

    def _share(self, width: int) -> slice:
        each = width // self.group.size
        return slice(self.group.rank * each, (self.group.rank + 1) * each)

    def _kv_rows(self, rows: int) -> slice:
        """Rows of the heads whose groups of queries this rank has."""
        heads, size = self.shape.num_kv_heads, self.group.size
        head_rows = rows // heads
        first, count = self.group.rank * heads // size, max(1, heads // size)
        return slice(first * head_rows, (first + count) * head_rows)
