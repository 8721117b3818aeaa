"""This project's Serve application around an engine that computes nothing.

The one part of the benchmarks that may import `deployments`, Ray and the engine's plain structs.
"""
