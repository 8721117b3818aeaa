"""Decides which tokens of which requests every step computes."""
