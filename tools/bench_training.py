"""Measures a step of fine-tuning beside transformers, in turns, each in a process of its own.

Both have random weights in bfloat16 with float32 masters in AdamW, the same shapes, one sequence, every token learned,
gradients clipped. The limit is what the products cost at the speed of this machine's bfloat16.

python tools/bench_training.py                       the 0.3B shape, 512 tokens
python tools/bench_training.py --sequence 2048 --steps 5
python tools/bench_training.py --lora 16             LoRA beside peft, which has to be installed by hand
python tools/bench_training.py --lora 16 --bases bfloat16 packed wint8 wint4

With --lora, both train float32 adapters of that rank beside all linear weights of the layers, frozen in bfloat16; ours
also beside packed weights. peft has separate adapters where our weights are fused (Q, K and V; gate and up).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ernie45.bench.worker import Worker
from ernie45.memory import format_bytes

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("forward", "backward", "optimizer")
SETTINGS: dict[str, float] = {"learning_rate": 1e-5, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
LARGEST_NORM = 1.0
BASES = ("bfloat16", "packed", "wint8", "wint4")
PEFT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Ours:
    """Steps of this library, with the chunked head loss and the fused AdamW."""

    def __init__(self, config: str, threads: int, sequence: int):
        import paddle

        from ernie45.config import ErnieConfig
        from ernie45.ops import custom
        from ernie45.runtime import set_num_threads

        set_num_threads(threads)
        custom.library()  # built now if it has to be
        paddle.seed(0)
        self.config = ErnieConfig.from_dict(read_config(config))
        self.model, self.parameters = self._build()
        self.model.train()
        with paddle.no_grad():
            self.masters = [p if p.dtype == paddle.float32 else p.astype("float32") for p in self.parameters]
        self.moments = [(paddle.zeros_like(m), paddle.zeros_like(m)) for m in self.masters]
        ids = paddle.to_tensor(draw(config, sequence))
        self.ids, self.labels = ids[:, :-1], ids[:, 1:]
        self.number = 0

    def _build(self) -> tuple[Any, list[Any]]:
        """The model and the parameters to train."""
        from ernie45.models.causal_lm import ErnieForCausalLM

        model = ErnieForCausalLM(self.config, dtype="bfloat16")
        return model, [p for p in model.parameters() if not p.stop_gradient]

    def step(self) -> dict[str, float]:
        """Seconds of the parts, and the loss."""
        from ernie45.losses import chunked_head_loss

        times = [time.perf_counter()]
        hidden = self.model.ernie(self.ids)
        loss = chunked_head_loss(hidden, self.model.ernie.embed_tokens.weight, self.labels, transposed=True)
        times.append(time.perf_counter())
        loss.backward()
        del hidden
        times.append(time.perf_counter())
        self._update()
        times.append(time.perf_counter())
        return dict(zip(PARTS, np.diff(times).tolist(), strict=True), loss=float(loss))

    def _update(self) -> None:
        from ernie45 import ops

        self.number += 1
        norm = sum(ops.sum_of_squares(p.grad) for p in self.parameters) ** 0.5
        step = ops.AdamWStep(self.number, **SETTINGS, scale=min(1.0, LARGEST_NORM / norm))
        for parameter, master, moments in zip(self.parameters, self.masters, self.moments, strict=True):
            ops.adamw_update(parameter, parameter.grad, master, *moments, step)
            parameter.grad = None

    def limit(self) -> dict[str, float]:
        """Operations of the products in a step, and bytes that the optimizer reads and writes."""
        from ernie45.checkpoint.names import checkpoint_tensors

        trained = sum(p.size for p in self.parameters if p.ndim > 1)
        model = sum(math.prod(spec.shape) for spec in checkpoint_tensors(self.config) if len(spec.shape) > 1)
        tokens, config = self.ids.shape[1], self.config
        width = config.num_attention_heads * config.head_dim
        attention = 2 * tokens**2 * width * config.num_hidden_layers  # scores and sums, one half of each visible
        passed = model if trained == model else model + trained  # adapters are weights of their own
        products = 2.0 * tokens * (2 * passed + trained)  # forward, gradients of inputs, gradients of what is trained
        return {"operations": products + 3 * attention, "bytes": 28.0 * trained}


class OursLora(Ours):
    """Steps with adapters beside the weights of this library, which stay as they are stored."""

    def __init__(self, config: str, threads: int, sequence: int, rank: int, base: str):
        self.path, self.rank, self.base = config, rank, base
        super().__init__(config, threads, sequence)

    def _build(self) -> tuple[Any, list[Any]]:
        from ernie45 import lora

        model = super()._build()[0] if self.base == "bfloat16" else self._load_packed()
        lora.apply(model, rank=self.rank)
        return model, lora.parameters(model)

    def _load_packed(self) -> Any:
        from ernie45.models.causal_lm import ErnieForCausalLM

        tool = Path(__file__).with_name("make_random_checkpoint.py")
        kind = [] if self.base == "packed" else ["--quantization", self.base]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(tool), "--config", self.path, "--output", folder, *kind]
            subprocess.run(command, check=True, stdout=sys.stderr)
            return ErnieForCausalLM.from_pretrained(folder, progress=False)


class Transformers:
    """Steps of the Hugging Face implementation, with the fused AdamW of torch on the masters."""

    def __init__(self, config: str, threads: int, sequence: int):
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.model = self._build(read_config(config)).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=SETTINGS["learning_rate"],
            betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
            eps=SETTINGS["epsilon"],
            weight_decay=SETTINGS["weight_decay"],
            fused=True,
        )
        ids = torch.from_numpy(draw(config, sequence))
        self.ids, self.labels = ids[:, :-1], ids[:, 1:]

    def _build(self, raw: dict[str, Any]) -> Any:
        """The model, in which everything to train wants a gradient."""
        import torch
        import transformers

        settings = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)

    def step(self) -> dict[str, float]:
        """Seconds of the parts, and the loss."""
        times = [time.perf_counter()]
        loss = self.model(input_ids=self.ids, shift_labels=self.labels, labels=self.labels, use_cache=False).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self._update()
        times.append(time.perf_counter())
        return dict(zip(PARTS, np.diff(times).tolist(), strict=True), loss=float(loss))

    def _update(self) -> None:
        import torch

        rounded = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        for parameter, master in rounded:
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, LARGEST_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if rounded:
            with torch.no_grad():
                torch._foreach_copy_(*map(list, zip(*rounded, strict=True)))


class Peft(Transformers):
    """Steps with the adapters of peft, which makes them float32 beside weights in bfloat16."""

    def __init__(self, config: str, threads: int, sequence: int, rank: int):
        self.rank = rank
        super().__init__(config, threads, sequence)

    def _build(self, raw: dict[str, Any]) -> Any:
        import peft

        settings = peft.LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=PEFT_TARGETS)
        return peft.get_peft_model(super()._build(raw), settings)


def read_config(path: str) -> dict[str, Any]:
    """The config.json."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def draw(config: str, sequence: int) -> np.ndarray:
    """Random ids [1, sequence + 1]."""
    return np.random.default_rng(0).integers(3, read_config(config)["vocab_size"], (1, sequence + 1))


def contenders(options: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and arguments of each, the one that all are compared with last."""
    arguments = {"config": str(options.config), "threads": options.threads, "sequence": options.sequence}
    if not options.lora:
        return {
            "ernie45": ("bench_training:Ours", arguments),
            "transformers": ("bench_training:Transformers", arguments),
        }
    arguments["rank"] = options.lora
    ours = {f"ernie45 ({base})": ("bench_training:OursLora", {**arguments, "base": base}) for base in options.bases}
    return {**ours, "transformers + peft": ("bench_training:Peft", arguments)}


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each contender the times of every step, and its peak of memory; for the machine its limits."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    results: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    with Worker("machine", "ernie45.bench.machine:Machine", {"threads": options.threads}) as machine:
        try:
            for name, (target, arguments) in contenders(options).items():
                workers[name] = Worker(name, target, arguments)
                workers[name].call("step")  # the first one allocates
            steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
            limits = []
            for number in range(options.steps):
                limits.append(machine.call("measure"))
                for name, worker in workers.items():
                    steps[name].append(worker.call("step"))
                    print(f"step {number + 1}: {name} {steps[name][-1]}", file=sys.stderr, flush=True)
            results = {name: {"steps": steps[name], "peak": worker.peak_bytes} for name, worker in workers.items()}
            costs = next(iter(workers.values())).call("limit")
        finally:
            for worker in workers.values():
                worker.close()
    best = {key: max(limit[key] for limit in limits) for key in limits[0]}
    seconds = costs["operations"] / (best["bfloat16"] or best["float32"]) + costs["bytes"] / best["bandwidth"]
    return {**results, "limit": {"seconds": seconds, **best}}


def report(results: dict[str, dict[str, Any]], sequence: int) -> str:
    """A table of medians, fastest steps and memory, and a comparison with the last contender."""
    limit = results.pop("limit")
    lines = [
        "| | tokens/s (median) | tokens/s (best) | " + " | ".join(f"{part} s" for part in PARTS) + " | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    medians = {}
    for name, result in results.items():
        totals = [sum(step[part] for part in PARTS) for step in result["steps"]]
        medians[name] = statistics.median(totals)
        parts = " | ".join(f"{statistics.median(step[part] for step in result['steps']):.2f}" for part in PARTS)
        speeds = f"{sequence / medians[name]:.1f} | {sequence / min(totals):.1f}"
        lines.append(f"| {name} | {speeds} | {parts} | {format_bytes(result['peak'])} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Limit: {sequence / limit['seconds']:.1f} tokens/s, "
            f"from {limit['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16 and {limit['bandwidth'] / 1e9:.1f} GB/s.",
            *_comparisons(medians, limit["seconds"]),
        ]
    )


def _comparisons(medians: dict[str, float], limit: float) -> Iterable[str]:
    *ours, peer = medians
    for name in ours:
        ratio = medians[peer] / medians[name]
        yield (
            f"{name} takes 1 / {ratio:.2f} of the time of {peer} (medians of steps in turns) "
            f"and reaches {limit / medians[name]:.0%} of the limit."
        )


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ernie-4.5-0.3b.json")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each, after one that is not")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank instead of the weights")
    parser.add_argument(
        "--bases", nargs="+", choices=BASES, default=["bfloat16"], help="how our weights beside adapters are stored"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print(report(measure(options), options.sequence))


if __name__ == "__main__":
    main()
