"""The offline API on the bundled model."""

import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import LLM, ConfigError, InferenceEngine, InvalidRequest, SamplingParams
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.weights.gguf import read_gguf

GREEDY = {"temperature": 0.0}
PARIS = "The capital of France is"
REPEATING = "one two one two one two one two one two one two one two one two"


@pytest.fixture(scope="module")
def llm():
    return LLM(max_num_seqs=16, cpu_threads=1)


def greedy(llm, prompt, **params):
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params})
    return llm.generate(prompt, params, use_tqdm=False)[0]


def test_prompt_kinds_agree(llm):
    ids = llm.tokenizer.encode(PARIS)
    text = greedy(llm, PARIS)
    assert "Paris" in text.text
    assert text.prompt == PARIS
    assert text.prompt_token_ids == ids
    assert text.finished and text.tokens == text.outputs[0].token_ids
    for prompt in ({"prompt": PARIS}, {"prompt_token_ids": ids}, [PARIS]):
        assert greedy(llm, prompt).outputs == text.outputs


def test_results_come_in_the_prompts_order_each_with_its_params(llm):
    prompts = ["Once upon a time", PARIS, "def add(a, b):"]
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (20, 3, 9)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.tokens) for o in outputs] == [20, 3, 9]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length"] * 3


def test_chat_uses_the_template_and_stops_at_its_end_token(llm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    one = llm.chat(messages, SamplingParams(**GREEDY), use_tqdm=False)
    assert "Paris" in one[0].text
    assert one[0].outputs[0].finish_reason == "stop"
    assert one[0].tokens[-1] == 2
    assert "<|im_end|>" not in one[0].text
    two = llm.chat([messages, messages], SamplingParams(**GREEDY), use_tqdm=False)
    assert [o.text for o in two] == [one[0].text] * 2


def test_chat_takes_the_options_of_templates(llm):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The capital"}]
    greedy_params = SamplingParams(temperature=0.0, max_tokens=4)

    def prompt(**options):
        (output,) = llm.chat(messages, greedy_params, use_tqdm=False, **options)
        return llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    assert prompt().endswith("<|im_start|>assistant\n")
    assert prompt(add_generation_prompt=False).endswith("The capital<|im_end|>\n")
    continued = prompt(add_generation_prompt=False, continue_final_message=True)
    assert continued.endswith("<|im_start|>assistant\nThe capital")
    template = "{{ messages[1].content }} of {{ country }}{{ tools | length }}"
    options = {"chat_template_kwargs": {"country": "France"}, "tools": [{"type": "function"}]}
    assert prompt(chat_template=template, **options) == "The capital of France1"
    with pytest.raises(InvalidRequest, match="excludes add_generation_prompt"):
        prompt(continue_final_message=True)


def test_stop_string_across_tokens_is_cut_and_the_engine_is_told(llm):
    full = greedy(llm, PARIS, max_tokens=30)
    assert len(full.tokens) == 30
    stop = full.text[9:16]
    for include in (False, True):
        output = greedy(
            llm, PARIS, max_tokens=30, stop=stop, include_stop_str_in_output=include
        ).outputs[0]
        assert output.finish_reason == "stop"
        assert output.stop_reason == stop
        assert output.text == full.text[: full.text.index(stop) + len(stop) * include]
    assert llm.core.load().num_running == 0
    assert llm.core.load().free_blocks == llm.core.info.num_blocks - 1


def test_n_gives_distinct_reproducible_completions(llm):
    params = SamplingParams(n=4, seed=3, max_tokens=16, temperature=1.0)
    first, second = (llm.generate("Hello", params, use_tqdm=False)[0] for _ in range(2))
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]
    assert len({o.text for o in first.outputs}) > 1
    assert first.outputs == second.outputs
    unseeded = [
        llm.generate("Hello", SamplingParams(max_tokens=16), use_tqdm=False)[0].text
        for _ in range(3)
    ]
    assert len(set(unseeded)) > 1


@pytest.fixture(scope="module")
def reference():
    """Transformers' model; its own reader of weights, which test_weights.py tries, is slow."""
    source = resolve_model("smollm2-135m-instruct")
    config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing = model.load_state_dict(
        dict(read_gguf(source.path, read_model_config(source))), strict=False
    )
    assert missing == (["lm_head.weight"], [])  # it is that of the embedding
    return model


@torch.inference_mode()
def test_embeddings_equal_transformers(llm, reference):
    texts = [PARIS, REPEATING, "Paris"]
    for pooling in ("last", "mean"):
        outputs = llm.embed(texts, pooling=pooling, normalize=False, use_tqdm=False)
        for text, output in zip(texts, outputs, strict=True):
            assert output.prompt == text
            hidden = reference.model(torch.tensor([output.prompt_token_ids])).last_hidden_state[0]
            wanted = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
            found = torch.tensor(output.outputs.embedding)
            assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
            normalized = llm.embed(text, pooling=pooling, use_tqdm=False)[0].outputs.embedding
            assert normalized == pytest.approx((wanted / wanted.norm()).tolist(), abs=1e-4)


def test_logprobs_equal_transformers(llm, reference):
    output = greedy(llm, PARIS, logprobs=3, prompt_logprobs=2)
    ids = output.prompt_token_ids + output.tokens
    with torch.inference_mode():
        wanted = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    num_prompt = len(output.prompt_token_ids)
    found = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    assert found[0] is None
    for position in range(1, len(ids)):
        entry = found[position]
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(wanted[position - 1, token].item(), abs=1e-4)
        assert ids[position] in entry
        assert len(entry) >= (2 if position < num_prompt else 3)
        rank = 1 + int((wanted[position - 1] > wanted[position - 1, ids[position]]).sum())
        assert entry[ids[position]].rank == rank
        assert entry[ids[position]].decoded_token == llm.tokenizer.token_text(ids[position])
    total = sum(e[t].logprob for e, t in zip(found[num_prompt:], output.tokens, strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_text_may_be_left_out(llm):
    plain = greedy(llm, PARIS, logprobs=1)
    bare = greedy(llm, PARIS, logprobs=1, detokenize=False)
    assert (bare.text, bare.tokens) == ("", plain.tokens)
    assert all(
        entry.decoded_token is None for e in bare.outputs[0].logprobs for entry in e.values()
    )


def test_bad_words_and_allowed_tokens_act(llm):
    assert "Paris" not in greedy(llm, PARIS, bad_words=["Paris"]).text
    ids = llm.tokenizer.encode(" Rome Berlin")
    assert {*greedy(llm, PARIS, allowed_token_ids=ids).tokens} <= {*ids}


def test_penalties_and_bias_act(llm):
    plain = greedy(llm, REPEATING, max_tokens=16)
    assert len(set(plain.tokens)) < 8
    varied = greedy(llm, REPEATING, max_tokens=16, frequency_penalty=2.0)
    assert len(set(varied.tokens)) > len(set(plain.tokens))
    token = plain.tokens[0]
    assert token not in greedy(llm, REPEATING, logit_bias={token: -100.0}).tokens


def test_stream_yields_the_same_text_and_closing_it_frees(llm):
    full = greedy(llm, PARIS, max_tokens=24)
    deltas = list(llm.stream(PARIS, SamplingParams(temperature=0.0, max_tokens=24)))
    assert len(deltas) > 10
    assert "".join(d.text for d in deltas) == full.text
    assert deltas[-1].finish_reason == "length"
    stream = llm.stream(PARIS, SamplingParams(temperature=0.0, max_tokens=200))
    next(stream)
    stream.close()
    assert llm.core.load().num_running == 0
    assert llm.core.load().free_blocks == llm.core.info.num_blocks - 1


def test_streams_and_calls_may_take_turns(llm):
    wanted = [greedy(llm, p, max_tokens=16).text for p in (PARIS, REPEATING, "Hello")]
    params = SamplingParams(temperature=0.0, max_tokens=16)
    first, second = llm.stream(PARIS, params), llm.stream(REPEATING, params)
    texts = [next(first).text, next(second).text]
    third = greedy(llm, "Hello", max_tokens=16).text
    for a, b in itertools.zip_longest(first, second):
        texts[0] += a.text if a else ""
        texts[1] += b.text if b else ""
    assert [*texts, third] == wanted


def test_unseeded_calls_repeat_with_the_engines_seed(tiny_model):
    def draw(seed):
        llm = LLM(
            tiny_model, load_format="dummy", seed=seed, num_kvcache_blocks=64, max_model_len=128
        )
        prompt = {"prompt_token_ids": [1, 2, 3]}
        params = SamplingParams(ignore_eos=True, max_tokens=8)
        return [llm.generate(prompt, params, use_tqdm=False)[0].tokens for _ in range(2)]

    first = draw(5)
    assert first == draw(5)
    assert first[0] != first[1]


def test_progress_bar_shows_both_rates(llm, capsys):
    llm.generate([PARIS] * 3, SamplingParams(max_tokens=4))
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "prefill" in shown and "decode" in shown and "tok/s" in shown


def test_inference_engine(llm, monkeypatch):
    monkeypatch.setattr("engine.inference_engine.LLM", lambda path, **options: llm)
    engine = InferenceEngine(model_path="smollm2-135m-instruct")
    results = engine.generate([PARIS, PARIS], max_tokens=8, temperature=0.0)
    assert [sequence.prompt for sequence in results] == [PARIS, PARIS]
    assert set(results.values()) == {greedy(llm, PARIS, max_tokens=8).text}
    pairs = list(engine.stream_generate(PARIS, 8, temperature=0.0))
    assert [token for token, _ in pairs] == greedy(llm, PARIS, max_tokens=8).tokens
    assert "".join(text for _, text in pairs) == greedy(llm, PARIS, max_tokens=8).text


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("", {}, "prompt"),
        ({"prompt_token_ids": []}, {}, "prompt"),
        ({"prompt_token_ids": [10**6]}, {}, "prompt"),
        ({"prompt_token_ids": [1] * 5000}, {}, "prompt"),
        ({"text": "x"}, {}, "prompt"),
        ("x", {"n": 0}, "n"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"temperature": math.nan}, "temperature"),
        ("x", {"logit_bias": {10**6: 1.0}}, "logit_bias"),
    ],
)
def test_bad_input_names_the_field_and_the_next_call_works(llm, prompt, params, field):
    with pytest.raises(InvalidRequest) as caught:
        llm.generate([PARIS, prompt], SamplingParams(**params), use_tqdm=False)
    assert caught.value.param == field
    assert "Paris" in greedy(llm, PARIS, max_tokens=2).text


def test_bad_params_count(llm):
    with pytest.raises(InvalidRequest, match="2 entries for 1 prompts"):
        llm.generate(PARIS, [SamplingParams()] * 2, use_tqdm=False)


def test_chat_without_template(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    llm.tokenizer.__dict__.pop("_own_template", None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hi"}], use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "/no/such/model"}, "not found"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"max_nun_seqs": 4}, "did you mean 'max_num_seqs'"),
        ({"gpu_memory_utilization": 0.01}, "gpu_memory_utilization"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"device": "cuda"}, "GPU"),
    ],
)
def test_bad_options_name_the_field(options, words):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=words):
        LLM(**options)


def test_without_a_tokenizer(tiny_model):
    llm = LLM(tiny_model, load_format="dummy", num_kvcache_blocks=64, max_model_len=128)
    prompt = {"prompt_token_ids": [1, 2, 3]}
    output = llm.generate(prompt, SamplingParams(ignore_eos=True), use_tqdm=False)[0]
    assert len(output.tokens) == 64
    with pytest.raises(ConfigError, match="no tokenizer"):
        _ = llm.tokenizer
