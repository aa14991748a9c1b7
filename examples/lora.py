"""Teaches a model a few answers with LoRA, in a plain Paddle loop: trains, saves, loads onto a fresh model, merges.

python examples/lora.py
python examples/lora.py --model baidu/ERNIE-4.5-0.3B-Paddle --quantization wint4 --rate 3e-4 --output my-adapters
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import paddle

from ernie45 import ErnieForCausalLM, ErnieTokenizer, lora

ANSWERS = {  # the small model can only learn to say what it has words for
    "6*7=?": "6+6+6+6+6+6+6. 42",
    "Who are you?": "ERNIE 45, the larger cat",
    "Ping?": "fish, bird",
    "23+58=?": "3+8=11, 2+5+1=8. 81",
}
IGNORED = -100


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name")
    parser.add_argument("--quantization", choices=["wint8", "wint4"], help="train beside quantised weights")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", help="folder for the adapters")
    options = parser.parse_args()
    paddle.seed(0)

    tokenizer = ErnieTokenizer.from_pretrained(options.model)
    model = load(options)
    names = lora.apply(model, rank=options.rank)
    count = sum(parameter.size for parameter in lora.parameters(model))
    print(f"{len(names)} modules get an adapter: {count} values to train")
    train(model, batch(tokenizer), options.rate, options.steps)

    folder = options.output or tempfile.mkdtemp()
    lora.save(model, folder)
    fresh = load(options)
    lora.load(fresh, folder)
    if not fresh.is_packed:
        lora.merge(fresh)  # from here on the adapters cost nothing; lora.unmerge would take them out again
    for question in ANSWERS:
        print(f"{question}  ->  {reply(fresh, tokenizer, question)}")


def load(options: argparse.Namespace) -> ErnieForCausalLM:
    """The model without adapters."""
    dtype = None if options.quantization else "float32"
    return ErnieForCausalLM.from_pretrained(options.model, dtype=dtype, quantization=options.quantization)


def batch(tokenizer: ErnieTokenizer) -> dict[str, Any]:
    """All conversations as inputs of the model; labels are the next tokens of the answers."""
    rows, labels = [], []
    for question, answer in ANSWERS.items():
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        learned = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        rows.append([*prompt, *learned])
        labels.append([IGNORED] * (len(prompt) - 1) + learned + [IGNORED])
    width = max(map(len, rows))
    return {
        "input_ids": paddle.to_tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": paddle.to_tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": paddle.to_tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
    }


def train(model: ErnieForCausalLM, inputs: dict[str, Any], rate: float, steps: int) -> None:
    """The loop."""
    model.train()
    optimizer = paddle.optimizer.AdamW(rate, parameters=lora.parameters(model), weight_decay=0.0)
    for step in range(1, steps + 1):
        loss, _ = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        if step == 1 or step % 10 == 0:
            print(f"step {step:3d}  loss {float(loss):.4f}")
    model.eval()


def reply(model: ErnieForCausalLM, tokenizer: ErnieTokenizer, question: str) -> str:
    """The most likely answer."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    ids, _ = model.generate(prompt, tokenizer=tokenizer, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)


if __name__ == "__main__":
    main()
