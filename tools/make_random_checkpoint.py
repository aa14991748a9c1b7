"""Writes a full-size checkpoint with plausible random weights, to measure what needs no trained ones.

    python tools/make_random_checkpoint.py --config configs/ernie-4.5-0.3b.json --output random-0.3b
    python tools/make_random_checkpoint.py --config configs/ernie-4.5-21b-a3b.json --output x --quantization wint4
    python tools/make_random_checkpoint.py --config tools/tiny_vision.json --tokenizer ernie45-tiny --output random-vl

Matrices are normal with the initialisation's deviation, norms are 1, biases 0. Values repeat from a pool of a few
million numbers, since drawing 21 billion would take longer than everything else. Quantised weights are drawn as codes
and scales, so that nothing larger is ever made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ernie45.checkpoint.convert import METADATA
from ernie45.checkpoint.dtypes import convert, dtype_from_framework_name
from ernie45.checkpoint.names import (
    LAYOUTS,
    PADDLE,
    TensorSpec,
    checkpoint_tensors,
    quantised_kind,
    quantised_tensors,
)
from ernie45.checkpoint.writer import DEFAULT_SHARD_BYTES, TensorPlan, write_checkpoint, write_json_atomic
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError
from ernie45.quantization.config import EMBEDDING_CHOICES, GROUP_SIZE, KINDS, WINT8, QuantizationConfig
from ernie45.quantization.weights import quantize
from ernie45.tokenizer import ErnieTokenizer

VISION_TOKENS = {
    "im_patch_id": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token_id": "<|IMAGE_START|>",
    "image_end_token_id": "<|IMAGE_END|>",
    "video_start_token_id": "<|VIDEO_START|>",
    "video_end_token_id": "<|VIDEO_END|>",
}
POOL_SIZE = 2**22 - 3  # coprime to the usual row lengths, so that rows differ


class RandomWeights:
    """Fills tensors from pools of random numbers, each tensor from its own offset.

    What the methods return shares one buffer: it is valid until the next call.
    """

    def __init__(self, config: ErnieConfig, seed: int):
        self.generator = np.random.default_rng(seed)
        deviation = math.sqrt(0.3333 / config.hidden_size)
        self.normal = self.generator.standard_normal(POOL_SIZE, dtype=np.float32) * np.float32(deviation)
        self.pools: dict[str, np.ndarray] = {}
        self.quantised_pools: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.buffer = np.empty(0, np.uint8)

    def weight(self, spec: TensorSpec, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """A float tensor of this shape in the storage of the safetensors dtype."""
        is_bias = spec.name.endswith("bias")  # the correction bias too, which has a row for each bank
        if is_bias or len(shape) == 1:
            return convert(np.full(shape, 0.0 if is_bias else 1.0, np.float32), "F32", dtype)
        if dtype not in self.pools:
            self.pools[dtype] = convert(self.normal, "F32", dtype)
        return self._fill(shape, self.pools[dtype])

    def codes(self, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        """Codes of a normal weight."""
        return self._fill(shape, self._quantised(kind)[0])

    def scales(self, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        """Scales that belong to such codes, though not to these."""
        return self._fill(shape, self._quantised(kind)[1])

    def _quantised(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Pools of codes and scales: those of the normal pool, cut to an odd length so that rows differ."""
        if kind not in self.quantised_pools:
            groups = self.normal[: POOL_SIZE // GROUP_SIZE * GROUP_SIZE].reshape(GROUP_SIZE, -1)
            quantised = quantize(groups, "F32", kind)
            self.quantised_pools[kind] = quantised.codes.ravel()[:-1], quantised.scales.ravel()
        return self.quantised_pools[kind]

    def _fill(self, shape: tuple[int, ...], pool: np.ndarray) -> np.ndarray:
        """An array of that shape from somewhere in the pool on, which repeats."""
        size = math.prod(shape)
        if self.buffer.nbytes < size * pool.itemsize:
            self.buffer = np.empty(size * pool.itemsize, np.uint8)
        array = self.buffer[: size * pool.itemsize].view(pool.dtype)
        start, filled = int(self.generator.integers(pool.size)), 0
        while filled < size:
            piece = pool[start : start + size - filled]
            array[filled : filled + piece.size] = piece
            start, filled = 0, filled + piece.size
        return array.reshape(shape)


def write_random_checkpoint(
    config: ErnieConfig, folder: Path, layout: str, dtype: str, seed: int, shard: int, progress: bool = True
) -> None:
    """Writes config.json and weights of that architecture, quantised where its quantization_config says so.

    Raises:
        ErnieError: a quantised checkpoint in another layout than -Paddle, or the folder cannot be written.
    """
    if config.quantization_config is not None and layout != PADDLE:
        raise ErnieError(f"--layout {layout}: quantised checkpoints have -Paddle names")
    weights = RandomWeights(config, seed)
    plans = [plan for spec in checkpoint_tensors(config) for plan in _plans(weights, spec, config, layout, dtype)]
    write_checkpoint(folder, plans, metadata=METADATA[layout], max_shard_bytes=shard, progress=progress)
    write_json_atomic(folder / "config.json", config.replace(dtype=dtype).to_dict(layout))


def copy_tokenizer(name: str, config: ErnieConfig, folder: Path) -> ErnieConfig:
    """Writes the tokenizer of another checkpoint, and returns the config with the ids that it has for pictures.

    Its chat template goes along only for a text model, because one for text has no place for pictures.

    Raises:
        ErnieError: there is no such tokenizer, or it has more tokens than the vocabulary.
    """
    tokenizer = ErnieTokenizer.from_pretrained(name)
    if len(tokenizer) > config.vocab_size:
        raise ErnieError(f"--tokenizer {name}: has {len(tokenizer)} tokens, but vocab_size is {config.vocab_size}")
    tokenizer.save_pretrained(folder)
    if config.vision is None:
        return config
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content.pop("chat_template", None)
    write_json_atomic(settings, content)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in VISION_TOKENS.items()}
    return config.replace(extra={**config.extra, **ids})


def _plans(
    weights: RandomWeights, spec: TensorSpec, config: ErnieConfig, layout: str, dtype: str
) -> Iterator[TensorPlan]:
    quantization = config.quantization_config
    kind = None if quantization is None else quantised_kind(spec, quantization)
    if kind is None:
        stored = "F32" if spec.float32 else dtype_from_framework_name(dtype)
        for part in spec.stored(layout):
            yield TensorPlan(part.name, stored, part.shape, partial(weights.weight, spec, part.shape, stored))
        return
    codes, scales = quantised_tensors(spec, kind)
    yield TensorPlan(codes.name, codes.dtype, codes.shape, partial(weights.codes, kind, codes.shape))
    yield TensorPlan(scales.name, scales.dtype, scales.shape, partial(weights.scales, kind, scales.shape))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a config.json, for example configs/...json")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--layout", choices=LAYOUTS, default=PADDLE)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--quantization", choices=KINDS, help="write quantised weights")
    parser.add_argument(
        "--embedding", choices=EMBEDDING_CHOICES, default=WINT8, help="embedding and head, if quantised"
    )
    parser.add_argument("--tokenizer", help="copy the tokenizer of this checkpoint, so that texts go in and come out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=DEFAULT_SHARD_BYTES)
    options = parser.parse_args()
    try:
        config = ErnieConfig.from_dict(json.loads(options.config.read_text()))
        if options.quantization is not None:
            quantization = QuantizationConfig.uniform(options.quantization, options.embedding)
            config = config.replace(quantization_config=quantization)
        if options.tokenizer is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            config = copy_tokenizer(options.tokenizer, config, options.output)
        write_random_checkpoint(
            config, options.output, options.layout, options.dtype, options.seed, options.shard_bytes
        )
    except (ErnieError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
