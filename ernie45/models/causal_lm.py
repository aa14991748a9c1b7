"""The text model."""

from __future__ import annotations

import sys
from pathlib import Path

from paddle import Tensor

from ernie45.checkpoint.names import TensorSpec, bytes_left_out, text_part_tensors
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError
from ernie45.losses import language_model_loss
from ernie45.memory import format_bytes
from ernie45.models.cache import KVCache
from ernie45.models.moe import Routing
from ernie45.models.pretrained import PretrainedModel


class ErnieForCausalLM(PretrainedModel):
    """ERNIE 4.5 text model, dense or mixture of experts.

    Of a vision-language checkpoint it reads and holds the text part only.

    Args:
        config: architecture.
        dtype: dtype of the weights: "float32", "bfloat16" or "float16"; the router is float32 in any case.
        mtp: build the multi-token-prediction blocks too.
        initialize: draw random weights; a reader that fills them in anyway passes False.
    """

    def __init__(self, config: ErnieConfig, dtype: str = "float32", mtp: bool = False, initialize: bool = True):
        super().__init__(config.text_part(), dtype, mtp, initialize)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        attn_mask_startend_row_indices: Tensor | None = None,
        cache: KVCache | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (loss, logits) if labels are given.

        Args:
            input_ids, position_ids, attention_mask, attn_mask_startend_row_indices, cache, routing:
                see `Decoder.forward`.
            labels: [batch, sequence] int64, already shifted (labels[i] follows input_ids[i]), -100 where ignored.

        Returns:
            logits [batch, sequence, vocab_size] in the dtype of activations; loss: float32 scalar.

        Raises:
            ErnieError: an argument has the wrong shape.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ErnieError(f"labels: expected {list(input_ids.shape)} like input_ids, found {list(labels.shape)}")
        hidden = self.ernie(
            input_ids, position_ids, attention_mask, attn_mask_startend_row_indices, cache=cache, routing=routing
        )
        logits = self.lm_head(hidden)
        return logits if labels is None else (language_model_loss(logits, labels), logits)

    def next_n_logits(self, input_ids: Tensor) -> list[Tensor]:
        """Logits of the model and of each multi-token-prediction depth: see `Decoder.forward_next_n`."""
        return [self.lm_head(hidden) for hidden in self.ernie.forward_next_n(input_ids)]

    @classmethod
    def part_of(cls, config: ErnieConfig, path: Path, progress: bool) -> tuple[ErnieConfig, list[TensorSpec]]:
        """See `PretrainedModel.part_of`: all of a text checkpoint, the text part of a vision-language one."""
        if config.vision is not None and progress:
            left_out = format_bytes(bytes_left_out(config, config.dtype, config.quantization_config))
            print(
                f"{path.name}: reading the text part; {left_out} of vision weights are left out "
                "(ErnieForConditionalGeneration reads them)",
                file=sys.stderr,
            )
        return config.text_part(), text_part_tensors(config)
