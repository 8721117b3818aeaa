"""Structured outputs: tokens that a grammar allows, and no others.

xgrammar (Dong et al. 2024, arXiv:2411.15100) turns a grammar into masks over the vocabulary. It
runs in processes of its own, one for each grammar, see `engine.structured_outputs.process`: what
clients send may take for ever to compile or to match, and only a process can be stopped.
"""
