"""Structured outputs on a GPU: the CPU's tokens every way, and masks that never wait."""

import json

import pytest
import torch
from jsonschema import validate

from engine.core import EngineCore
from engine.model_source import resolve_model
from engine.sampling import Sampler
from engine.sampling.rows import Batch
from engine.sampling.token_masks import TokenMasks
from engine.structured_outputs.constraints import Constraints
from engine.structured_outputs.grammar import GrammarHost
from engine.structured_outputs.messages import Setup
from engine.tokenizer import Tokenizer
from tests.engine.byte_model import EOS, write_byte_model
from tests.engine.conftest import TINY_LLAMA, run_core, tiny_config
from tests.engine.gpu import needs_gpu
from tests.engine.sampling_reference import new_row, params
from tests.engine.test_structured_outputs import JSON, SCHEMA, WAYS, mixed, wire

pytestmark = needs_gpu
VOCAB = 152_064
CUDA = torch.device("cuda")
CUDA_WAYS = WAYS | {"not ahead": {"async_scheduling": False}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model as a checkpoint, so that CPU and GPU run the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("bytes") / "model"
    write_byte_model(folder)
    torch.manual_seed(0)
    sizes = {k: v for k, v in TINY_LLAMA.items() if k not in ("architectures", "torch_dtype")}
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def host(model):
    return GrammarHost(Setup(model, TINY_LLAMA["vocab_size"], (EOS,)))


def build_core(model, host, device, **options):
    defaults = {
        "device": device,
        "dtype": "float32",
        "load_format": "auto",
        "kvcache_block_size": 16,
    }
    core = EngineCore(tiny_config(model, **{**defaults, **options}))
    core.constraints = Constraints(host, (EOS,), pin_memory=device == "cuda")
    return core


@pytest.fixture(scope="module")
def on_cpu_alone(model, host):
    """Each request by itself on the CPU."""
    return run_core(build_core(model, host, "cpu", max_num_seqs=1), mixed(), 10**6)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("way", CUDA_WAYS)
def test_same_tokens_every_way(model, host, on_cpu_alone, way, graphs):
    core = build_core(model, host, "cuda", enforce_eager=not graphs, **CUDA_WAYS[way])
    assert run_core(core, mixed(), 10**6) == on_cpu_alone
    if "preemption" in way:
        assert core.load().num_preemptions > 0


def test_many_rows_of_few_and_many_grammars(model, host):
    core = build_core(model, host, "cuda", max_num_seqs=128, num_kvcache_blocks=2048)
    forms = [{"regex": f"{i}(ab|12)*x"} if i < 32 else JSON for i in range(96)]
    wires = [
        wire(f"r{i}", form, temperature=1.0, seed=i, max_tokens=200) for i, form in enumerate(forms)
    ]
    outputs = run_core(core, wires, 10**6)
    tokenizer = Tokenizer.load(resolve_model(model))
    for each in wires[32:]:
        tokens, reason = outputs[each.request_id]
        assert reason == "stop"
        validate(json.loads(tokenizer.decode(tokens)), SCHEMA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1, "logprobs": 2}],
)
def test_masks_never_wait_for_the_device(options, dtype):
    rows, places = list(range(64)), list(range(0, 64, 2))
    sampler = Sampler(64, VOCAB, CUDA)
    for row in rows:
        sampler.add_row(new_row(row, params(**options, seed=row), [1, 2, 3], 3))
    logits = torch.randn(64, VOCAB, device=CUDA).to(dtype)
    index = torch.tensor(rows, device=CUDA)
    masks = TokenMasks.allocate(places, VOCAB, pin_memory=True)
    masks.bits.zero_()
    masks.bits[:, 100] = 0b1010  # tokens 3201 and 3203
    masks.bits[0, 100] = 0b1000  # one token only
    for step in range(2):  # kernels are compiled in the first
        batch = Batch(rows, [4 + step] * 64, CUDA, index, index * 0 + 4 + step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            output = sampler.sample(logits.clone(), batch, masks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    drawn = output.token_ids.tolist()
    assert {drawn[place] for place in places} <= {3201, 3203}
    assert drawn[0] == 3203
    assert len({drawn[place] for place in range(1, 64, 2)} - {3201, 3203}) > 1
