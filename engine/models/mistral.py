"""Mistral 7B (arXiv:2310.06825) and its successors of the same shape."""

from __future__ import annotations

from engine.models.causal_lm import CausalLM


class MistralForCausalLM(CausalLM):
    """Llama's decoder, with a sliding window where the checkpoint has one."""
