"""The vision-language model: pictures and videos become tokens of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor
from tqdm import tqdm

from ernie45 import ops
from ernie45.checkpoint.names import TensorSpec, checkpoint_tensors
from ernie45.config import ErnieConfig, VisionConfig
from ernie45.errors import ConfigError, ErnieError
from ernie45.generation.generate import Generated, generate
from ernie45.generation.media import Media
from ernie45.generation.streaming import stream
from ernie45.losses import language_model_loss
from ernie45.models.adapter import Adapter
from ernie45.models.cache import KVCache
from ernie45.models.moe import Routing
from ernie45.models.pretrained import PretrainedModel
from ernie45.models.vision import VisionTransformer, encoder_batches, read_grid
from ernie45.processing.positions import position_ids as positions_of
from ernie45.processing.positions import split_grid, token_types

if TYPE_CHECKING:
    from ernie45.processing.processor import ErnieProcessor


# Patches that are encoded at once: enough for all threads, while memory does not grow with the number of pictures.
ENCODER_PATCHES = 16384


class ErnieForConditionalGeneration(PretrainedModel):
    """ERNIE 4.5 VL: vision tower, adapter, and the decoder with one expert bank for text and one for vision.

    Args:
        config: architecture.
        dtype: dtype of the weights: "float32", "bfloat16" or "float16"; the routers are float32 in any case.
        mtp: as for text models; no published vision-language model has such blocks.
        initialize: draw random weights; a reader that fills them in anyway passes False.

    Raises:
        ConfigError: the config describes a text model.
    """

    published_prefixes: Mapping[str, str] = {
        **PretrainedModel.published_prefixes,
        "adapter.": "ernie.resampler_model.",
    }

    def __init__(self, config: ErnieConfig, dtype: str = "float32", mtp: bool = False, initialize: bool = True):
        if config.vision is None:
            raise ConfigError("config: describes a text model (it has no vision_config); use ErnieForCausalLM")
        super().__init__(config, dtype, mtp, initialize=False)
        self.vision: VisionConfig = config.vision
        self.vision_model = VisionTransformer(config.vision, dtype)
        self.adapter = Adapter(config, dtype)
        if initialize:
            self.initialize_weights()

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        grid_thw: Any = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        attn_mask_startend_row_indices: Tensor | None = None,
        cache: KVCache | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (loss, logits) if labels are given.

        Args:
            input_ids, attention_mask, attn_mask_startend_row_indices, cache, routing: see `Decoder.forward`.
            images: [N, patch_bytes] uint8 pixels, or floats that are normalised already: the patches of all pictures
                and videos in the order of their placeholders; see `VisionTransformer.forward`. None: there are none.
            grid_thw: [items, 3] int, frames, rows and columns of patches of each.
            token_type_ids: [batch, sequence], 0 for text, anything else for vision; by default the placeholders and
                the tokens that begin and end pictures and videos. A further column, as upstream has it, is ignored.
            position_ids: [batch, sequence, 3] as (time, row, column), or [batch, sequence] where all three are equal;
                by default they follow from input_ids and grid_thw.
            labels: [batch, sequence] int64, already shifted (labels[i] follows input_ids[i]), -100 where ignored.

        Returns:
            logits [batch, sequence, vocab_size] in the dtype of activations; loss: float32 scalar.

        Raises:
            ErnieError: an argument has the wrong shape, or pictures and placeholders do not go together.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ErnieError(f"labels: expected {list(input_ids.shape)} like input_ids, found {list(labels.shape)}")
        grid = read_grid([] if grid_thw is None and images is None else grid_thw, self.vision)
        if images is None and (len(grid) or bool((input_ids == self.vision.placeholder_id).any())):
            raise ErnieError("images: missing, though grid_thw or placeholders in input_ids announce pictures")
        features = None if images is None else self.encode_images(images, grid)
        if position_ids is None or token_type_ids is None:
            types, positions = self._layout(input_ids, grid, attention_mask, cache)
            token_type_ids = types if token_type_ids is None else token_type_ids
            position_ids = positions if position_ids is None else position_ids
        hidden = self.ernie(
            input_ids,
            position_ids,
            attention_mask,
            attn_mask_startend_row_indices,
            cache,
            routing,
            _banks(token_type_ids, input_ids),
            features,
        )
        logits = self.lm_head(hidden)
        return logits if labels is None else (language_model_loss(logits, labels), logits)

    def encode_images(self, images: Tensor, grid_thw: Any) -> Tensor:
        """What the decoder gets in the place of placeholders.

        Args:
            images, grid_thw: as of `forward`.

        Returns:
            [tokens, hidden_size], of a picture rows * columns / 4 tokens, of a video that times half its frames.

        Raises:
            ErnieError: images and grid_thw do not go together.
        """
        grid = read_grid(grid_thw, self.vision)
        images = images if isinstance(images, Tensor) else paddle.to_tensor(images)
        expected = [int(grid.prod(axis=1).sum()), self.vision.patch_bytes]
        if list(images.shape) != expected:
            raise ErnieError(f"images: expected {expected} for grid_thw {grid.tolist()}, found {list(images.shape)}")
        parts, first = [], 0
        hidden_bar = None if len(images) > ENCODER_PATCHES // 4 else True  # None: shown on a terminal only
        with tqdm(total=len(images), unit="patch", desc="Encoding pictures", leave=False, disable=hidden_bar) as bar:
            for batch in encoder_batches(grid, self.vision.frames_per_token, ENCODER_PATCHES):
                last = first + int(batch.prod(axis=1).sum())
                parts.append(self.adapter(self.vision_model(images[first:last], batch), batch))
                bar.update(last - first)
                first = last
        if not parts:
            dtype = ops.compute_dtype(self.adapter.after_norm.weight.dtype)
            return paddle.zeros([0, self.config.hidden_size], dtype=dtype)
        return parts[0] if len(parts) == 1 else paddle.concat(parts)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        images: Any = None,
        grid_thw: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        **options: Any,
    ) -> Generated:
        """Continues prompts with pictures: `model.generate(**processor(messages))`.

        Args:
            input_ids, attention_mask, options: see `ernie45.generation.generate.generate`.
            images, grid_thw: as of `forward`, those of all rows in order.
            token_type_ids, position_ids: as of `forward`; by default they follow from the others.
        """
        media = Media(images, grid_thw, token_type_ids, position_ids)
        return generate(self, input_ids, attention_mask, media=media, **options)

    def stream(self, prompt: Any, *, processor: ErnieProcessor | None = None, **options: Any) -> Iterator[str]:
        """The reply to one prompt, piece by piece: `model.stream(messages, processor=processor)`.

        Args:
            prompt: messages with pictures and videos, for which the processor is needed; or what it returned; or a
                text, messages without pictures, or ids, with `tokenizer=`.
            processor: of the model.
            options: see `ernie45.generation.streaming.stream`.
        """
        if processor is not None:
            options.setdefault("tokenizer", processor.tokenizer)
            if not isinstance(prompt, Mapping | str):
                prompt = processor(prompt)
        if not isinstance(prompt, Mapping):
            return stream(self, prompt, **options)
        media = Media(*(prompt.get(key) for key in ("images", "grid_thw", "token_type_ids", "position_ids")))
        return stream(self, prompt["input_ids"], media=media, attention_mask=prompt.get("attention_mask"), **options)

    @classmethod
    def part_of(cls, config: ErnieConfig, path: Path, progress: bool) -> tuple[ErnieConfig, list[TensorSpec]]:
        """See `PretrainedModel.part_of`: all of a vision-language checkpoint."""
        if config.vision is None:
            raise ConfigError(f"{path}: holds a text model; use ErnieForCausalLM")
        return config, checkpoint_tensors(config)

    def _layout(
        self, input_ids: Tensor, grid: np.ndarray, attention_mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """Token types [batch, sequence] and positions [batch, sequence, 3], which padding does not count in."""
        ids = input_ids.numpy()
        real = np.ones(ids.shape, bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -ids.shape[1] :].numpy() != 0
        types, positions = np.zeros(ids.shape, "int64"), np.zeros([*ids.shape, 3], "int64")
        starts = np.zeros(len(ids), "int64")
        if cache is not None and cache.next_position is not None:
            starts = cache.next_position.numpy()
        rows = [row[mask] for row, mask in zip(ids, real, strict=True)]
        for row, own in enumerate(split_grid(rows, grid, self.vision)):
            types[row, real[row]] = token_types(rows[row], own, self.vision)
            positions[row, real[row]] = starts[row] + positions_of(rows[row], own, self.vision)
        return paddle.to_tensor(types), paddle.to_tensor(positions)


def _banks(token_type_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """The expert bank of each token; None if all are text."""
    if token_type_ids is None:
        return None
    if token_type_ids.ndim != 2 or token_type_ids.shape[1] not in (input_ids.shape[1], input_ids.shape[1] + 1):
        raise ErnieError(
            f"token_type_ids: expected {list(input_ids.shape)} like input_ids, found {list(token_type_ids.shape)}"
        )
    banks = (token_type_ids[:, : input_ids.shape[1]] != 0).astype("int64")
    return banks if bool(banks.any()) else None
