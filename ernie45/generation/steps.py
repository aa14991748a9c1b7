"""Token by token: the loop under greedy decoding, sampling and streaming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import paddle
from paddle import Tensor

from ernie45.generation.media import media_inputs
from ernie45.generation.prompt import left_pad
from ernie45.generation.prompt_cache import PromptCache
from ernie45.generation.request import Request
from ernie45.generation.sampling import Context, choose, generators, log_probabilities, process
from ernie45.generation.text import RowText

if TYPE_CHECKING:
    from ernie45.models.pretrained import PretrainedModel
    from ernie45.models.vision_language import ErnieForConditionalGeneration


@dataclass(frozen=True)
class Step:
    """One new token per row.

    Attributes:
        ids: [rows] int64, the pad token in rows that had ended before.
        log_probs: [rows] float32, 0 in rows that had ended before.
        active: [rows] bool, False in rows that had ended before.
        texts: what the token made certain, per row, if the text is followed.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    active: np.ndarray
    texts: list[str]


def steps(model: PretrainedModel, request: Request, texts: Sequence[RowText] = ()) -> Iterator[Step]:
    """Generates until every row has ended, or for max_new_tokens. Between two steps nothing is pending.

    Args:
        model: the model.
        request: what to generate.
        texts: one per row to follow the text, which ends a row at a stop string; or none.
    """
    config = request.config
    rows = np.repeat(np.arange(len(request.prompts)), config.num_return_sequences)
    logits = prefill(model, request)[rows]
    # The request's own cache keeps one row per prompt, so that another call can continue from the prompt.
    cache = request.cache if len(rows) == len(request.prompts) else request.cache.with_rows(rows)
    prompts = [request.prompts[row] for row in rows]
    randoms = generators(config, len(request.prompts))
    replies = np.full([len(rows), config.max_new_tokens], config.pad_token_id, dtype="int64")
    active = np.ones(len(rows), dtype=bool)
    for position in range(config.max_new_tokens):
        if position:
            logits = next_logits(model, cache, replies[:, position - 1 : position])
        logits = process(request.processors, Context(prompts, replies[:, :position]), logits)
        for row in np.flatnonzero(active):
            replies[row, position] = choose(logits[row], config, randoms[row])
        ids = replies[:, position]
        log_probs = np.where(active, log_probabilities(logits, ids), 0).astype("float32")
        pieces = [text.push(int(ids[row])) if active[row] else "" for row, text in enumerate(texts)]
        yield Step(ids.copy(), log_probs, active, pieces)
        active = active & ~np.isin(ids, config.eos_token_id)
        if texts:
            active = active & ~np.array([text.stopped for text in texts])
        if not active.any():
            return


def prefill(model: PretrainedModel, request: Request) -> np.ndarray:
    """Feeds the prompts, except for what the cache holds already. Returns the logits [prompts, vocab] after them."""
    ids, mask = left_pad(request.prompts, request.config.pad_token_id)
    keys, _ = left_pad(request.keys, request.config.pad_token_id)
    held = request.cache.keep_beginning(keys, mask)
    more: dict[str, Tensor | None] = {}
    if request.vision is not None:
        with paddle.no_grad():
            more = media_inputs(cast("ErnieForConditionalGeneration", model), request.vision, request.cache, held)
    return next_logits(model, request.cache, ids[:, held:], mask, keys[:, held:], **more)


@paddle.no_grad()
def next_logits(
    model: PretrainedModel,
    cache: PromptCache,
    ids: np.ndarray,
    mask: np.ndarray | None = None,
    keys: np.ndarray | None = None,
    **more: Tensor | None,
) -> np.ndarray:
    """Feeds tokens and returns the logits after the last one.

    Args:
        model: the model.
        cache: holds the tokens before, and then these too.
        ids: [rows, new] int64
        mask: [rows, cached + new] bool, False for padding; None: the new tokens have none.
        keys: [rows, new] int64, what the cache knows the tokens by; None: their ids.
        more: further arguments of the decoder.

    Returns:
        [rows, vocab] float32
    """
    cache.announce(ids if keys is None else keys)
    attention_mask = None if mask is None else paddle.to_tensor(mask)
    hidden = model.ernie(paddle.to_tensor(ids), attention_mask=attention_mask, cache=cache, **more)
    return model.lm_head(hidden[:, -1]).astype("float32").numpy()
