"""Fills a model's parameters from safetensors, GGUF or a random generator."""
