"""A conversation of several turns: the cache is kept, so each turn only computes its new tokens.

python examples/chat.py                               asks a few prepared questions
python examples/chat.py "23+58=?" "Reverse: 4 7 1"    asks yours
"""

from __future__ import annotations

import sys

from ernie45 import ErnieForCausalLM, ErnieTokenizer, PromptCache

QUESTIONS = ["23+58=?", "81-23=?", "45和54哪个大？"]


def main() -> None:
    """Prints the conversation as it comes."""
    tokenizer = ErnieTokenizer.from_pretrained("ernie45-tiny")
    model = ErnieForCausalLM.from_pretrained("ernie45-tiny")
    cache, messages = PromptCache(model.config), []
    for question in sys.argv[1:] or QUESTIONS:
        messages.append({"role": "user", "content": question})
        print(f"User: {question}\nAssistant: ", end="")
        answer = ""
        for piece in model.stream(messages, tokenizer=tokenizer, cache=cache, max_new_tokens=64):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
