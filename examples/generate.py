"""Continues or answers one prompt.

python examples/generate.py "81-23=?"
python examples/generate.py --model baidu/ERNIE-4.5-0.3B-Paddle --sample "Write a haiku about Beijing."
"""

from __future__ import annotations

import argparse

from ernie45 import ErnieForCausalLM, ErnieTokenizer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="?", default="81-23=?")
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the most likely token")
    options = parser.parse_args()

    tokenizer = ErnieTokenizer.from_pretrained(options.model)
    model = ErnieForCausalLM.from_pretrained(options.model)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": options.prompt}])
    ids, scores = model.generate(
        prompt, tokenizer=tokenizer, max_new_tokens=options.max_new_tokens, do_sample=options.sample, seed=0
    )
    print(tokenizer.decode(ids[0].tolist(), skip_special_tokens=True))
    print(f"mean log-probability of a token: {float(scores[0]):.3f}")


if __name__ == "__main__":
    main()
