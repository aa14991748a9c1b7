"""Measures a step of fine-tuning beside transformers, in turns, each in a process of its own.

Both have random weights in bfloat16 with float32 masters in AdamW, the same shapes, one sequence, every token learned,
gradients clipped. The limit is what the products cost at the speed of this machine's bfloat16.

python tools/bench_training.py                       the 0.3B shape, 512 tokens
python tools/bench_training.py --sequence 2048 --steps 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ernie45.bench.worker import Worker
from ernie45.memory import format_bytes

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("forward", "backward", "optimizer")
SETTINGS: dict[str, float] = {"learning_rate": 1e-5, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
LARGEST_NORM = 1.0


class Ours:
    """Steps of this library, with the chunked head loss and the fused AdamW."""

    def __init__(self, config: str, threads: int, sequence: int):
        import paddle

        from ernie45.config import ErnieConfig
        from ernie45.models.causal_lm import ErnieForCausalLM
        from ernie45.ops import custom
        from ernie45.runtime import set_num_threads

        set_num_threads(threads)
        custom.library()  # built now if it has to be
        paddle.seed(0)
        self.model = ErnieForCausalLM(ErnieConfig.from_dict(read_config(config)), dtype="bfloat16")
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if not p.stop_gradient]
        with paddle.no_grad():
            self.masters = [p.astype("float32") for p in self.parameters]
        self.moments = [(paddle.zeros_like(m), paddle.zeros_like(m)) for m in self.masters]
        ids = paddle.to_tensor(draw(config, sequence))
        self.ids, self.labels = ids[:, :-1], ids[:, 1:]
        self.number = 0

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
        matrices = sum(p.size for p in self.parameters if p.ndim > 1)
        tokens, config = self.ids.shape[1], self.model.config
        width = config.num_attention_heads * config.head_dim
        attention = 2 * tokens**2 * width * config.num_hidden_layers  # scores and sums, one half of each visible
        return {"operations": 3.0 * (2 * matrices * tokens + attention), "bytes": 28.0 * matrices}


class Transformers:
    """Steps of the Hugging Face implementation, with the fused AdamW of torch on the masters."""

    def __init__(self, config: str, threads: int, sequence: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        raw = read_config(config)
        settings = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        self.model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).train()
        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float() for p in self.parameters]
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

    def step(self) -> dict[str, float]:
        """Seconds of the parts, and the loss."""
        times = [time.perf_counter()]
        loss = self.model(self.ids, shift_labels=self.labels, labels=self.labels, use_cache=False).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self._update()
        times.append(time.perf_counter())
        return dict(zip(PARTS, np.diff(times).tolist(), strict=True), loss=float(loss))

    def _update(self) -> None:
        import torch

        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, LARGEST_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def read_config(path: str) -> dict[str, Any]:
    """The config.json."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def draw(config: str, sequence: int) -> np.ndarray:
    """Random ids [1, sequence + 1]."""
    return np.random.default_rng(0).integers(3, read_config(config)["vocab_size"], (1, sequence + 1))


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each contender the times of every step, and its peak of memory; for the machine its limits."""
    arguments = {"config": str(options.config), "threads": options.threads, "sequence": options.sequence}
    targets = {"ernie45": "bench_training:Ours", "transformers": "bench_training:Transformers"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    results: dict[str, dict[str, Any]] = {}
    with Worker("machine", "ernie45.bench.machine:Machine", {"threads": options.threads}) as machine:
        workers = {name: Worker(name, target, arguments) for name, target in targets.items()}
        try:
            for worker in workers.values():
                worker.call("step")  # the first one allocates
            steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
            limits = []
            for number in range(options.steps):
                limits.append(machine.call("measure"))
                for name, worker in workers.items():
                    steps[name].append(worker.call("step"))
                    print(f"step {number + 1}: {name} {steps[name][-1]}", file=sys.stderr, flush=True)
            results = {name: {"steps": steps[name], "peak": worker.peak_bytes} for name, worker in workers.items()}
            costs = workers["ernie45"].call("limit")
        finally:
            for worker in workers.values():
                worker.close()
    best = {key: max(limit[key] for limit in limits) for key in limits[0]}
    seconds = costs["operations"] / (best["bfloat16"] or best["float32"]) + costs["bytes"] / best["bandwidth"]
    return {**results, "limit": {"seconds": seconds, **best}}


def report(results: dict[str, dict[str, Any]], sequence: int) -> str:
    """A table of medians, fastest steps and memory."""
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
    ratio = medians["transformers"] / medians["ernie45"]
    return "\n".join(
        [
            *lines,
            "",
            f"ernie45 takes 1 / {ratio:.2f} of the time of transformers (medians of steps in turns).",
            f"Limit: {sequence / limit['seconds']:.1f} tokens/s, "
            f"from {limit['bfloat16'] / 1e9:.0f} GFLOP/s in bfloat16 and {limit['bandwidth'] / 1e9:.1f} GB/s; "
            f"ernie45 reaches {limit['seconds'] / medians['ernie45']:.0%} of it.",
        ]
    )


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ernie-4.5-0.3b.json")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each, after one that is not")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print(report(measure(options), options.sequence))


if __name__ == "__main__":
    main()
