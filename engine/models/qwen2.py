"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115)."""

from __future__ import annotations

from engine.models.causal_lm import CausalLM


class Qwen2ForCausalLM(CausalLM):
    """Llama's decoder with a bias on the q, k and v projections (`ModelConfig.attention_bias`)."""

    output_bias = False
