"""Llama 2 and 3 (arXiv:2302.13971, arXiv:2407.21783), and what follows their shape: SmolLM2."""

from __future__ import annotations

from engine.models.causal_lm import CausalLM


class LlamaForCausalLM(CausalLM):
    """The plain decoder: RMSNorm, rotary embeddings, grouped-query attention, gated MLP."""
