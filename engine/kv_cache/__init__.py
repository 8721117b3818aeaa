"""Blocks of the paged KV cache: who holds them, and which hold known tokens."""
