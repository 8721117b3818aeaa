"""Hugging Face transformers' `generate`: static batches, padded on the left."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.workloads import Requests

PAD = 0


class TransformersGenerate:
    """`generate` on one static batch after the other, each run to its longest output."""

    def __init__(
        self,
        model: str,
        load_format: str,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        batch_size: int | None = None,
    ) -> None:
        """Load `model`.

        Args:
            model: a directory in Hugging Face layout or a GGUF file.
            load_format: `dummy` draws random weights for the shape in `config.json`.
            dtype: a torch type; `auto` is float32 on CPU and bfloat16 on a GPU.
            attn_implementation: transformers' name of the attention code.
            batch_size: requests in a batch; None takes the workload's own.
        """
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float32" if self._device == "cpu" else "bfloat16"
        settings = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
        self._model = _load(Path(model), load_format, settings).to(self._device).eval()
        # Every request runs to its full length: no token ends it.
        self._model.generation_config.eos_token_id = None
        self._batch_size = batch_size
        self.vocab_size: int = self._model.config.vocab_size

    def run(self, requests: Requests) -> list[list[int]]:
        """Generate batch by batch; tokens past a request's own length are computed and dropped."""
        torch.manual_seed(requests.seed)
        size = self._batch_size or requests.static_batch or len(requests.prompts)
        pairs = list(zip(requests.prompts, requests.outputs, strict=True))
        batches = (pairs[at : at + size] for at in range(0, len(pairs), size))
        return list(itertools.chain.from_iterable(self._run(b, requests) for b in batches))

    def _run(self, batch: list[tuple[list[int], int]], requests: Requests) -> list[list[int]]:
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.full((len(batch), width), PAD)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if requests.temperature:
            sampling = {"do_sample": True, "temperature": requests.temperature, "top_k": 0}
        with torch.inference_mode():
            full = self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max(output for _, output in batch),
                pad_token_id=PAD,
                **sampling,
            )
        tokens = full[:, width:].tolist()
        return [row[:output] for row, (_, output) in zip(tokens, batch, strict=True)]


def _load(model: Path, load_format: str, settings: dict[str, Any]) -> Any:
    if load_format == "dummy":
        config = AutoConfig.from_pretrained(model)
        return AutoModelForCausalLM.from_config(config, **settings)
    if model.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, **settings)
    return AutoModelForCausalLM.from_pretrained(model, **settings)
