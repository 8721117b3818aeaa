"""Measurements of this project beside its peers, over its public interfaces alone."""
