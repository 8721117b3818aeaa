"""What a prefix cache could know of a load at best."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.serving.answers import Answer


class InfiniteCache:
    """Every full block of every sequence, for ever. Texts are of `WORDS`: a token each.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[tuple[int, str], int] = {}
        """(number of the block before, text) → number, which so stands for all text up to there."""

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds."""
        return len(self._blocks) * self._block_size

    def replay(self, answers: Iterable[Answer]) -> int:
        """Learn a load; returns the prompt tokens that were known when they came.

        Exact, but that a prompt counts as computed when it was sent. The last token of an answer is
        never computed.
        """
        found = 0
        for answer in sorted(answers, key=lambda each: each.sent):
            found += self.hits(answer.prompt)
            self.add((answer.prompt + answer.text).rpartition(" ")[0])
        return found

    def hits(self, prompt: str) -> int:
        """Tokens of the prompt's leading blocks that are known; one is always left to compute."""
        number, found = 0, 0
        for text in self._split(prompt, keep_back=1):
            known = self._blocks.get((number, text))
            if known is None:
                break
            number, found = known, found + self._block_size
        return found

    def add(self, text: str) -> None:
        """Learn a sequence that has been computed."""
        number = 0
        for block in self._split(text):
            number = self._blocks.setdefault((number, block), len(self._blocks) + 1)

    def _split(self, text: str, keep_back: int = 0) -> Iterable[str]:
        words, size = text.split(" ")[1:], self._block_size
        for end in range(size, len(words) - keep_back + 1, size):
            yield " ".join(words[end - size : end])
