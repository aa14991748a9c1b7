"""One call of `generate` or `stream`, with everything checked before the work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie45.errors import ErnieError
from ernie45.generation.config import GenerationConfig
from ernie45.generation.media import Media, VisionPrompt, read_media
from ernie45.generation.prompt import read_prompts
from ernie45.generation.prompt_cache import PromptCache
from ernie45.generation.sampling import LogitsProcessor, processors_of
from ernie45.generation.text import RowText, has_stop, read_stop_strings

if TYPE_CHECKING:
    from ernie45.models.pretrained import PretrainedModel
    from ernie45.tokenizer import ErnieTokenizer


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompts: one int64 array per row, without padding.
        config: the options.
        cache: to fill, and to continue from.
        processors: applied to the logits in this order.
        tokenizer: there if stop strings are.
        stop_strings: texts that end a row.
        vision: what each prompt has beside its ids; None for a text model.
    """

    prompts: list[np.ndarray]
    config: GenerationConfig
    cache: PromptCache
    processors: list[LogitsProcessor]
    tokenizer: ErnieTokenizer | None
    stop_strings: tuple[str, ...]
    vision: list[VisionPrompt] | None = None

    @property
    def keys(self) -> list[np.ndarray]:
        """What prompts are compared by: the ids, or for pictures what they show."""
        return self.prompts if self.vision is None else [prompt.keys for prompt in self.vision]

    def row_texts(self, rows: int, skip_special_tokens: bool = True) -> list[RowText]:
        """What follows the text of each row."""
        assert self.tokenizer is not None
        return [RowText(self.tokenizer, self.stop_strings, skip_special_tokens) for _ in range(rows)]

    def ends(self, reply: Sequence[int]) -> bool:
        """Whether the last token of a reply ends it."""
        if reply[-1] in self.config.eos_token_id:
            return True
        return (
            self.tokenizer is not None
            and bool(self.stop_strings)
            and has_stop(self.tokenizer, self.stop_strings, reply)
        )


def prepare(
    model: PretrainedModel,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    cache: PromptCache | None = None,
    tokenizer: ErnieTokenizer | None = None,
    stop_strings: str | Sequence[str] | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    vocab_size: int | None = None,
    media: Media | None = None,
    **options: Any,
) -> Request:
    """Checks the arguments of `ernie45.generation.generate.generate`, which describes them."""
    prompts = read_prompts(input_ids, attention_mask)
    seeing = model.config.vision
    vision = None if seeing is None else read_media(media or Media(), prompts, attention_mask, seeing)
    config = model.generation_config.override(**options)
    texts, ids = read_stop_strings(stop_strings, tokenizer)
    config = config.override(eos_token_id=[*config.eos_token_id, *ids])
    total = model.config.vocab_size
    allowed = vocab_size if vocab_size is not None else total if tokenizer is None else len(tokenizer)
    if allowed < 1:
        raise ErnieError(f"vocab_size: expected at least 1, found {allowed}")
    if config.pad_token_id >= total:
        raise ErnieError(f"pad_token_id: expected an id below vocab_size {total}, found {config.pad_token_id}")
    return Request(
        prompts=prompts,
        config=config,
        cache=_cache(model, cache, prompts, config),
        processors=[*processors_of(config, total, allowed), *logits_processors],
        tokenizer=tokenizer,
        stop_strings=texts,
        vision=vision,
    )


def _cache(
    model: PretrainedModel, cache: PromptCache | None, prompts: list[np.ndarray], config: GenerationConfig
) -> PromptCache:
    needed = max(len(prompt) for prompt in prompts) + config.max_new_tokens
    limit = model.config.max_position_embeddings
    if needed > limit:
        raise ErnieError(
            f"max_new_tokens: {needed - config.max_new_tokens} tokens of prompt and {config.max_new_tokens} new ones "
            f"exceed the {limit} positions of this model; shorten the prompt or ask for fewer"
        )
    if cache is None:
        return PromptCache(model.config, needed)
    if not isinstance(cache, PromptCache):
        raise ErnieError(f"cache: expected a PromptCache, which knows its tokens, found a {type(cache).__name__}")
    if cache.batch_size not in (0, len(prompts)):
        raise ErnieError(f"cache: holds {cache.batch_size} rows, but there are {len(prompts)} prompts; use a new one")
    return cache
