"""The kernels against the code that penalises on the CPU."""

import numpy as np
import pytest
import torch

from engine.sampling.penalties import Penalties
from engine.sampling.rows import Batch, RowTable
from tests.engine.sampling_reference import new_row, params
from tests.engine.test_sampling_edits import PENALTIES

pytest.importorskip("triton")
torch.set_num_threads(1)
CPU = torch.device("cpu")
ROWS = [12, 4, 3, 2, 1, 0]
"""The first row has no penalty and lies beyond the table of seen tokens."""


def penalties(device, vocab_size, tokens):
    """The feature with a row for each kind of penalty."""
    table = RowTable(16, 3, device)
    feature = Penalties(table, 16, vocab_size, device)
    for row, fields, ids in zip(ROWS, PENALTIES[::-1], tokens, strict=True):
        feature.add_row(new_row(row, params(**fields), ids, 10 + row))
    table.upload()
    return feature


def batch_on(device, fused):
    batch = Batch(ROWS, [30] * len(ROWS), device)
    batch.fused = fused
    return batch


@pytest.mark.parametrize("vocab_size", [50, 5001])
def test_penalises_and_counts_as_on_the_cpu(vocab_size, device):
    random = np.random.default_rng(vocab_size)
    tokens = random.integers(0, vocab_size, (len(ROWS), 30)).tolist()
    reference = penalties(CPU, vocab_size, tokens)
    feature = penalties(device, vocab_size, tokens)
    assert len(feature._seen) < ROWS[0]
    for _ in range(3):
        expected = torch.from_numpy(random.normal(0, 3, (len(ROWS), vocab_size))).float()
        logits = expected.to(device, copy=True)
        reference.apply(expected, batch_on(CPU, fused=False))
        feature.apply(logits, batch_on(device, fused=True))
        assert torch.equal(logits.cpu(), expected)
        sampled = torch.from_numpy(random.integers(0, vocab_size, len(ROWS)))
        reference.update(sampled, batch_on(CPU, fused=False))
        feature.update(sampled.to(device), batch_on(device, fused=True))
        assert torch.equal(feature._seen.cpu(), reference._seen)
