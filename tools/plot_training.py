"""Draws a run of examples/train_tiny.py: learning curve, expert load before and after, accuracy per task.

    pip install matplotlib
    python tools/plot_training.py build/tiny docs/ernie45-tiny.png

Reads the run's training.json, to which `tools/tiny_accuracy.py --json` adds the accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def smooth(values: list[float], window: int = 15) -> list[float]:
    """Mean of each value and the ones before it."""
    return [sum(values[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(values))]


def draw_curve(axes: Any, report: dict[str, Any]) -> None:
    """Loss of the answers and the share of their tokens predicted rightly, over millions of tokens."""
    tokens = [point["step"] / report["steps"] * report["tokens"] / 1e6 for point in report["curve"]]
    axes.plot(tokens, smooth([point["loss"] for point in report["curve"]]), color="tab:red", label="loss")
    axes.plot(tokens, smooth([point["right"] for point in report["curve"]]), color="tab:blue", label="tokens right")
    axes.set(xlabel="million tokens", title="Learning", ylim=(0, 2))
    axes.legend()


def draw_load(axes: Any, report: dict[str, Any]) -> None:
    """How many times the mean load the busiest expert carries, per layer."""
    layers = list(report["expert_load_at_start"])
    for offset, key, label in ((-0.2, "expert_load_at_start", "first step"), (0.2, "expert_load_at_end", "last step")):
        axes.bar([i + offset for i in range(len(layers))], [report[key][layer] for layer in layers], 0.4, label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xticks=range(len(layers)), title="Busiest expert, times the mean load")
    axes.set_xticklabels([f"layer {layer}" for layer in layers])
    axes.legend()


def draw_accuracy(axes: Any, accuracy: dict[str, Any]) -> None:
    """Share of held-out questions answered rightly, per task."""
    shares = {task: numbers["accuracy"] for task, numbers in accuracy.items()}
    axes.barh(list(shares), list(shares.values()), color="tab:green")
    axes.axvline(0.9, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), title="Right answers to held-out questions")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="output folder of train_tiny.py")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    report = json.loads((options.run / "training.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 3 if "accuracy" in report else 2, figsize=(15, 4), layout="constrained")
    draw_curve(axes[0], report)
    draw_load(axes[1], report)
    if "accuracy" in report:
        draw_accuracy(axes[2], report["accuracy"])
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
