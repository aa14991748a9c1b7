"""quantization_config: there and back, published spellings, and refusals that name the scheme."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ernie45.config import ErnieConfig
from ernie45.errors import ConfigError
from ernie45.quantization.config import QuantizationConfig
from tests.helpers.tiny import DENSE, MOE, tiny_config


@pytest.mark.parametrize("base", [DENSE, MOE])
@pytest.mark.parametrize(
    "quantization",
    [
        QuantizationConfig.uniform("wint8"),
        QuantizationConfig.uniform("wint4", "bfloat16"),
        QuantizationConfig.uniform("wint8", "wint4"),
        QuantizationConfig("wint8", "wint4"),
    ],
)
def test_written_and_read_again_it_is_the_same(base: dict[str, Any], quantization: QuantizationConfig) -> None:
    config = tiny_config(base, quantization_config=quantization, extra={"hidden_act": "silu"})
    written = json.loads(json.dumps(config.to_dict()))
    again = ErnieConfig.from_dict(written)
    assert again.quantization_config == quantization
    assert again.to_dict() == written
    assert again.extra["hidden_act"] == "silu"


def test_the_keys_by_which_others_know_it() -> None:
    written = tiny_config(quantization_config=QuantizationConfig.uniform("wint4")).to_dict()
    assert written["is_quantized"] is True
    assert written["quantization_config"] == {
        "quantization": "wint4",
        "dense_quant_type": "wint4",
        "moe_quant_type": "wint4",
        "embedding_quant_type": "wint8",
        "group_size": 64,
        "is_quantized": True,
    }
    assert QuantizationConfig("wint8", "wint4").to_dict()["quantization"] == "mix_quant"


def test_a_config_that_is_not_quantised_says_nothing() -> None:
    written = ErnieConfig.from_dict({**DENSE, "is_quantized": False}).to_dict()
    assert "quantization_config" not in written and "is_quantized" not in written


def test_one_key_for_everything_and_an_embedding_that_is_not_mentioned() -> None:
    config = QuantizationConfig.from_dict({"quantization": "wint8"})
    assert (config.dense_quant_type, config.moe_quant_type, config.embedding_quant_type) == (
        "wint8",
        "wint8",
        "bfloat16",
    )
    assert "group_size" not in config.to_dict() and QuantizationConfig.from_dict(config.to_dict()) == config


PUBLISHED = {
    "2 bits": {"dense_quant_type": "wint8", "moe_quant_type": "w4w2", "quantization": "wint2"},
    "w4a8": {"dense_quant_type": "wint8", "moe_quant_type": "w4a8", "quantization": "mix_quant"},
    "fp8": {
        "dense_quant_type": "block_wise_fp8",
        "moe_quant_type": "block_wise_fp8",
        "kv_cache_quant_type": "float8_e4m3fn",
        "quantization": "mix_quant",
    },
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PUBLISHED["2 bits"], "moe_quant_type 'w4w2' is not supported (supported: wint8, wint4); take the checkpoint"),
        (PUBLISHED["w4a8"], "moe_quant_type 'w4a8' is not supported"),
        (PUBLISHED["fp8"], "dense_quant_type 'block_wise_fp8' is not supported"),
        ({}, "dense_quant_type None is not supported"),
        ({"quantization": "wint4", "group_size": 128}, "group_size 128 is not supported, expected 64 for wint4"),
        ({"quantization": "wint4"}, "group_size None is not supported"),
        ({"quantization": "wint8", "embedding_quant_type": "int3"}, "embedding_quant_type 'int3' is not supported"),
        ({"quantization": ["wint8"]}, "dense_quant_type ['wint8'] is not supported"),
        ("wint8", "quantization_config must be an object, found str"),
    ],
)
def test_refusals(content: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ErnieConfig.from_dict({**DENSE, "quantization_config": content})
    assert message in str(caught.value)
