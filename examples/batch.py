"""Answers several questions in one batch; every answer is the same as if its question were asked alone.

python examples/batch.py
"""

from __future__ import annotations

from ernie45 import ErnieForCausalLM, ErnieTokenizer

QUESTIONS = ["12+30=?", "What is 230 minus 118?", "5, 9, 13, 17, what comes next?", "星期二过3天是星期几？"]


def main() -> None:
    """Prints one line per question."""
    tokenizer = ErnieTokenizer.from_pretrained("ernie45-tiny")
    model = ErnieForCausalLM.from_pretrained("ernie45-tiny")
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False) for question in QUESTIONS
    ]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pd")
    ids, _ = model.generate(**batch, tokenizer=tokenizer, max_new_tokens=32)
    for question, row in zip(QUESTIONS, ids.tolist(), strict=True):
        print(f"{question}  ->  {tokenizer.decode(row, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
