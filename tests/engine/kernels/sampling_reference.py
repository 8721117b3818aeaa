"""What the sampling kernels must compute, with the CPU's code."""

import torch

from engine.sampling.gumbel import gumbel_argmax, stream_keys, token_words
from engine.sampling.truncation import by_candidates

CPU = torch.device("cpu")


def drawn(logits, rows, positions, temperature, seeds, threshold=None):
    """Token ids [batch] that torch draws on the CPU, one line at a time."""
    words = token_words(logits.shape[1], CPU)
    token_ids = []
    for place, row in enumerate(rows.tolist()):
        line = logits[place : place + 1].float()
        if temperature[row] == 0:
            token_ids.append(int(line.argmax()))
            continue
        line = line / temperature[row]
        if threshold is not None:
            line = line.masked_fill(line < threshold[place], -torch.inf)
        keys = stream_keys(seeds[row], positions[place : place + 1])
        token_ids.append(int(gumbel_argmax(line, words, keys)))
    return token_ids


def kept(logits, temperature, top_k, top_p, log_min_p):
    """Tokens that the CPU's code keeps of lines that belong to the rows in order, bool."""
    scaled = logits.float() / temperature
    floor = scaled.amax(-1, keepdim=True) + log_min_p
    return scaled >= by_candidates(scaled, top_k, top_p, floor)
