"""Asks the small model that comes with the package three questions and prints how fast it answers.

python examples/demo.py
"""

from __future__ import annotations

import time

from ernie45 import ErnieForCausalLM, ErnieTokenizer

QUESTIONS = ("23+58=?", "478加256等于多少？", "What is the number of layers of ERNIE-4.5-21B-A3B?")


def main() -> None:
    """Streams the answers."""
    start = time.perf_counter()
    tokenizer = ErnieTokenizer.from_pretrained("ernie45-tiny")
    model = ErnieForCausalLM.from_pretrained("ernie45-tiny")
    print(f"Loaded ernie45-tiny in {time.perf_counter() - start:.2f} s\n")

    tokens, start = 0, time.perf_counter()
    for question in QUESTIONS:
        print(f"User: {question}\nAssistant: ", end="", flush=True)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        answer = ""
        for piece in model.stream(prompt, tokenizer=tokenizer, max_new_tokens=32):
            print(piece, end="", flush=True)
            answer += piece
        print("\n")
        tokens += len(prompt) + len(tokenizer.encode(answer))
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens read and written in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
