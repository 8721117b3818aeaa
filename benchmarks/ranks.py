"""Whether ranks that share a model give the tokens that one GPU gives.

    python -m benchmarks.ranks --model qwen2.5-7b --ranks 2

The same greedy requests, first on one GPU, then on several. Sums over ranks are rounded otherwise
than those of one GPU, so near-ties may fall the other way: as in vLLM's tests, where two outputs
part, each one's token must be among the other's likeliest ones; beyond that they are not compared.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.models import find_model, read_vocab_size
from benchmarks.workloads import FIRST_TOKEN
from engine import LLM, SamplingParams

_LIKELIEST = 5
"""Tokens of which each one's must be among the other's."""
Output = list[tuple[int, dict[int, float]]]
"""Tokens of a request, each with the log-probabilities of the likeliest ones at its place."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(words)
    started = datetime.now(UTC)
    alone, together = generate(options, 1), generate(options, options.ranks)
    pairs = [compare(*pair) for pair in zip(alone, together, strict=True)]
    document = {
        **describe_run("benchmarks.ranks", options.words, started),
        "model": options.model,
        "ranks": options.ranks,
        "dtype": options.dtype,
        "requests": len(pairs),
        "tokens": options.tokens,
        "records": pairs,
        "summary": summary(pairs),
    }
    out = options.out or results.FOLDER / f"ranks-{Path(options.model).name}.json"
    results.write(document, out)
    print(out, document["summary"])


def generate(options: argparse.Namespace, ranks: int) -> list[Output]:
    """The requests' tokens from an engine of so many ranks."""
    llm = LLM(
        model=find_model(options.model),
        load_format=options.load_format,
        dtype=options.dtype,
        tensor_parallel_size=ranks,
        max_model_len=options.longest + options.tokens,
        max_num_seqs=options.requests,
        gpu_memory_utilization=options.memory,
    )
    draw = random.Random(0)
    vocabulary = range(FIRST_TOKEN, read_vocab_size(options.model))
    prompts: list[Any] = [
        {"prompt_token_ids": draw.choices(vocabulary, k=draw.randint(1, options.longest))}
        for _ in range(options.requests)
    ]
    params = SamplingParams(
        temperature=0.0, max_tokens=options.tokens, ignore_eos=True, logprobs=_LIKELIEST
    )
    outputs = [_tokens(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    del llm  # a process has room for one engine of several ranks
    gc.collect()
    return outputs


def _tokens(output: Any) -> Output:
    completion = output.outputs[0]
    likeliest = [{t: p.logprob for t, p in place.items()} for place in completion.logprobs]
    return list(zip(completion.token_ids, likeliest, strict=True))


def compare(alone: Output, together: Output) -> dict[str, Any]:
    """Where two outputs part, whether they are close there, and the largest difference before."""
    same = 0
    difference = 0.0
    for (token, one), (other, several) in zip(alone, together, strict=True):
        if token != other:
            close = token in several and other in one
            return {"same_tokens": same, "parts": True, "close": close, "difference": difference}
        same += 1
        difference = max(difference, abs(one[token] - several[token]))
    return {"same_tokens": same, "parts": False, "close": True, "difference": difference}


def summary(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all requests."""
    return {
        "equal": sum(not pair["parts"] for pair in pairs),
        "close": sum(pair["close"] for pair in pairs),
        "of": len(pairs),
        "largest_difference": max(pair["difference"] for pair in pairs),
    }


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.ranks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help="name of a shape, or a model directory")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="dummy")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="float32 leaves few near-ties")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of each output")
    parser.add_argument("--memory", type=float, default=0.45, help="gpu_memory_utilization")
    parser.add_argument("--out", type=Path, help="file to write, in benchmarks/results if unset")
    parser.set_defaults(words=list(sys.argv[1:] if words is None else words))
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
