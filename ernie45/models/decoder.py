"""The decoder that all ERNIE 4.5 models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import paddle
from paddle import Tensor, nn

from ernie45 import ops
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError
from ernie45.models.cache import KVCache
from ernie45.models.layers import MLP, ZEROS, Attention, Linear, RMSNorm
from ernie45.models.mask import AttentionMask, document_ends, explicit_mask
from ernie45.models.moe import MoE, Routing

if TYPE_CHECKING:
    from ernie45.models.packing import FusedDecoder


class Embedding(nn.Layer):
    """Token embedding [vocab_size, hidden_size]; as a tied head it is applied transposed."""

    def __init__(self, config: ErnieConfig, dtype: str):
        super().__init__()
        self.weight = self.create_parameter(
            [config.vocab_size, config.hidden_size], dtype=dtype, default_initializer=ZEROS
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [batch, sequence] int64 -> [batch, sequence, hidden_size] in the dtype of activations."""
        return ops.embedding(input_ids, self.weight)


class DecoderLayer(nn.Layer):
    """Pre-norm attention and a feed-forward part that is an MLP or a mixture of experts."""

    def __init__(self, config: ErnieConfig, layer: int, dtype: str, moe: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, layer, dtype)
        self.post_attention_layernorm = RMSNorm(config, dtype)
        self.mlp = MoE(config, layer, dtype) if moe else MLP(config.hidden_size, config.intermediate_size, dtype)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask,
        cache: KVCache | None = None,
        banks: Tensor | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """x [batch, sequence, hidden_size] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, banks, routing) if isinstance(self.mlp, MoE) else self.mlp(normed))


@dataclass(frozen=True)
class Place:
    """Where new tokens stand.

    Attributes:
        positions: [batch, sequence].
        mask: which keys they see.
        next_position: [batch] int64, position of the token that would follow.
    """

    positions: Tensor
    mask: AttentionMask
    next_position: Tensor


class Decoder(nn.Layer):
    """Embedding, decoder layers and final norm: token ids in, hidden states out.

    Args:
        config: architecture; `tie_word_embeddings` and the like must be decided.
        dtype: dtype of the weights; the router and its bias are always float32.
        mtp: also build the multi-token-prediction blocks (`mtp_*`), which share embedding, norm and head.
    """

    def __init__(self, config: ErnieConfig, dtype: str = "float32", mtp: bool = False):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config, dtype)
        self.layers = nn.LayerList(
            [DecoderLayer(config, i, dtype, config.is_moe_layer(i)) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config, dtype)
        depth = (config.num_nextn_predict_layers or 0) if mtp else 0
        if depth:
            self.mtp_block = nn.LayerList([DecoderLayer(config, i, dtype, moe=False) for i in range(depth)])
            self.mtp_emb_norm = nn.LayerList([RMSNorm(config, dtype) for _ in range(depth)])
            self.mtp_hidden_norm = nn.LayerList([RMSNorm(config, dtype) for _ in range(depth)])
            self.mtp_linear_proj = nn.LayerList(
                [Linear(2 * config.hidden_size, config.hidden_size, dtype) for _ in range(depth)]
            )
        self.mtp_depth = depth
        self.fused: FusedDecoder | None = None  # set from outside: see models/packing.py

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attn_mask_startend_row_indices: Tensor | None = None,
        cache: KVCache | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: [batch, sequence] int64. With a cache: only the tokens that are not in it yet.
            position_ids: [batch, sequence]; by default they count the tokens that are not padding.
            attention_mask: [batch, sequence] with 0 for padding, on either side (with a cache, columns for the
                cached tokens may be in front); or [batch, 1, sequence, cached + sequence] with 1 where a row may
                look, which then replaces the causal order.
            attn_mask_startend_row_indices: [batch, 1, sequence, 1] int, packed documents: the first query row that
                may no longer see the key.
            cache: keys and values to continue from; the new ones are appended to it.
            routing: a list that receives one `Routing` per MoE layer and bank.

        Returns:
            [batch, sequence, hidden_size]

        Raises:
            ErnieError: an argument has the wrong shape, or a token id is outside the vocabulary.
        """
        _check_ids(input_ids, self.config.vocab_size)
        place = self.place(input_ids, position_ids, attention_mask, attn_mask_startend_row_indices, cache)
        positions, mask = place.positions, place.mask
        first_keys = None if self.fused is None else self.fused.first_keys(input_ids, positions, mask, routing)
        if self.fused is not None and first_keys is not None:
            hidden = self.fused(input_ids, positions, first_keys, cache)
        else:
            hidden = self.norm(self.run_layers(input_ids, place, cache, routing))
        if cache is not None:
            cache.advance(mask.padding, place.next_position, input_ids.shape[1])
        return hidden

    def place(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attn_mask_startend_row_indices: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Place:
        """Where the tokens stand and what they see; arguments as of `forward`."""
        batch, sequence = input_ids.shape
        offset = 0 if cache is None else cache.length
        padding, explicit = _read_mask(attention_mask, batch, sequence, cache)
        ends = attn_mask_startend_row_indices
        ends = None if ends is None else document_ends(ends, batch, offset + sequence)
        mask = AttentionMask(offset, padding, ends, explicit)
        before = None if cache is None else cache.next_position
        if position_ids is None and padding is None:
            start = paddle.zeros([batch], dtype="int64") if before is None else before
            positions = start.unsqueeze(1)
            positions = positions if sequence == 1 else positions + paddle.arange(sequence).unsqueeze(0)
            return Place(positions, mask, start + sequence)
        if position_ids is None:
            position_ids = _padded_positions(sequence, padding, before)
        elif position_ids.shape != [batch, sequence]:
            raise ErnieError(
                f"position_ids: expected [{batch}, {sequence}] like input_ids, found {list(position_ids.shape)}"
            )
        return Place(position_ids, mask, _next_position(position_ids, padding, before))

    def run_layers(
        self,
        input_ids: Tensor,
        place: Place,
        cache: KVCache | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """Hidden states [batch, sequence, hidden_size] before the final norm."""
        x = self.embed_tokens(input_ids)
        rotary = self.rotary(place.positions)
        for layer in self.layers:
            x = layer(x, rotary, place.mask, cache, routing=routing)
        return x

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, sequence, 1, head_dim / 2] float32 for position_ids [batch, sequence]."""
        positions = position_ids.astype("float32") / self.config.compression_ratio
        return ops.rope_angles(positions, self.config.head_dim, self.config.rope_theta)

    def forward_next_n(self, input_ids: Tensor) -> list[Tensor]:
        """Hidden states of the model and of each multi-token-prediction depth (DeepSeek-V3, arXiv 2412.19437, 2.2).

        Depth d combines the embedding of the token d + 1 places ahead with the previous depth's hidden state.

        Args:
            input_ids: [batch, sequence + depth] int64

        Returns:
            1 + depth tensors [batch, sequence, hidden_size], all after the shared final norm.
        """
        if not self.mtp_depth:
            raise ErnieError("this model was built without multi-token-prediction blocks; load it with mtp=True")
        sequence = input_ids.shape[1] - self.mtp_depth
        if sequence < 1:
            raise ErnieError(
                f"input_ids: expected more than {self.mtp_depth} tokens per row, found {list(input_ids.shape)}"
            )
        _check_ids(input_ids, self.config.vocab_size)
        place = self.place(input_ids[:, :sequence])
        hidden = self.run_layers(input_ids[:, :sequence], place)
        embeddings, rotary, mask = self.embed_tokens(input_ids), self.rotary(place.positions), place.mask
        outputs = [hidden]
        for depth in range(self.mtp_depth):
            ahead = embeddings[:, depth + 1 : depth + 1 + sequence]
            both = [self.mtp_emb_norm[depth](ahead), self.mtp_hidden_norm[depth](outputs[-1])]
            joined = self.mtp_linear_proj[depth](paddle.concat(both, axis=-1))
            outputs.append(self.mtp_block[depth](joined, rotary, mask))
        return [self.norm(output) for output in outputs]


def _check_ids(input_ids: Tensor, vocab_size: int) -> None:
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ErnieError(f"input_ids: expected a non-empty [batch, sequence], found shape {list(input_ids.shape)}")
    values = input_ids.numpy()
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        raise ErnieError(
            f"input_ids: ids {low}..{high} are outside the vocabulary 0..{vocab_size - 1}; "
            "was another model's tokenizer used?"
        )


def _read_mask(
    attention_mask: Tensor | None, batch: int, sequence: int, cache: KVCache | None
) -> tuple[Tensor | None, Tensor | None]:
    """Splits `attention_mask` into padding [batch, cached + sequence] (None: no padding) and an explicit mask."""
    cached = 0 if cache is None else cache.length
    if cache is not None and cached and cache.batch_size != batch:
        raise ErnieError(f"cache: holds {cache.batch_size} rows, but input_ids has {batch}")
    remembered = None if cache is None else cache.padding
    if attention_mask is None or attention_mask.ndim > 2:
        explicit = None
        if attention_mask is not None:
            explicit = explicit_mask(attention_mask, batch, sequence, cached + sequence)
        if remembered is not None:
            remembered = paddle.concat([remembered, paddle.ones([batch, sequence], dtype="bool")], axis=1)
        return remembered, explicit
    if attention_mask.shape not in ([batch, sequence], [batch, cached + sequence]):
        raise ErnieError(
            f"attention_mask: expected [{batch}, {sequence}] like input_ids"
            + (f" or [{batch}, {cached + sequence}] with the cached tokens" if cached else "")
            + f", found {list(attention_mask.shape)}"
        )
    padding = attention_mask.astype("bool")
    if padding.shape[1] == sequence and cached:
        before = remembered if remembered is not None else paddle.ones([batch, cached], dtype="bool")
        padding = paddle.concat([before, padding], axis=1)
    return (None if bool(padding.all()) else padding), None


def _padded_positions(sequence: int, padding: Tensor | None, before: Tensor | None) -> Tensor:
    """Positions [batch, sequence] that count tokens which are not padding, continuing from `before` [batch]."""
    assert padding is not None
    new = padding[:, -sequence:].astype("int64")
    counted = paddle.cumsum(new, axis=1) - 1
    return paddle.clip(counted if before is None else counted + before.unsqueeze(1), min=0)


def _next_position(position_ids: Tensor, padding: Tensor | None, before: Tensor | None) -> Tensor:
    """Position [batch] that follows the tokens seen so far; a chunk that is all padding leaves it as it was."""
    following = position_ids.astype("int64") + 1
    if padding is not None:
        following = following * padding[:, -following.shape[1] :].astype("int64")
    last = following.max(axis=1)
    return last if before is None else paddle.maximum(last, before)
