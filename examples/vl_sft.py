"""Teaches a vision-language model to see: fine-tuning on pictures, in a plain Paddle loop.

By default the model is the small one that comes with the package, which has only seen digits, and the pictures are
drawn here. Weights, gradients and moments are float32: for the published models see `ernie45 train`, configs/recipes.

python examples/vl_sft.py
python examples/vl_sft.py --freeze vision_experts --output build/discs
python examples/vl_sft.py --model build/discs --data train.jsonl --rate 1e-4
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import paddle
from PIL import Image, ImageDraw

from ernie45 import ErnieForConditionalGeneration, ErnieProcessor
from ernie45.models.parts import PARTS, freeze
from ernie45.training.data import DataStream, Encoder

COLOURS = ("red", "green", "blue", "yellow")
QUESTION = "Which colour is the disc?"


def draw(colour: str, width: int, height: int) -> Image.Image:
    """A disc on white."""
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).ellipse((10, 10, width - 10, height - 10), fill=colour)
    return picture


def write_data(path: Path) -> None:
    """A question about a picture in each line; paths start at the folder of the file."""
    lines = []
    for colour in COLOURS:
        for width, height in ((56, 56), (84, 56), (56, 112)):
            name = f"{colour}-{width}x{height}.png"
            draw(colour, width, height).save(path.parent / name)
            asked = {"role": "user", "content": f"<image>{QUESTION}"}
            lines.append({"messages": [asked, {"role": "assistant", "content": colour}], "images": [name]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="conversations, a .jsonl file; by default about drawn pictures")
    parser.add_argument("--freeze", nargs="+", choices=PARTS, default=[], help="parts that do not learn")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", help="where to write the fine-tuned model")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.data is None:
            write_data(folder / "discs.jsonl")
        processor = ErnieProcessor.from_pretrained(options.model)
        model = ErnieForConditionalGeneration.from_pretrained(options.model, dtype="float32")
        freeze(model, options.freeze)
        model.train()
        learning = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
        optimizer = paddle.optimizer.AdamW(options.rate, parameters=learning, weight_decay=0.01)
        encoder = Encoder(processor.tokenizer, processor, max_length=512)
        batches = DataStream([options.data or folder / "discs.jsonl"], encoder)
        for step, batch in zip(range(1, options.steps + 1), batches, strict=False):
            loss, _ = model(**batch.inputs())
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            if step % 5 == 0 or step == 1:
                print(f"step {step}: loss {float(loss):.4f}, {len(batch.grid_thw)} pictures")
    model.eval()
    for colour in COLOURS if options.data is None else ():
        print(f"{colour}  ->  {answer(model, processor, draw(colour, 84, 84))}")
    if options.output:
        model.save_pretrained(options.output)
        processor.tokenizer.save_pretrained(options.output)


def answer(model: ErnieForConditionalGeneration, processor: ErnieProcessor, picture: Image.Image) -> str:
    """What the model says about a picture of a size that it has not seen."""
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": QUESTION}]
    inputs = processor([{"role": "user", "content": content}], enable_thinking=False)
    ids, _ = model.generate(**inputs, tokenizer=processor.tokenizer, max_new_tokens=16, do_sample=False)
    return processor.decode(ids[0].tolist(), skip_special_tokens=True)


if __name__ == "__main__":
    main()
