"""From the engine's token deltas to the text, log-probabilities and results that callers see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import msgspec

from engine.detokenizer import IncrementalDetokenizer, StopStringMatcher
from engine.outputs import CompletionOutput, FinishReason, Logprob, TokenDelta, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer


class TextDelta(msgspec.Struct):
    """What one push added to a completion."""

    text: str = ""
    """New text; text that may turn out to be a stop string waits for a later delta."""
    token_ids: Sequence[int] = ()
    """New tokens, up to the one that completed a stop string."""
    logprobs: list[dict[int, Logprob]] | None = None
    """One entry for each of `token_ids`, when asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended the completion."""
    error: str | None = None
    """A sentence for the client when `finish_reason` is `error`."""
    refused: bool = False
    """The error is the request's own: it can never run on its engine."""


class OutputProcessor:
    """Follows one completion.

    Args:
        tokenizer: of the model; None gives no text and finds no stop strings.
        params: of the completion.
        prompt_token_ids: of the request.
        index: of the completion among those of its prompt.

    Attributes:
        token_ids: output tokens so far.
        num_cached_tokens: prompt tokens found in the prefix cache.
        finish_reason: why the completion ended, or None.
        must_abort: a stop string ended the completion, so the engine, which knows nothing of stop
            strings, must be told to stop.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        index: int = 0,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.must_abort = False
        self._tokenizer = tokenizer
        self._params = params
        self._texts: list[str] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self._unread_prompt_logprobs: list[TokenLogprobs] = []
        self._detokenizer: IncrementalDetokenizer | None = None
        self._matcher: StopStringMatcher | None = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer, params.skip_special_tokens, prompt_token_ids
            )
            if params.stop:
                self._matcher = StopStringMatcher(params.stop, params.include_stop_str_in_output)

    @property
    def finished(self) -> bool:
        """Whether the completion has ended; whatever comes later is ignored."""
        return self.finish_reason is not None

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """One entry for each prompt position, None for the first, when asked for.

        Those of long prompts take a good part of a second when they are read first; what pushes
        deltas must not wait for that.
        """
        if self._prompt_logprobs is not None and self._unread_prompt_logprobs:
            unread, self._unread_prompt_logprobs = self._unread_prompt_logprobs, []
            self._prompt_logprobs += self._to_dicts(unread)
        return self._prompt_logprobs

    @property
    def num_prompt_logprobs(self) -> int:
        """How many entries `prompt_logprobs` has, without the work of reading them."""
        return len(self._prompt_logprobs or ()) + len(self._unread_prompt_logprobs)

    def push(self, delta: TokenDelta) -> TextDelta:
        """Take what a step added, and give what it means to the caller.

        After the end, every push gives an empty delta that repeats how the completion ended.
        """
        if self.finish_reason is not None:
            return TextDelta(finish_reason=self.finish_reason, stop_reason=self.stop_reason)
        if delta.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs and self._prompt_logprobs is not None:
            self._unread_prompt_logprobs += delta.prompt_logprobs
        if self._params.max_tokens == 0 and delta.token_ids:
            delta = TokenDelta(delta.request_id, [], "length")  # engines sample one all the same
        text, count = self._advance(delta)
        token_ids = delta.token_ids if count == len(delta.token_ids) else delta.token_ids[:count]
        self.token_ids += token_ids
        if text:
            self._texts.append(text)
        logprobs = None
        if delta.logprobs is not None and self._logprobs is not None:
            logprobs = self._add_logprobs(delta.logprobs[:count])
        return TextDelta(
            text,
            token_ids,
            logprobs,
            self.finish_reason,
            self.stop_reason,
            delta.error,
            delta.refused,
        )

    def result(self) -> CompletionOutput:
        """The completion so far."""
        return CompletionOutput(
            index=self.index,
            text="".join(self._texts),
            token_ids=list(self.token_ids),
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=self._logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _advance(self, delta: TokenDelta) -> tuple[str, int]:
        """New text and the number of new tokens; sets how the completion ended, if it did."""
        if self._detokenizer is None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
            return "", len(delta.token_ids)
        spoken: Sequence[int] = delta.token_ids
        if delta.finish_reason == "stop" and not self._params.include_stop_str_in_output:
            spoken = spoken[:-1]  # the token that stops is no part of the text
        if self._matcher is None:
            text = self._detokenizer.push(spoken)
        else:
            text, count = self._match(spoken, self._detokenizer, self._matcher)
            if self._matcher.matched is not None:
                self.finish_reason, self.stop_reason = "stop", self._matcher.matched
                self.must_abort = delta.finish_reason is None
                return text, count
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
            text += self._matcher.flush() if self._matcher is not None else ""
            text += self._detokenizer.flush()
        return text, len(delta.token_ids)

    def _match(
        self,
        token_ids: Sequence[int],
        detokenizer: IncrementalDetokenizer,
        matcher: StopStringMatcher,
    ) -> tuple[str, int]:
        """Text up to the first stop string, and the number of tokens that it took."""
        texts = []
        unchecked = self._params.min_tokens - len(self.token_ids)
        for count, token in enumerate(token_ids, 1):
            piece = detokenizer.push((token,))
            texts.append(matcher.push(piece, check=count > unchecked))
            if matcher.matched is not None:
                return "".join(texts), count
        return "".join(texts), len(token_ids)

    def _add_logprobs(self, entries: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
        converted = self._to_dicts(entries)
        if self._logprobs is not None:
            self._logprobs += converted
        self._cumulative_logprob += sum(entry.logprobs[0] for entry in entries)
        return converted

    def _to_dicts(self, entries: Iterable[TokenLogprobs]) -> list[dict[int, Logprob]]:
        return [_to_dict(entry, self._tokenizer) for entry in entries]


def _to_dict(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The sampled token first, with its rank; the likeliest follow, ranked from 1."""
    ranks = chain((entry.rank,), range(1, len(entry.token_ids)))
    found: dict[int, Logprob] = {}
    for token, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True):
        if token not in found:
            text = None if tokenizer is None else tokenizer.token_text(token)
            found[token] = Logprob(logprob, rank, text)
    return found
