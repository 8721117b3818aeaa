"""The decoder-only transformer that every family is an instance of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from engine.attention.backend import AttentionBackend
from engine.layers.attention import SelfAttention, StepContext
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import ModelConfig
from engine.parallel.group import ALONE, TensorGroup
from engine.parallel.partition import vocabulary_share
from engine.parallel.share import share_of


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        rotary: RotaryEmbedding,
        *,
        output_bias: bool,
        qk_norm: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: TensorGroup,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.attention = SelfAttention(
            config,
            rotary,
            output_bias=output_bias,
            qk_norm=qk_norm,
            dtype=dtype,
            device=device,
            group=group,
        )
        self.mlp_norm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.mlp = GatedMLP(config, dtype, device, group)

    def forward(
        self,
        x: torch.Tensor,
        kv_cache: torch.Tensor,
        context: StepContext,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[tokens, hidden] → the same, or only the rows `wanted`."""
        x = self.attention(self.attention_norm(x), x, kv_cache, context, wanted)
        x = self.mlp(self.mlp_norm(x), x)
        return x

    def slots(self) -> dict[str, torch.Tensor]:
        """Parameters by checkpoint name."""
        attention = {f"self_attn.{name}": slot for name, slot in self.attention.slots().items()}
        mlp = {f"mlp.{name}": slot for name, slot in self.mlp.slots().items()}
        return {
            "input_layernorm.weight": self.attention_norm.weight,
            "post_attention_layernorm.weight": self.mlp_norm.weight,
            **attention,
            **mlp,
        }


class CausalLM(nn.Module):
    """Token ids to hidden states to logits. A family sets what it does differently.

    Args:
        config: shape of the checkpoint.
        group: the ranks that share the model.
        dtype: of parameters and activations.
        device: of the parameters, which are not set yet: fill `slots()`, then call `finalize`.
        max_positions: longest sequence.
    """

    output_bias: ClassVar[bool] = True
    """A configured attention bias is on the output projection too."""
    qk_norm: ClassVar[bool] = False
    """Each head of queries and keys is normalised."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        group: TensorGroup = ALONE,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        share = share_of(config, group.size)
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding = torch.empty(vocab, hidden, dtype=dtype, device=device)
        self.rotary = RotaryEmbedding(config, max_positions, dtype, device)
        self.layers = nn.ModuleList(
            DecoderLayer(
                share,
                self.rotary,
                output_bias=self.output_bias,
                qk_norm=self.qk_norm,
                dtype=dtype,
                device=device,
                group=group,
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(hidden, config.rms_norm_eps, dtype=dtype, device=device)
        self._tokens = vocabulary_share(vocab, group)
        """Those whose logits this rank computes."""
        self.head = Linear(
            hidden,
            (0 if config.tie_word_embeddings else self._tokens.stop - self._tokens.start,),
            bias=False,
            dtype=dtype,
            device=device,
        )

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        backend: AttentionBackend,
        metadata: Any,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layers over one step's tokens.

        Args:
            token_ids: int64 [tokens].
            positions: int64 [tokens].
            slots: cache slot of each token, int64 [tokens].
            kv_caches: one a layer.
            backend: attends.
            metadata: what the backend prepared for this step.
            wanted: tokens whose hidden states are wanted, int64 [at least 1]; None for all. Of the
                others the last layer computes keys and values, and nothing after attention.

        Returns:
            Normalised hidden states of the tokens wanted, [tokens, hidden].
        """
        cos_sin = self.rotary.at(positions) if self.rotary.table is None else None
        context = StepContext(positions, slots, cos_sin, backend, metadata)
        x = self.head.padded(functional.embedding(token_ids, self.embedding))
        last = len(self.layers) - 1
        for index, (layer, kv_cache) in enumerate(zip(self.layers, kv_caches, strict=True)):
            x = layer(x, kv_cache, context, wanted if index == last else None)
        normalised: torch.Tensor = self.norm(x)
        return normalised[: len(token_ids if wanted is None else wanted)]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → logits [rows, vocab]."""
        logits: torch.Tensor = self.head(self.head.padded(hidden))[: len(hidden)]
        if self.group.size == 1:
            return logits
        missing = math.ceil(self.config.vocab_size / self.group.size) - logits.shape[1]
        logits = self.group.concatenate(functional.pad(logits, (0, missing)))
        return logits[:, : self.config.vocab_size].contiguous()

    def slots(self) -> dict[str, torch.Tensor]:
        """Where each tensor of a checkpoint goes: Hugging Face name → view of a parameter."""
        found = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        if not self.config.tie_word_embeddings:
            found["lm_head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            found |= {f"model.layers.{index}.{name}": slot for name, slot in layer.slots().items()}
        return found

    def warm_ups(self) -> Iterator[Callable[[], torch.Tensor]]:
        """Calls that compile the kernels of products; they may run in threads of their own."""
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        yield from layer.attention.qkv.warm_ups(adds=False)
        yield from layer.attention.out.warm_ups(adds=True)
        yield from layer.mlp.warm_ups()
        yield from self.head.warm_ups(adds=False)

    def finalize(self) -> None:
        """Make the parameters ready to run, once all slots are filled."""
        if self.config.tie_word_embeddings:
            self.head.weight = self.embedding[self._tokens]
        for module in self.modules():
            if isinstance(module, Linear | RMSNorm):
                module.finalize()
