"""Hugging Face transformers' `generate`: static batches, padded on the left."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.engines import Engine
from benchmarks.workloads import Requests

PAD = 0


class TransformersGenerate(Engine):
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
        self._model = _load(Path(model), load_format, settings, self._device).eval()
        # Every request runs to its full length: no token ends it.
        self._model.generation_config.eos_token_id = None
        self._batch_size = batch_size
        self.vocab_size: int = self._model.config.vocab_size

    def run(self, requests: Requests) -> list[list[int]]:
        """Generate batch by batch; tokens past a request's own length are computed and dropped."""
        torch.manual_seed(requests.seed)
        size = self._batch_size or requests.static_batch or len(requests.prompts)
        size = 1 if requests.batching == "single" else size
        return list(itertools.chain.from_iterable(map(self._run, requests.split(size))))

    def _run(self, requests: Requests) -> list[list[int]]:
        width = max(map(len, requests.prompts))
        ids = torch.full((len(requests.prompts), width), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(requests.prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if requests.temperature:
            sampling = {"do_sample": True, "temperature": requests.temperature, "top_k": 0}
        with torch.inference_mode():
            full = self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max(requests.outputs),
                pad_token_id=PAD,
                **sampling,
            )
        tokens = full[:, width:].tolist()
        return [row[:size] for row, size in zip(tokens, requests.outputs, strict=True)]


def _load(model: Path, load_format: str, settings: dict[str, Any], device: str) -> Any:
    """Dummy weights are drawn where they will be used: on the host that takes minutes."""
    if load_format == "dummy":
        with torch.device(device):
            config = AutoConfig.from_pretrained(model)
            return AutoModelForCausalLM.from_config(config, **settings)
    if model.suffix == ".gguf":
        settings = {"gguf_file": model.name, **settings}
        model = model.parent
    return AutoModelForCausalLM.from_pretrained(model, **settings).to(device)
