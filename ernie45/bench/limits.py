"""What a token costs at least: bytes of weights to read, operations to compute.

Decoding reads every used weight once per token, so that it cannot be faster than the memory's bandwidth over these
bytes; a prompt cannot be computed faster than products of matrices run. Neither counts attention, whose share grows
with the context, nor the KV cache. Of pictures the attention is counted, because its share is large from the start.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie45.checkpoint.names import TensorSpec, checkpoint_tensors
from ernie45.config import ErnieConfig, VisionConfig
from ernie45.info import active_parameters


@dataclass(frozen=True)
class Storage:
    """How weights lie in memory.

    Attributes:
        linear: bytes per weight of the linear layers, scales of groups included.
        vocabulary: bytes per weight of embedding and head.
        linear_scale, vocabulary_scale: bytes per output channel, for its scale.
        products: dtype of the products of matrices in a long prompt, whose peak is the limit of prefill.
    """

    linear: float
    vocabulary: float
    linear_scale: int = 0
    vocabulary_scale: int = 0
    products: str = "bfloat16"


STORAGES = {
    "float32": Storage(4, 4, products="float32"),
    "bfloat16": Storage(2, 2),
    "wint8": Storage(1, 1, linear_scale=4, vocabulary_scale=4),
    "wint4": Storage(0.5 + 2 / 64, 1, vocabulary_scale=4),  # a bfloat16 scale for 64 weights; vocabulary in int8
    # llama.cpp: blocks of 32 weights with a 16-bit scale; it keeps the vocabulary of Q4_0 in Q6_K, 210 bytes for 256.
    "Q8_0": Storage(34 / 32, 34 / 32),
    "Q4_0": Storage(18 / 32, 210 / 256),
}


def bytes_per_token(config: ErnieConfig, storage: Storage) -> float:
    """Bytes of weights that decoding one token reads: experts as far as chosen, one row of an untied embedding."""
    specs = checkpoint_tensors(config, mtp=False, vision=False)
    return sum(_bytes(config, storage, spec) for spec in specs)


def operations_per_token(config: ErnieConfig) -> float:
    """Operations of the products of one prompt token; the head, needed for the last token only, is not among them."""
    groups = ("embedding", "head", "norms")
    specs = checkpoint_tensors(config, mtp=False, vision=False)
    return 2 * sum(active_parameters(config, spec) for spec in specs if spec.group not in groups)


def operations_per_vision_token(config: ErnieConfig) -> float:
    """As `operations_per_token`, for a token of a picture, which goes to the experts for vision."""
    specs = checkpoint_tensors(config, mtp=False)
    of_experts = sum(spec.size for spec in specs if spec.group == "vision experts")
    text_experts = sum(active_parameters(config, spec) for spec in specs if spec.group == "text experts")
    chosen = of_experts * config.moe_k / config.banks[1].num_experts
    return operations_per_token(config) + 2 * (chosen - text_experts)


def picture_operations(config: ErnieConfig, frames: int, height: int, width: int) -> float:
    """Operations of vision tower and adapter for one picture (frames = 1) or video; sides in pixels."""
    vision = config.vision
    assert vision is not None
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    blocks = frames * patches // vision.merge_size**2
    return frames * _tower_operations(vision, patches) + _adapter_operations(
        config, blocks, picture_tokens(vision, frames, height, width)
    )


def picture_tokens(vision: VisionConfig, frames: int, height: int, width: int) -> int:
    """Tokens of the decoder that one picture or video becomes; sides in pixels."""
    return max(frames // vision.frames_per_token, 1) * (height // vision.factor) * (width // vision.factor)


def _tower_operations(vision: VisionConfig, patches: int) -> float:
    """Of one frame. In each block the products with weights, then scores and weighted sums over all its patches."""
    width = vision.width
    linear = 2 * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = 4 * width * patches
    return patches * (2 * vision.patch_bytes * width + vision.depth * (linear + attention))


def _adapter_operations(config: ErnieConfig, blocks: int, tokens: int) -> float:
    """Two maps for each block of patches, then three for each token."""
    vision = config.vision
    assert vision is not None
    width = vision.width * vision.merge_size**2
    return 2 * (blocks * 2 * width**2 + tokens * width * ((vision.frames_per_token + 1) * width + config.hidden_size))


def _bytes(config: ErnieConfig, storage: Storage, spec: TensorSpec) -> float:
    if spec.float32 or len(spec.shape) == 1:
        return 4 * spec.size
    used = active_parameters(config, spec) / spec.size
    if spec.group == "embedding" and not config.tie_word_embeddings:
        used = 1 / config.vocab_size
    if spec.group in ("embedding", "head"):
        return used * (storage.vocabulary * spec.size + storage.vocabulary_scale * config.vocab_size)
    return used * (storage.linear * spec.size + storage.linear_scale * spec.shape[-1])
