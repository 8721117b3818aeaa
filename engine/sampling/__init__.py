"""Sampling on the device, vectorised over rows, one file a feature."""

from engine.sampling.logprobs import prompt_logprobs
from engine.sampling.sampler import Sampler, SamplerOutput

__all__ = ["Sampler", "SamplerOutput", "prompt_logprobs"]
