import pytest
import torch

pytest.importorskip("triton")

from engine.kernels.tokens import take_tokens

torch.set_num_threads(1)


@pytest.mark.parametrize("count", [1, 7, 256, 600])
def test_takes_known_tokens_and_sampled_ones(count, device):
    torch.manual_seed(count)
    known, sampled = torch.randint(0, 2**40, (count,)), torch.randint(0, 2**40, (9,))
    sources = torch.randint(-1, 9, (count,))
    wanted = torch.where(sources < 0, known, sampled[sources])
    taken = take_tokens(*(tensor.to(device) for tensor in (known, sources, sampled)))
    assert taken.dtype == torch.int64
    assert taken.tolist() == wanted.tolist()


def test_all_or_none_are_known(device):
    known, sampled = torch.tensor([5, 6, 7]), torch.tensor([8, 9])
    for sources, wanted in (([-1, -1, -1], [5, 6, 7]), ([1, 0, 1], [9, 8, 9])):
        arguments = (known, torch.tensor(sources), sampled)
        assert take_tokens(*(tensor.to(device) for tensor in arguments)).tolist() == wanted
