"""The architecture of the small model, and the text weights that its vision-language form may begin with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import paddle

from ernie45 import ErnieConfig, ErnieForCausalLM, ErnieForConditionalGeneration, ErnieTokenizer

# ERNIE-4.5-VL-28B-A3B made small: a dense first layer, then routed experts of two banks beside shared ones. An expert
# of the vision bank has a third of the width of one of the text bank.
MODEL: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "model_type": "ernie4_5_moe_vl",
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "moe_num_experts": [16, 16], "moe_k": 2, "moe_intermediate_size": [160, 52], "moe_num_shared_experts": 1,
    "moe_layer_start_index": [1, 1], "moe_layer_end_index": [3, 3], "moe_layer_interval": 1, "moe_use_aux_free": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "pixel_hidden_size": 64, "spatial_conv_size": 2, "temporal_conv_size": 2, "use_temporal_conv": True,
    "rope_3d": True, "freq_allocation": 4,
    "vision_config": {"model_type": "DFNRope_vision_transformer", "depth": 4, "embed_dim": 64, "hidden_size": 64,
                      "hidden_act": "quick_gelu", "mlp_ratio": 2, "num_heads": 4, "in_channels": 3, "patch_size": 14,
                      "spatial_merge_size": 2},
}  # fmt: skip
VISION_TOKENS = {
    "im_patch_id": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token_id": "<|IMAGE_START|>",
    "image_end_token_id": "<|IMAGE_END|>",
    "video_start_token_id": "<|VIDEO_START|>",
    "video_end_token_id": "<|VIDEO_END|>",
}


def make_model(tokenizer: ErnieTokenizer, **changes: Any) -> ErnieForConditionalGeneration:
    """The model with random weights; `changes` are keys of config.json that differ from `MODEL`."""
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in VISION_TOKENS.items()}
    vocabulary = math.ceil(len(tokenizer) / 64) * 64
    model = ErnieForConditionalGeneration(ErnieConfig.from_dict({**MODEL, **ids, "vocab_size": vocabulary, **changes}))
    shrink_residual_outputs(model)
    return model


@paddle.no_grad()
def shrink_residual_outputs(model: ErnieForConditionalGeneration) -> None:
    """Scales what every layer adds to the stream by 1 / sqrt(2 layers) at the start, as ERNIE's pre-training does."""
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.set_value(parameter / math.sqrt(2 * model.config.num_hidden_layers))


@paddle.no_grad()
def take_text_weights(model: ErnieForConditionalGeneration, source: str | Path) -> None:
    """Gives the text part of the model the weights of a text model: a checkpoint folder or name."""
    own = dict(model.named_parameters())
    for name, weight in ErnieForCausalLM.from_pretrained(source, dtype="float32").named_parameters():
        if own[name].shape == weight.shape:
            own[name].set_value(weight)
        else:  # the correction bias, of which the text bank's is the first row
            own[name].set_value(paddle.concat([weight, own[name][1:]]))
