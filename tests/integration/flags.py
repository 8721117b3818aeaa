"""The flags of Ray Serve under which servers of tests are started, as parameters of fixtures."""

import pytest

FLAGS = [
    pytest.param(False, id="default-flags", marks=pytest.mark.slow),
    pytest.param(True, id="fast-path"),
]
"""Whether with those that `make serve` and all manifests set. Without them is for `make test-slow`;
`make test` tries that in test_plane.py, where clients leave as well."""
