"""The sampler as on CUDA, on any device, and batches for it: one option each for rows in turn."""

from engine.sampling.rows import Batch

EOS = (2, 3)
PENALISED = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.6}
BATCHES = {
    "greedy": [{"temperature": 0.0}],
    "plain": [{}, {"temperature": 0.0, "top_p": 0.1}, {"temperature": 0.3}],
    "truncated": [{"top_k": 7}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.05}, {}],
    "penalised": [PENALISED, {**PENALISED, "temperature": 0.0}, {}],
    "logprobs": [{"logprobs": 3}, {"logprobs": 0, "temperature": 0.0}, {}],
    "ruled out": [
        {"allowed_token_ids": [*range(3, 40)], "bad_words_token_ids": [[9], [5, 6]]},
        {"bad_words_token_ids": [[i, i + 1] for i in range(30)], "top_p": 0.9},
        {"allowed_token_ids": [7, 8], "temperature": 0.0},
    ],
    "everything": [
        {**PENALISED, "top_p": 0.9, "top_k": 40, "logprobs": 2},
        {"logit_bias": {5: 4.0, 129: -3.0}, "min_tokens": 5, "logprobs": 5},
        {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": [7]},
    ],
}


def fused_sample(sampler, logits, rows, positions):
    batch = Batch(rows, positions, logits.device)
    batch.fused = True
    return sampler.sample(logits, batch)
