"""Measures loading, prefill and decoding of a checkpoint, beside what this machine allows.

    python tools/bench.py                                    the small model that comes with the package
    python tools/bench.py --model /tmp/random-0.3b --dtype float32

The limits come from the same run: decoding cannot be faster than reading every used weight once (bytes over read
bandwidth), prefill not faster than the matrix products (operations over the best rate of a large product).
Load and peak memory are measured in a process of their own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle

from ernie45 import ErnieForCausalLM, KVCache
from ernie45.checkpoint.names import checkpoint_tensors
from ernie45.info import active_parameters
from ernie45.memory import format_bytes
from ernie45.runtime import physical_cores, prepare_cpu

LOAD_SCRIPT = """
import json, sys, time
import paddle
from ernie45 import ErnieForCausalLM
def high_water():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
paddle.zeros([1])
before, start = high_water(), time.perf_counter()
model = ErnieForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2], progress=False)
seconds = time.perf_counter() - start
held = sum(p.numel().item() * p.element_size() for p in model.parameters())
print(json.dumps({"seconds": seconds, "before": before, "peak": high_water(), "held": held}))
"""


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Shortest of several runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth() -> float:
    """Bytes per second at which all cores together read 1 GB of memory (the maximum of float32 numbers)."""
    cores = physical_cores()
    parts = [np.ones(2**28 // cores, np.float32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        seconds = best_seconds(lambda: list(pool.map(np.max, parts)), 5)
    return sum(part.nbytes for part in parts) / seconds


def matmul_rate() -> float:
    """Float32 operations per second of a large matrix product in Paddle."""
    size = 2048
    square = paddle.ones([size, size])
    return 2 * size**3 / best_seconds(lambda: paddle.matmul(square, square), 5)


def measure_load(model: str, dtype: str) -> dict[str, float]:
    """Seconds to load, bytes held, and the growth of peak resident memory, in a fresh process."""
    command = [sys.executable, "-c", LOAD_SCRIPT, model, dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@paddle.no_grad()
def measure_speed(model: ErnieForCausalLM, prompt: int, new: int) -> tuple[float, float]:
    """Prefill and decode rates in tokens per second, batch of one."""
    ids = paddle.to_tensor(np.random.default_rng(0).integers(3, model.config.vocab_size, [1, prompt]))
    cache = KVCache(model.config, prompt + new)

    def prefill() -> None:
        cache.truncate(0)
        model.lm_head(model.ernie(ids, cache=cache)[:, -1]).numpy()

    def decode() -> None:
        token = ids[:, :1]
        for _ in range(new):
            token = model.lm_head(model.ernie(token, cache=cache)[:, -1:]).argmax(-1)
        token.numpy()

    prefill_rate = prompt / best_seconds(prefill, 3)
    cache.truncate(prompt)
    return prefill_rate, new / best_seconds(decode, 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ernie45-tiny", help="checkpoint folder or name")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    options = parser.parse_args()
    prepare_cpu()
    load = measure_load(options.model, options.dtype)
    model = ErnieForCausalLM.from_pretrained(options.model, dtype=options.dtype, progress=False)
    bandwidth, rate = read_bandwidth(), matmul_rate()
    prefill, decode = measure_speed(model, options.prompt, options.new)
    specs = checkpoint_tensors(model.config, vision=False)
    active = sum(active_parameters(model.config, spec) for spec in specs)
    decode_limit = bandwidth / (active * (4 if options.dtype == "float32" else 2))
    prefill_limit = rate / (2 * active)
    print(f"{options.model}, {options.dtype}, on {cpu_name()}, {physical_cores()} cores, Paddle {paddle.__version__}\n")
    print("| what | measured | limit of this machine | share |\n|---|---|---|---|")
    print(f"| load | {load['seconds']:.2f} s | | |")
    held, peak = load["held"], load["peak"] - load["before"]
    print(f"| peak memory while loading | {format_bytes(peak)} | {format_bytes(held)} of weights | {peak / held:.2f} |")
    for what, found, limit in (
        (f"prefill of {options.prompt} tokens", prefill, prefill_limit),
        (f"decode of {options.new} tokens", decode, decode_limit),
    ):
        print(f"| {what} | {found:.1f} tokens/s | {limit:.1f} tokens/s | {found / limit:.2f} |")
    print(f"\nread bandwidth {bandwidth / 1e9:.1f} GB/s, float32 matrix products {rate / 1e9:.0f} GFLOP/s")


def cpu_name() -> str:
    """Model name of the processor."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
