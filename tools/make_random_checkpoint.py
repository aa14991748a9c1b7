"""Writes a full-size checkpoint with plausible random weights, to measure what needs no trained ones.

    python tools/make_random_checkpoint.py --config configs/ernie-4.5-0.3b.json --output /tmp/random-0.3b

Matrices are normal with the initialisation's deviation, norms are 1, correction biases small. Values repeat from a
pool of a few million numbers, since drawing 21 billion would take longer than everything else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

from ernie45.checkpoint.convert import METADATA
from ernie45.checkpoint.dtypes import convert, dtype_from_framework_name
from ernie45.checkpoint.names import LAYOUTS, PADDLE, TensorSpec, checkpoint_tensors
from ernie45.checkpoint.writer import DEFAULT_SHARD_BYTES, TensorPlan, write_checkpoint, write_json_atomic
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError

POOL_SIZE = 2**22 - 3  # coprime to the usual row lengths, so that rows differ


class RandomWeights:
    """Fills tensors from one pool of normal numbers, each from its own offset."""

    def __init__(self, config: ErnieConfig, seed: int):
        self.generator = np.random.default_rng(seed)
        deviation = math.sqrt(0.3333 / config.hidden_size)
        self.pool = self.generator.standard_normal(POOL_SIZE, dtype=np.float32) * np.float32(deviation)
        self.converted: dict[str, np.ndarray] = {}

    def draw(self, spec: TensorSpec, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array of this shape in the storage of the safetensors dtype."""
        if len(shape) == 1:
            value = 0.0 if spec.name.endswith(".bias") else 1.0
            return convert(np.full(shape, value, np.float32), "F32", dtype)
        if dtype not in self.converted:
            self.converted[dtype] = convert(self.pool, "F32", dtype)
        pool, size = self.converted[dtype], math.prod(shape)
        start = int(self.generator.integers(POOL_SIZE))
        return np.resize(np.roll(pool, -start), size).reshape(shape)


def write_random_checkpoint(config: ErnieConfig, folder: Path, layout: str, dtype: str, seed: int, shard: int) -> None:
    """Writes config.json and weights of that architecture."""
    weights = RandomWeights(config, seed)
    plans = [
        TensorPlan(part.name, kind, part.shape, lambda s=spec, p=part, k=kind: weights.draw(s, p.shape, k))
        for spec in checkpoint_tensors(config)
        for kind in ["F32" if spec.float32 else dtype_from_framework_name(dtype)]
        for part in spec.stored(layout)
    ]
    write_checkpoint(folder, plans, metadata=METADATA[layout], max_shard_bytes=shard)
    write_json_atomic(folder / "config.json", config.replace(dtype=dtype).to_dict(layout))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a config.json, for example configs/...json")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--layout", choices=LAYOUTS, default=PADDLE)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=DEFAULT_SHARD_BYTES)
    options = parser.parse_args()
    try:
        config = ErnieConfig.from_dict(json.loads(options.config.read_text()))
        write_random_checkpoint(
            config, options.output, options.layout, options.dtype, options.seed, options.shard_bytes
        )
    except (ErnieError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
