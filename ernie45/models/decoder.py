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
        mixed = self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        normed, x = self.post_attention_layernorm.add(mixed, x)
        return x + (self.mlp(normed, banks, routing) if isinstance(self.mlp, MoE) else self.mlp(normed))


@dataclass(frozen=True)
class Place:
    """Where new tokens stand.

    Attributes:
        positions: [batch, sequence], or [batch, sequence, 3] as (time, row, column).
        mask: which keys they see.
        following: [batch, sequence] int64, the position after each token, 0 for padding.
        next_position: [batch] int64, position of the token that would follow all of them.
    """

    positions: Tensor
    mask: AttentionMask
    following: Tensor
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
        self.time_pairs = 0 if config.vision is None else config.vision.time_pairs
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
        banks: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: [batch, sequence] int64. With a cache: only the tokens that are not in it yet.
            position_ids: [batch, sequence], or of a vision-language model [batch, sequence, 3] as (time, row, column);
                by default they count the tokens that are not padding.
            attention_mask: [batch, sequence] with 0 for padding, on either side (with a cache, columns for the
                cached tokens may be in front); or [batch, 1, sequence, cached + sequence] with 1 where a row may
                look, which then replaces the causal order.
            attn_mask_startend_row_indices: [batch, 1, sequence, 1] int, packed documents: the first query row that
                may no longer see the key.
            cache: keys and values to continue from; the new ones are appended to it.
            routing: a list that receives one `Routing` per MoE layer and bank.
            banks: [batch, sequence] int64, the expert bank of each token; None: the first bank.
            features: [count, hidden_size], instead of the embeddings of placeholder tokens, in the order of these.

        Returns:
            [batch, sequence, hidden_size]

        Raises:
            ErnieError: an argument has the wrong shape, or a token id is outside the vocabulary.
        """
        _check_ids(input_ids, self.config.vocab_size)
        if banks is not None and banks.shape != input_ids.shape:
            raise ErnieError(f"banks: expected {input_ids.shape} like input_ids, found {banks.shape}")
        if features is not None:
            input_ids = self.mark_features(input_ids, features)
        place = self.place(input_ids, position_ids, attention_mask, attn_mask_startend_row_indices, cache)
        positions, mask = place.positions, place.mask
        first_keys = None if self.fused is None else self.fused.first_keys(input_ids, positions, mask, routing)
        if self.fused is not None and first_keys is not None:
            hidden = self.fused(input_ids, positions, first_keys, cache, banks, features)
        else:
            hidden = self.norm(self.run_layers(self.embed(input_ids, features), place, cache, routing, banks))
        if cache is not None:
            cache.advance(mask.padding, place.following, place.next_position)
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
            following = start + sequence
            return Place(positions, mask, following.unsqueeze(1) if sequence == 1 else positions + 1, following)
        if position_ids is None:
            position_ids = _padded_positions(sequence, padding, before)
        elif position_ids.shape not in ([batch, sequence], *([[batch, sequence, 3]] if self.time_pairs else [])):
            raise ErnieError(
                f"position_ids: expected [{batch}, {sequence}] like input_ids"
                + (f" or [{batch}, {sequence}, 3]" if self.time_pairs else "")
                + f", found {list(position_ids.shape)}"
            )
        following = _following(position_ids, padding)
        last = following.max(axis=1)
        return Place(position_ids, mask, following, last if before is None else paddle.maximum(last, before))

    def run_layers(
        self,
        x: Tensor,
        place: Place,
        cache: KVCache | None = None,
        routing: list[Routing] | None = None,
        banks: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [batch, sequence, hidden_size] before the final norm, from embeddings of the same shape."""
        rotary = self.rotary(place.positions)
        for layer in self.layers:
            x = layer(x, rotary, place.mask, cache, banks, routing)
        return x

    def mark_features(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Token ids with -1 - i instead of the i-th placeholder, whose embedding is row i of `features`.

        Raises:
            ErnieError: there are not as many features as placeholders.
        """
        vision = self.config.vision
        places = input_ids == (-1 if vision is None else vision.placeholder_id)
        count = int(places.astype("int64").sum())
        if features.shape != [count, self.config.hidden_size]:
            raise ErnieError(
                f"features: expected [{count}, {self.config.hidden_size}], one for each placeholder in input_ids, "
                f"found {list(features.shape)}"
            )
        numbers = paddle.cumsum(places.flatten().astype("int64")).reshape(input_ids.shape)
        return paddle.where(places, -numbers, input_ids)

    def embed(self, input_ids: Tensor, features: Tensor | None = None) -> Tensor:
        """Embeddings [batch, sequence, hidden_size] of ids, where -1 - i stands for row i of `features`."""
        if features is None:
            return self.embed_tokens(input_ids)
        embedded = self.embed_tokens(paddle.clip(input_ids, min=0)).flatten(0, 1)
        rows = paddle.nonzero(input_ids.flatten() < 0).flatten()
        return paddle.scatter(embedded, rows, features.astype(embedded.dtype)).reshape([*input_ids.shape, -1])

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, sequence, 1, head_dim / 2] float32 for position_ids [batch, sequence] or [..., 3]."""
        ratio = self.config.compression_ratio
        positions = position_ids if ratio == 1 else position_ids.astype("float32") / ratio
        return ops.rope_angles(positions, self.config.head_dim, self.config.rope_theta, self.time_pairs)

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
        embeddings, rotary, mask = self.embed_tokens(input_ids), self.rotary(place.positions), place.mask
        hidden = self.run_layers(embeddings[:, :sequence], place)
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


def _following(position_ids: Tensor, padding: Tensor | None) -> Tensor:
    """The position [batch, sequence] int64 after each token, past all three axes; 0 for padding."""
    following = position_ids.astype("int64") + 1
    following = following if following.ndim == 2 else following.max(axis=-1)
    return following if padding is None else following * padding[:, -following.shape[1] :].astype("int64")
