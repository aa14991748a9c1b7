"""Draws which experts the words and the pictures of a prompt chose, layer by layer.

    pip install "ernie45[bench]"
    python tools/router_heatmap.py --model ERNIE-4.5-VL-28B-A3B-PT --image photo.jpg --prompt "What is this?"
    python tools/router_heatmap.py --prompt "23+58=?" --output router.png         # a text model: ernie45-tiny

A panel for text tokens and one for vision tokens (pictures, videos, and the tokens around them). A row is a layer, a
column an expert, the banks side by side; colour says which share of their choices fell on it. A table goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie45 import ErnieConfig, ErnieForCausalLM, ErnieForConditionalGeneration, ErnieProcessor, ErnieTokenizer
from ernie45.assistant import user_message
from ernie45.errors import ErnieError
from ernie45.models.moe import Routing

KINDS = ("text", "vision")  # of the tokens that belong to the first and to the second bank of experts


@dataclass(frozen=True)
class Choices:
    """How often the tokens of one kind chose each expert.

    Attributes:
        bank: the bank that they belong to; its experts are the only ones that they can choose.
        layers: indices of the decoder layers that have experts.
        counts: [layers, banks, experts] int64.
    """

    bank: int
    layers: tuple[int, ...]
    counts: np.ndarray

    @property
    def kind(self) -> str:
        """ "text" or "vision"."""
        return KINDS[self.bank]

    @property
    def shares(self) -> np.ndarray:
        """[layers, banks * experts]: of all choices in the layer, those of this expert."""
        flat = self.counts.reshape(len(self.layers), -1)
        return flat / np.maximum(flat.sum(axis=1, keepdims=True), 1)


def count_choices(routing: Sequence[Routing], config: ErnieConfig) -> list[Choices]:
    """The choices of each kind of token that the prompt has.

    Args:
        routing: what the layers of a model of this architecture noted.
    """
    layers = tuple(sorted({step.layer for step in routing}))
    shape = (len(layers), len(config.banks), config.banks[0].num_experts)
    found = {bank: Choices(bank, layers, np.zeros(shape, "int64")) for bank in sorted({step.bank for step in routing})}
    for step in routing:
        found[step.bank].counts[layers.index(step.layer), step.bank] += step.counts.numpy()
    return list(found.values())


def table(choices: Sequence[Choices], k: int) -> str:
    """Markdown: by layer and kind, how many tokens came and how evenly their bank's experts were chosen.

    Args:
        k: experts per token.
    """
    lines = ["| layer | tokens | experts chosen | busiest, times the mean |", "| --- | --- | --- | --- |"]
    for row, layer in enumerate(choices[0].layers):
        for one in choices:
            load = one.counts[row, one.bank]
            tokens, busiest = load.sum() // k, load.max() / max(load.mean(), 1e-9)
            used = f"{np.count_nonzero(load)} of {len(load)}"
            lines.append(f"| {layer} | {tokens} {one.kind} | {used} | {busiest:.2f} |")
    return "\n".join(lines)


def draw(choices: Sequence[Choices], k: int, title: str, file: Path) -> None:
    """One panel for each kind of token, as a PNG file, which is put in place when it is whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, banks, experts = choices[0].counts.shape
    size = (2 + len(choices) * max(5.0, 0.05 * banks * experts), max(3.2, 1.6 + 0.2 * len(choices[0].layers)))
    figure, axes = pyplot.subplots(1, len(choices), figsize=size, squeeze=False, sharey=True, layout="constrained")
    highest = max(one.shares.max() for one in choices)
    for panel, one in zip(axes[0], choices, strict=True):
        colors = _draw_panel(panel, one, k, highest)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(colors, ax=axes[0].tolist(), label="share of the choices in a layer")
    figure.suptitle(title)
    partial = file.with_name(f".{file.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, file)
    finally:
        pyplot.close(figure)
        partial.unlink(missing_ok=True)


def _draw_panel(panel: Any, choices: Choices, k: int, highest: float) -> Any:
    """Draws one kind of token; experts that were never chosen stay grey."""
    _, banks, experts = choices.counts.shape
    panel.set_facecolor("0.9")
    colors = panel.imshow(
        np.ma.masked_equal(choices.shares, 0), aspect="auto", interpolation="none", vmin=0, vmax=highest
    )
    for edge in range(1, banks):
        panel.axvline(edge * experts - 0.5, color="black", linewidth=1)
    panel.set(
        title=f"{choices.counts[0].sum() // k} {choices.kind} tokens",
        xlabel=", ".join(
            f"{bank * experts}..{(bank + 1) * experts - 1} {KINDS[bank]} experts" for bank in range(banks)
        ),
        yticks=range(len(choices.layers)),
        yticklabels=choices.layers,
    )
    return colors


@paddle.no_grad()
def route(options: argparse.Namespace) -> tuple[list[Routing], ErnieConfig]:
    """Runs the model on the prompt: what its routers decided, and its architecture.

    Raises:
        ErnieError: a model without experts, pictures for a text model, or whatever loading or reading raises.
    """
    config = ErnieConfig.from_pretrained(options.model)
    if not config.banks:
        raise ErnieError(f"{options.model}: a dense model, which has no experts to choose from")
    form, routing = {"dtype": options.dtype, "quantization": options.quantization}, []
    if config.vision is not None:
        processor = ErnieProcessor.from_pretrained(options.model)
        inputs = processor([user_message(options.prompt, options.image, options.video)])
        ErnieForConditionalGeneration.from_pretrained(options.model, **form)(**inputs, routing=routing)
        return routing, config
    if options.image or options.video:
        raise ErnieError(f"{options.model}: a text model, which sees no pictures; leave --image and --video out")
    tokenizer = ErnieTokenizer.from_pretrained(options.model)
    ids = tokenizer.apply_chat_template([user_message(options.prompt)])
    ErnieForCausalLM.from_pretrained(options.model, **form)(paddle.to_tensor([ids]), routing=routing)
    return routing, config


def check_output(file: Path) -> None:
    """Says before the long work, not after it, that the picture cannot be drawn or written.

    Raises:
        ErnieError: matplotlib is missing, or the folder.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ErnieError('drawing takes matplotlib: pip install "ernie45[bench]"') from None
    if not file.parent.is_dir():
        raise ErnieError(f"--output {file}: there is no folder {file.parent}; create it first")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name (%(default)s)")
    parser.add_argument("--prompt", required=True, help="the text of the user's message")
    parser.add_argument("--image", action="append", default=[], help="file or address of a picture (repeatable)")
    parser.add_argument("--video", action="append", default=[], help="file or address of a video (repeatable)")
    parser.add_argument("--output", type=Path, default=Path("router.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights in memory")
    parser.add_argument("--quantization", choices=("wint8", "wint4"), help="quantise the weights while loading")
    options = parser.parse_args(arguments)
    try:
        check_output(options.output)
        routing, config = route(options)
        choices = count_choices(routing, config)
        print(table(choices, config.moe_k))
        title = f"Experts that the tokens of a prompt chose, {config.moe_k} each: {Path(options.model).name}"
        draw(choices, config.moe_k, title, options.output)
    except (ErnieError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
