"""Teaches a model which of two answers people prefer: DPO with LoRA, in a plain Paddle loop.

The reference that the model is held to is the model itself with its adapters switched off, so no second copy is loaded.
The pairs are made up here; any file of them in a format of `ernie45.training.data` takes their place.

python examples/dpo.py
python examples/dpo.py --model baidu/ERNIE-4.5-0.3B-Paddle --rate 1e-4 --output my-adapters
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path

import paddle

from ernie45 import ErnieForCausalLM, ErnieTokenizer, lora
from ernie45.losses import Pairs, PreferenceLoss, PreferenceOptions, preference_loss
from ernie45.training.data import Batch, DataStream, Encoder
from ernie45.training.objectives import answers

# The share of ordinary learning keeps the chosen answers from becoming less likely together with the rejected ones.
OPTIONS = PreferenceOptions(loss="sigmoid", beta=0.1, sft_weight=1.0)


def write_pairs(path: Path, sums: Iterable[tuple[int, ...]]) -> None:
    """Sums worked out from the left, which is preferred here, or from the right: a pair in each line."""
    lines = []
    for tens, ones, more_tens, more_ones in sums:
        left, right = f"{tens}+{more_tens}={tens + more_tens}", f"{ones}+{more_ones}={ones + more_ones}"
        result = f"{tens + more_tens}{ones + more_ones}"
        question = f"{tens}{ones}+{more_tens}{more_ones}=?"
        sides = {"chosen": f"{left}, {right}. {result}", "rejected": f"{right}, {left}. {result}"}
        lines.append({"question": question, **sides})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def compare(model: ErnieForCausalLM, batch: Batch) -> PreferenceLoss:
    """How much more the model prefers the chosen answers than its adapter-free base does."""
    with paddle.no_grad(), lora.disabled(model):
        reference = answers(model, batch)
    return preference_loss(Pairs.of(answers(model, batch), reference), OPTIONS)


def report(model: ErnieForCausalLM, tokenizer: ErnieTokenizer, held_out: Batch) -> str:
    """Of pairs that are not learned from, and what the model says to one of these questions."""
    model.eval()
    with paddle.no_grad():
        found = compare(model, held_out)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "34+12=?"}])
    ids, _ = model.generate(prompt, tokenizer=tokenizer, max_new_tokens=32, do_sample=False)
    model.train()
    reply = tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
    return f"accuracy {found.accuracy:.2f}, margin {found.margin:.3f}, 34+12=?  ->  {reply}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output", help="folder for the adapters")
    options = parser.parse_args()
    paddle.seed(0)

    tokenizer = ErnieTokenizer.from_pretrained(options.model)
    model = ErnieForCausalLM.from_pretrained(options.model, dtype="float32")
    lora.apply(model, rank=options.rank)
    optimizer = paddle.optimizer.AdamW(options.rate, parameters=lora.parameters(model), weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder:
        pairs, others = Path(folder) / "pairs.jsonl", Path(folder) / "held-out.jsonl"
        sums = random.Random(0).sample([*permutations((1, 2, 3, 4, 5), 4)], 40)
        write_pairs(pairs, sums[:32])
        write_pairs(others, sums[32:])
        encoder = Encoder(tokenizer, max_length=512)
        held_out = next(DataStream([others], encoder, epochs=1))
        print(f"before: {report(model, tokenizer, held_out)}")
        batches = DataStream([pairs], encoder)
        for step, batch in zip(range(1, options.steps + 1), batches, strict=False):
            found = compare(model, batch)
            found.total.backward()
            optimizer.step()
            optimizer.clear_grad()
            if step % 5 == 0 or step == 1:
                print(f"step {step}: loss {float(found.total):.4f}, {len(batch.pairs)} pairs")
    print(f"after:  {report(model, tokenizer, held_out)}")
    if options.output:
        lora.save(model, options.output)


if __name__ == "__main__":
    main()
