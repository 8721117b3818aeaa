"""Qwen3 (arXiv:2505.09388)."""

from __future__ import annotations

from engine.models.causal_lm import CausalLM


class Qwen3ForCausalLM(CausalLM):
    """Llama's decoder with normalised queries and keys, and a head size of its own."""

    qk_norm = True
