"""Body of `/v1/embeddings`: OpenAI's, with vLLM's additional fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from deployments.protocols.body import Body
from deployments.protocols.openai import Prompts, list_prompts
from engine.errors import InvalidRequest


class EmbeddingsBody(Body):
    """Body of `/v1/embeddings`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "messages": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "mm_processor_kwargs": ({},),
        "padding": ("do_not_pad",),
        "truncation_side": ("left",),
        "use_activation": (True,),
    }

    model: str
    """Name of a served model."""
    input: Prompts
    """One text, one list of token ids, or a list of either; each gets an embedding."""
    encoding_format: Literal["float", "base64"] | None = None
    """`float`, which is what null means too, gives lists of numbers; `base64` the bytes of float32
    numbers, little-endian."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Numbers to keep of an embedding, the first ones, for models that are trained for it; null
    keeps all."""
    normalize: bool = True
    """Whether embeddings are scaled to the Euclidean length 1, after they are cut off."""
    truncate_prompt_tokens: int | None = None
    """So many tokens are kept of an input, its last ones; -1 keeps as many as the model takes."""
    add_special_tokens: bool = True
    """Whether the tokens that the model wants around a text, such as a first one, are put there."""
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Lower goes first, under the scheduling policy `priority`."""
    cache_salt: str | None = None
    """Inputs share cached prefixes only with those of the same salt."""
    user: str | None = None
    """Accepted, and without effect."""

    def inputs(self) -> list[str | list[int]]:
        """The inputs, one or many.

        Raises:
            InvalidRequest: there is none.
        """
        return list_prompts(self.input, "input")

    def num_kept(self, max_model_len: int) -> int | None:
        """How many tokens are kept of an input, or None for all.

        Raises:
            InvalidRequest: `truncate_prompt_tokens` is out of range.
        """
        kept = self.truncate_prompt_tokens
        if kept is not None and kept != -1 and not 1 <= kept <= max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1, or from 1 to {max_model_len}.",
                "truncate_prompt_tokens",
            )
        return max_model_len if kept == -1 else kept
