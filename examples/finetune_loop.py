"""Fine-tunes a model in a loop of plain Paddle: the loss comes out of `forward`.

python examples/finetune_loop.py --output build/capitals
python examples/generate.py --model build/capitals "Which city is the capital of France?"
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import paddle

from ernie45 import ErnieForCausalLM, ErnieTokenizer
from ernie45.training.data import DataStream, Encoder

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo"}


def write_data(path: Path) -> None:
    """One conversation in each line, in one of the formats that `ernie45.training.data` reads."""
    lines = [{"src": f"Which city is the capital of {c}?", "tgt": f"{city}."} for c, city in CAPITALS.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", help="where to write the fine-tuned model")
    options = parser.parse_args()

    tokenizer = ErnieTokenizer.from_pretrained(options.model)
    model = ErnieForCausalLM.from_pretrained(options.model, dtype="float32")
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters(), weight_decay=0.01)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "capitals.jsonl")
        batches = DataStream([Path(folder) / "capitals.jsonl"], Encoder(tokenizer, max_length=128))
        for step, batch in zip(range(1, options.steps + 1), batches, strict=False):
            loss, _ = model(**batch.inputs())
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            if step % 10 == 0 or step == 1:
                print(f"step {step}: loss {float(loss):.4f}")
    model.eval()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Which city is the capital of Japan?"}])
    print("".join(model.stream(prompt, tokenizer=tokenizer, max_new_tokens=16)))
    if options.output:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
