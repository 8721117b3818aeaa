"""Token ids of texts, remembered by pieces: the next turn of a chat costs only what is new."""

from __future__ import annotations

import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, compress, count, islice, pairwise
from os.path import commonprefix

import tokenizers

MAX_BYTES = 16 << 20
"""For the pieces of one tokenizer."""
MAX_PIECES = 1024
"""A text of so many pieces is encoded as a whole, as to look each up would take longer."""
_ENTRY_BYTES = 200
"""Of an entry, about, beside its text and its ids."""


class PieceMemory:
    """Encodes texts, and remembers the ids of their pieces.

    A piece reaches from one added token, such as `<|im_start|>`, to the next. The library finds
    these in a text before anything else, and normalizes, divides and encodes what stands between
    them apart (`AddedVocabulary::extract_and_normalize` of tokenizers); so the ids of a text are
    those of its pieces, one after the other. A piece begins with its token, since some tokenizers
    do something of their own where a text begins. Several threads may use it.

    Args:
        dividers: text → id of the tokens that divide, see `find_dividers`; one or more.
        encode: gives the ids of a text, with no others around it.
        max_bytes: to remember; what has not been used for longest is forgotten first.

    Attributes:
        num_bytes: remembered, about.
    """

    def __init__(
        self,
        dividers: Mapping[str, int],
        encode: Callable[[str], list[int]],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._divider = re.compile(_longest_of(dividers))
        self._divider_ids = frozenset(dividers.values())
        self._encode = encode
        self._max_bytes = max_bytes
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, of which only what its new pieces span is encoded."""
        starts = [match.start() for match in islice(self._divider.finditer(text), MAX_PIECES)]
        if len(starts) == MAX_PIECES:
            return self._encode(text)
        pieces = [text[a:b] for a, b in pairwise([0, *starts, len(text)]) if a < b]
        found = self._recall(pieces)
        new = [place for place, ids in enumerate(found) if ids is None]
        if new:
            span = slice(new[0], new[-1] + 1)
            ids = self._encode("".join(pieces[span]))
            self._remember(pieces[span], ids)
            found[span] = [ids]
        return list(chain.from_iterable(filter(None, found)))

    def _recall(self, pieces: Sequence[str]) -> list[Sequence[int] | None]:
        with self._lock:
            for piece in pieces:
                if piece in self._known:
                    self._known.move_to_end(piece)
            return [self._known.get(piece) for piece in pieces]

    def _remember(self, pieces: Sequence[str], ids: list[int]) -> None:
        """Divide the ids of neighbouring pieces among them, and keep those."""
        starts = list(compress(count(), map(self._divider_ids.__contains__, ids)))
        bounds = [*starts, len(ids)] if self._divider.match(pieces[0]) else [0, *starts, len(ids)]
        if len(bounds) != len(pieces) + 1:  # a divider's id came of something else, too
            return
        packed = array("I", ids)
        parts = (packed[a:b] for a, b in pairwise(bounds))
        entries = dict(zip(pieces, parts, strict=True))
        with self._lock:
            for piece, part in entries.items():
                if piece not in self._known:
                    self._known[piece] = part
                    self.num_bytes += _size(piece, part)
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= _size(*self._known.popitem(last=False))


def find_dividers(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Text → id of the tokens at which texts divide exactly; none if some tokenizer's option makes
    that doubtful.

    Tokens that are found in normalized text are not among them. Those that take in the white space
    around them, or depend on what stands beside them, rule out the others too.
    """
    raw = {i: t for i, t in backend.get_added_tokens_decoder().items() if not t.normalized}
    doubtful = any(t.lstrip or t.rstrip or t.single_word or not t.content for t in raw.values())
    if doubtful or backend.encode_special_tokens or getattr(backend.model, "dropout", None):
        return {}
    return {token.content: token_id for token_id, token in raw.items()}


def _size(piece: str, ids: array[int]) -> int:
    return _ENTRY_BYTES + sys.getsizeof(piece) + sys.getsizeof(ids)


def _longest_of(texts: Collection[str]) -> str:
    """An expression for the longest of some texts that matches; its time does not grow with them,
    as beginnings that texts share are tried once."""
    by_first: dict[str, list[str]] = {}
    for text in texts:
        by_first.setdefault(text[:1], []).append(text)
    may_end = by_first.pop("", None) is not None
    branches = []
    for group in by_first.values():
        shared = commonprefix(group)  # noqa: RUF071 (of characters, not of folders)
        branches.append(re.escape(shared) + _longest_of([t[len(shared) :] for t in group]))
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if may_end else ''}"
