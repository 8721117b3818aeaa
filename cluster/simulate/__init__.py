"""A fleet in simulated time: the real routing around engines that only take time.

`python -m cluster.simulate` runs it; docs/simulator.md says what its figures can tell.
"""
