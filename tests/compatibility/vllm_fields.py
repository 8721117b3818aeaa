"""The fields of the requests that vLLM's server takes, read from its protocol modules in late 2026.

They are read by hand, as vLLM is none of this project's dependencies.
"""

from __future__ import annotations


def _named(names: str) -> frozenset[str]:
    return frozenset(names.split())


_BOTH = _named(
    """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty response_format seed
    stop stream stream_options temperature top_p user
    use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
    logprob_token_ids allowed_token_ids bad_words
    echo add_special_tokens structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
    return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection thinking_token_budget stream_interval
    """
)
_OLDER = _named(
    """
    best_of guided_json guided_regex guided_choice guided_grammar guided_whitespace_pattern
    guided_decoding_backend structural_tag logits_processors
    """
)
"""Fields that vLLM had until 2025, and that clients still send."""

COMPLETION = _BOTH | _OLDER | _named("prompt suffix prompt_embeds")
CHAT = (
    _BOTH
    | _OLDER
    | _named(
        """
        messages top_logprobs max_completion_tokens tools tool_choice parallel_tool_calls
        reasoning_effort include_reasoning add_generation_prompt continue_final_message documents
        chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text
        """
    )
)
RESPONSES = _named(
    """
    background include input instructions max_output_tokens max_tool_calls metadata model logit_bias
    parallel_tool_calls previous_response_id prompt reasoning service_tier store stream temperature
    text tool_choice tools top_logprobs top_p top_k truncation user skip_special_tokens
    include_stop_str_in_output prompt_cache_key
    request_id mm_processor_kwargs priority cache_salt enable_response_messages
    previous_input_messages previous_response structured_outputs repetition_penalty seed stop
    ignore_eos vllm_xargs
    """
)
EMBEDDINGS = _named(
    """
    model input user dimensions encoding_format
    add_special_tokens truncate_prompt_tokens truncation_side padding request_id priority
    mm_processor_kwargs cache_salt embed_dtype endianness use_activation normalize
    messages add_generation_prompt continue_final_message chat_template chat_template_kwargs
    media_io_kwargs
    """
)
TOKENIZE = _named(
    """
    model prompt messages add_special_tokens return_token_strs add_generation_prompt
    continue_final_message chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs
    tools
    """
)
DETOKENIZE = _named("model tokens")
