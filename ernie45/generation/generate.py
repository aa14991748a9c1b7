"""`generate`: from prompts to new tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.generation.beam import beam_search
from ernie45.generation.media import Media
from ernie45.generation.prompt_cache import PromptCache
from ernie45.generation.request import Request, prepare
from ernie45.generation.sampling import LogitsProcessor
from ernie45.generation.steps import steps

if TYPE_CHECKING:
    from ernie45.generation.streaming import Streamer
    from ernie45.models.pretrained import PretrainedModel
    from ernie45.tokenizer import ErnieTokenizer


@dataclass(frozen=True)
class Generated:
    """What `generate` returns; `ids, scores = model.generate(...)` takes the first two.

    Attributes:
        ids: [rows, new] int64: the new tokens only, the one that ended a row included, then the pad token.
        scores: [rows] float32: the sum of a row's log-probabilities, divided by its length (for beams by
            length ** length_penalty).
        log_probs: [rows, new] float32 of the tokens in `ids`, 0 in the padding: after penalties and masks, before
            temperature, top-k, top-p and min-p.
        cache: to pass to the next call. It holds the prompts and the replies except for their last tokens; only the
            prompts if there were several replies to each, or beams.
    """

    ids: Tensor
    scores: Tensor
    log_probs: Tensor
    cache: PromptCache

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.ids, self.scores))

    def __getitem__(self, index: int) -> Tensor:
        return (self.ids, self.scores)[index]


def generate(
    model: PretrainedModel,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    cache: PromptCache | None = None,
    tokenizer: ErnieTokenizer | None = None,
    stop_strings: str | Sequence[str] | None = None,
    streamer: Streamer | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    vocab_size: int | None = None,
    media: Media | None = None,
    **options: Any,
) -> Generated:
    """Continues prompts.

    Each row gets what it would get alone, whatever padding it comes with. (The kernels may round differently for
    another batch size, so that a tie between two tokens can be decided differently.)

    Args:
        model: the model.
        input_ids: [batch, sequence] or [sequence] integers as a tensor, an array or a list; or a list of rows of
            different lengths.
        attention_mask: the same form, 0 for padding, which may be anywhere.
        cache: from an earlier call, or new; the beginning of the prompts that it holds is not computed again. It
            must have as many rows as there are prompts.
        tokenizer: ids that it does not have are never chosen. Needed for stop_strings.
        stop_strings: a row ends with the token that completes one of them. They are looked for in the text of the
            reply without special tokens; one that is a special token by itself works like an eos id.
        streamer: gets the tokens while they come.
        logits_processors: applied after the built-in ones; see `sampling.LogitsProcessor`.
        vocab_size: ids from here on are never chosen; by default len(tokenizer).
        media: pictures and videos, for a vision-language model.
        options: fields of `GenerationConfig`, instead of those of `model.generation_config`.

    Returns:
        see `Generated`; rows are [prompt 0, reply 0], [prompt 0, reply 1], ..., [prompt 1, reply 0], ...

    Raises:
        ErnieError: something is wrong with the arguments, or the logits are not finite.
    """
    request = prepare(
        model,
        input_ids,
        attention_mask,
        cache=cache,
        tokenizer=tokenizer,
        stop_strings=stop_strings,
        logits_processors=logits_processors,
        vocab_size=vocab_size,
        media=media,
        **options,
    )
    if request.config.num_beams > 1:
        if streamer is not None:
            raise ErnieError("streamer: beams are known only at the end; use num_beams=1")
        return _search(model, request)
    return _follow(model, request, streamer)


def _follow(model: PretrainedModel, request: Request, streamer: Streamer | None) -> Generated:
    rows = len(request.prompts) * request.config.num_return_sequences
    texts = request.row_texts(rows) if request.stop_strings else []
    taken = []
    try:
        for step in steps(model, request, texts):
            taken.append(step)
            if streamer is not None:
                streamer.put(step.ids)
    finally:
        if streamer is not None:
            streamer.end()
    log_probs = np.stack([step.log_probs for step in taken], axis=1)
    lengths = np.sum([step.active for step in taken], axis=0)
    ids = np.stack([step.ids for step in taken], axis=1)
    return _generated(ids, log_probs.sum(axis=1) / lengths, log_probs, request.cache)


def _search(model: PretrainedModel, request: Request) -> Generated:
    replies = beam_search(model, request)
    shape = [len(replies), max(len(reply.ids) for reply in replies)]
    ids = np.full(shape, request.config.pad_token_id, dtype="int64")
    log_probs = np.zeros(shape)
    for row, reply in enumerate(replies):
        ids[row, : len(reply.ids)] = reply.ids
        log_probs[row, : len(reply.ids)] = reply.log_probs
    scores = np.array([reply.score(request.config.length_penalty) for reply in replies])
    return _generated(ids, scores, log_probs, request.cache)


def _generated(ids: np.ndarray, scores: np.ndarray, log_probs: np.ndarray, cache: PromptCache) -> Generated:
    return Generated(
        paddle.to_tensor(ids),
        paddle.to_tensor(scores.astype("float32")),
        paddle.to_tensor(log_probs.astype("float32")),
        cache,
    )
