"""The self-attention block: projections, rotary embedding, and the attention backend between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.attention.backend import AttentionBackend
from engine.layers.linear import Linear, SummedLinear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import ModelConfig
from engine.parallel.group import ALONE, TensorGroup


@dataclass(slots=True)
class StepContext:
    """What every layer of one step shares."""

    positions: torch.Tensor
    """int64 [tokens]."""
    slots: torch.Tensor
    """Cache slot of each token, int64 [tokens]."""
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None
    """What `RotaryEmbedding.at` gave; None where a kernel looks it up."""
    backend: AttentionBackend
    metadata: Any
    """What the backend prepared."""


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) over the paged cache.

    Args:
        config: gives the shapes.
        rotary: shared by all layers.
        output_bias: a configured bias is on the output projection too.
        qk_norm: normalise each head of queries and keys before the rotation.
        dtype: of the parameters.
        device: of the parameters.
        group: of the ranks that have the other heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: RotaryEmbedding,
        *,
        output_bias: bool,
        qk_norm: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorGroup = ALONE,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.sliding_window = config.head_dim, config.sliding_window
        self.rotary = rotary
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = config.attention_bias
        hidden = config.hidden_size
        self.qkv = Linear(hidden, (q_size, kv_size, kv_size), bias=bias, dtype=dtype, device=device)
        self.out = SummedLinear(
            group, q_size, hidden, bias=bias and output_bias, dtype=dtype, device=device
        )
        self.norms: tuple[RMSNorm, RMSNorm] | None = None
        if qk_norm:
            eps = config.rms_norm_eps
            self.q_norm = RMSNorm(self.head_dim, eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(self.head_dim, eps, dtype=dtype, device=device)
            self.norms = (self.q_norm, self.k_norm)
        if device.type == "cuda":
            from engine.kernels.rotary_cache import rotate_and_store

            self._fused = rotate_and_store

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        kv_cache: torch.Tensor,
        context: StepContext,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[rows, hidden] → residual plus the block's output, [rows, hidden].

        `residual` may be overwritten. Of the output only the rows `wanted`, if given, are computed.

        Rows below those of the step's tokens are padding: they are not attended.
        """
        num_tokens = len(context.positions)
        qkv = self.qkv(x)[:num_tokens]
        caches = context.backend.slots(kv_cache)
        rotate = self._rotate_and_store if context.cos_sin is not None else self._rotate_fused
        attended = context.backend.attend(
            rotate(qkv, caches, context),
            kv_cache,
            context.metadata,
            self.head_dim**-0.5,
            self.sliding_window,
        )
        attended = attended.reshape(num_tokens, -1)
        if wanted is not None:
            attended, residual = attended[wanted], self.out.padded(residual[wanted])
        return self.out.forward_add(self.out.padded(attended), residual)

    def slots(self) -> dict[str, torch.Tensor]:
        """Parameters by checkpoint name."""
        found = self.qkv.slots("q_proj", "k_proj", "v_proj") | self.out.slots("o_proj")
        if self.norms is not None:
            q_norm, k_norm = self.norms
            found |= {"q_norm.weight": q_norm.weight, "k_norm.weight": k_norm.weight}
        return found

    def _rotate_fused(
        self,
        qkv: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        context: StepContext,
    ) -> torch.Tensor:
        """Like `_rotate_and_store`, in one kernel."""
        assert self.rotary.table is not None
        norms = None if self.norms is None else (self.q_norm.weight, self.k_norm.weight)
        return self._fused(
            qkv,
            context.positions,
            context.slots,
            self.rotary.table,
            caches,
            self.num_heads,
            norms,
            self.q_norm.eps if norms is not None else 0.0,
        )

    def _rotate_and_store(
        self,
        qkv: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        context: StepContext,
    ) -> torch.Tensor:
        """Write keys and values to the cache; returns queries, [tokens, heads, head_dim]."""
        assert context.cos_sin is not None
        heads = qkv.view(len(qkv), -1, self.head_dim)
        num_qk = self.num_heads + self.num_kv_heads
        query_key, value = heads[:, :num_qk], heads[:, num_qk:]
        if self.norms is not None:
            query_key = self._normalise(query_key)
        query_key = self.rotary.rotate(query_key, context.cos_sin)
        keys, values = caches
        keys.index_copy_(0, context.slots, query_key[:, self.num_heads :])
        values.index_copy_(0, context.slots, value)
        return query_key[:, : self.num_heads]

    def _normalise(self, query_key: torch.Tensor) -> torch.Tensor:
        assert self.norms is not None
        q_norm, k_norm = self.norms
        query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        return torch.cat((q_norm(query), k_norm(key)), dim=1)
