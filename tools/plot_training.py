"""Draws a run of examples/train_tiny.py: learning curves of all stages, expert load of both banks, accuracy per task.

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


def smooth(values: list[float], window: int = 5) -> list[float]:
    """Mean of each value and the ones before it."""
    return [sum(values[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(values))]


def draw_curves(axes: Any, stages: list[dict[str, Any]]) -> None:
    """Loss of the answers and the share of their tokens that were right, over minutes; a line between two stages."""
    begin = 0.0
    for number, stage in enumerate(stages):
        minutes = [begin + point["step"] / stage["steps"] * stage["seconds"] / 60 for point in stage["curve"]]
        for key, colour in (("loss", "tab:red"), ("right", "tab:blue")):
            values = smooth([point[key] for point in stage["curve"]])
            axes.plot(minutes, values, color=colour, label=None if number else key)
        axes.text(begin, 2.02, stage["name"], fontsize=8, rotation=40)
        begin += stage["seconds"] / 60
        axes.axvline(begin, color="grey", linewidth=0.8)
    axes.set(xlabel="minutes on 2 cores", ylim=(0, 2), title="Learning\n\n\n")
    axes.legend()


def draw_load(axes: Any, stage: dict[str, Any]) -> Any:
    """How many times the mean load each expert carries at the end of a stage: a row for each bank and layer."""
    load = stage["expert_load_at_end"]
    rows = [(f"{bank} {layer}", values) for bank, layers in load.items() for layer, values in layers.items()]
    picture = axes.imshow([values for _, values in rows], cmap="viridis", vmin=0, vmax=2, aspect="auto")
    axes.set(xlabel="expert", title=f"Load, times the mean (end of {stage['name']})", yticks=range(len(rows)))
    axes.set_yticklabels([name for name, _ in rows])
    return picture


def last_full(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last stage with many tokens in a step: pairs of replies have few, and with them few pictures."""
    sizes = [stage["tokens"] / max(1, stage["steps"]) for stage in stages]
    return [stage for stage, size in zip(stages, sizes, strict=True) if size > max(sizes) * 0.7][-1]


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
    figure, axes = plt.subplots(1, 3 if "accuracy" in report else 2, figsize=(17, 6), layout="constrained")
    draw_curves(axes[0], report["stages"])
    figure.colorbar(draw_load(axes[1], last_full(report["stages"])), ax=axes[1])
    if "accuracy" in report:
        draw_accuracy(axes[2], report["accuracy"])
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
