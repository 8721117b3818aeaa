"""The same requests without a server: `LLM.generate`, with as many at a time as there are clients.

    python -m benchmarks.serving.reference JOB

JOB is JSON. Started by `benchmarks.serving.http_table`; a process that ends frees the GPU.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.engines import Engine, EngineSpec
from benchmarks.serving.conversations import Mix
from benchmarks.workloads import Requests

WARM_UP_TOKENS = 16
"""Output of each of the requests that run, untimed, before: as many as run at a time."""


def main() -> None:
    """Print one line of JSON: requests, tokens, seconds, tokens a second, and the engine."""
    job = json.loads(sys.argv[1])
    requests = draw(job)
    # The adapter turns the prefix cache off; a server has it on.
    options = {"enable_prefix_caching": True, **job["engine"], "max_num_seqs": job["clients"]}
    model = str(options.pop("model"))
    load_format = str(options.pop("load_format"))
    begin = time.perf_counter()
    engine = EngineSpec("trunkline", "trunkline", options).load(model, load_format)
    start_seconds = time.perf_counter() - begin
    figures = measure(engine, requests, job["clients"])
    figures |= {"start_seconds": round(start_seconds, 2), "engine": engine.describe()}
    print(json.dumps({"clients": job["clients"], **figures}))


def draw(job: dict[str, Any]) -> Requests:
    """The requests that `benchmarks.serving run` puts on a server, as token ids.

    Args:
        job: `input` and `output` (least and most tokens), `seed`, `requests`, `temperature`, and
            `tokenizer`, a file.
    """
    tokenizer = Tokenizer.from_file(str(Path(job["tokenizer"])))
    mix = Mix(tuple(job["input"]), tuple(job["output"]))
    conversations = list(islice(mix.draw(job["seed"]), job["requests"]))
    texts = [each.prefix + each.turns[0].text for each in conversations]
    return Requests(
        [encoding.ids for encoding in tokenizer.encode_batch(texts)],
        [each.turns[0].output_tokens for each in conversations],
        job["temperature"],
        job["seed"],
    )


def measure(engine: Engine, requests: Requests, at_once: int) -> dict[str, Any]:
    """Time one run, after a warm-up with as many at once and other prompts.

    Raises:
        RuntimeError: the engine made another number of tokens than was asked for.
    """
    warm_up = requests.first(at_once, WARM_UP_TOKENS)
    warm_up.prompts = [prompt[::-1] for prompt in warm_up.prompts]  # or they would be cached
    engine.run(warm_up)
    begin = time.perf_counter()
    outputs = engine.run(requests)
    seconds = time.perf_counter() - begin
    tokens = sum(map(len, outputs))
    if tokens != requests.output_tokens:
        raise RuntimeError(f"the engine made {tokens} tokens, not {requests.output_tokens}")
    return {
        "requests": len(outputs),
        "input_tokens": requests.input_tokens,
        "output_tokens": tokens,
        "seconds": round(seconds, 3),
        "output_tok_s": round(tokens / seconds, 1),
    }


if __name__ == "__main__":
    main()
