import numpy as np
import pytest
import torch

from engine.runner.staging import Staging
from tests.engine.gpu import DEVICES, needs_gpu


def arrays(value):
    """Of all kinds that a step has, an empty one included."""
    return [
        np.full(5, value, dtype=np.int64),
        np.full((3, 7), value + 1, dtype=np.int32),
        np.zeros(0, dtype=np.int32),
        np.arange(value, value + 2, dtype=np.int64),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_uploads_what_it_is_given(device):
    staging = Staging(1000, torch.device(device))
    for value in range(5):
        wanted = arrays(value)
        tensors = staging.upload(wanted)
        for tensor, array in zip(tensors, wanted, strict=True):
            assert tensor.device.type == device
            assert tensor.numpy(force=True).dtype == array.dtype
            assert np.array_equal(tensor.numpy(force=True), array)


@pytest.mark.parametrize("device", DEVICES)
def test_takes_arrays_that_are_not_contiguous(device):
    table = np.arange(24, dtype=np.int32).reshape(4, 6)
    staging = Staging(1000, torch.device(device))
    for part in (table[:, :3], table[::2], table.T):
        assert staging.upload([part])[0].tolist() == part.tolist()


class TestOnGPU:
    pytestmark = needs_gpu

    def test_the_same_shapes_lie_at_the_same_aligned_addresses(self):
        staging = Staging(1000, torch.device("cuda"))
        first = [tensor.data_ptr() for tensor in staging.upload(arrays(1))]
        for value in range(4):
            assert [tensor.data_ptr() for tensor in staging.upload(arrays(value))] == first
        assert all(address % 16 == 0 for address in first)

    def test_uploads_behind_a_busy_device_keep_their_values(self):
        """More of them than there are host buffers, before the device has begun with the first."""
        staging = Staging(1000, torch.device("cuda"))
        staging.upload(arrays(0))
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)  # cycles: some tens of milliseconds
        taken = [staging.upload(arrays(value))[0].clone() for value in range(8)]
        assert [tensor.tolist() for tensor in taken] == [[value] * 5 for value in range(8)]

    def test_a_full_buffer(self):
        staging = Staging(64, torch.device("cuda"))
        wanted = [np.arange(4), np.arange(4, 8)]
        assert [tensor.tolist() for tensor in staging.upload(wanted)] == [
            array.tolist() for array in wanted
        ]
