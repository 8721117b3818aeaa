"""Normalised and rotated heads and the cache's slots, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from engine.attention.torch_sdpa import TorchAttention
from engine.attention.triton_paged import TritonAttention
from engine.kernels.rotary_cache import rotate_and_store

torch.set_num_threads(1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BLOCKS, BLOCK_SIZE, POSITIONS = 3, 16, 50
SLOTS = [17, 40, 0, 3, 47]
EPS = 1e-5


def rotated(x, positions, table):
    """[tokens, heads, head_dim], float64."""
    cos, sin = table.double()[positions, None].chunk(2, dim=-1)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def normalised(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


class Case:
    def __init__(self, backend, heads, kv_heads, head_dim, dtype, norm, device, slots=SLOTS):
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.dtype = heads, kv_heads, dtype
        tokens = len(slots)
        shape = backend.kv_cache_shape(BLOCKS, BLOCK_SIZE, kv_heads, head_dim)
        self.cache = torch.randn(shape).to(device, dtype)
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
        self.positions = torch.randint(0, POSITIONS, (tokens,))
        self.slots = torch.tensor(slots)
        self.table = torch.randn(POSITIONS, head_dim)
        self.norms = tuple(torch.randn(head_dim).to(dtype) for _ in range(2)) if norm else None
        self.backend, self.device = backend, device

    def run(self):
        norms = None if self.norms is None else tuple(n.to(self.device) for n in self.norms)
        inputs = [t.to(self.device, copy=True) for t in (self.qkv, self.positions, self.slots)]
        caches = self.backend.slots(self.cache)
        table = self.table.to(self.device)
        return rotate_and_store(*inputs, table, caches, self.heads, norms, EPS).cpu()

    def wanted(self):
        merged = self.qkv.double().view(len(self.qkv), self.heads + 2 * self.kv_heads, -1)
        query, key, value = merged.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.norms is not None:
            query, key = normalised(query, self.norms[0]), normalised(key, self.norms[1])
        return *(rotated(x, self.positions, self.table) for x in (query, key)), value

    def check(self):
        before = [view.clone() for view in self.backend.slots(self.cache)]
        query, key, value = self.wanted()
        near = {"rtol": TOLERANCE[self.dtype], "atol": TOLERANCE[self.dtype]}
        torch.testing.assert_close(self.run().double(), query, **near)
        keys, values = (view.cpu() for view in self.backend.slots(self.cache))
        torch.testing.assert_close(keys[self.slots].double(), key, **near)
        assert torch.equal(values[self.slots].double(), value)
        others = torch.ones(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
        others[self.slots] = False
        for after, old in zip((keys, values), before, strict=True):
            assert torch.equal(after[others], old.cpu()[others])


@pytest.mark.parametrize("backend", [TritonAttention(), TorchAttention()], ids=["split", "joint"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk norm"])
@pytest.mark.parametrize("head_dim", [64, 128, 96, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (7, 7)])
def test_rotates_and_stores(heads, kv_heads, head_dim, norm, backend, device):
    Case(backend, heads, kv_heads, head_dim, torch.float32, norm, device).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk norm"])
def test_half_precision(norm, dtype, device):
    Case(TritonAttention(), 5, 2, 64, dtype, norm, device).check()


def test_padding_writes_to_the_null_block_alone(device):
    """Padded rows of a graph share slot 0."""
    case = Case(TritonAttention(), 4, 2, 64, torch.float32, False, device, [20, 0, 0, 0])
    before = case.cache.clone()
    case.run()
    keys, values = case.backend.slots(case.cache)
    torch.testing.assert_close(keys[20].cpu().double(), case.wanted()[1][0])
    touched = (case.cache != before).flatten(2).any(-1)  # [keys and values, blocks]
    assert touched.tolist() == [[True, True, False]] * 2
    changed = (values != case.backend.slots(before)[1]).flatten(1).any(-1)
    assert changed.nonzero().flatten().tolist() == [0, 20]
