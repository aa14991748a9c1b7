"""Describes pictures, or answers a question about them.

python examples/describe_image.py examples/media/seven.png
python examples/describe_image.py examples/media/seven.png examples/media/three.png --question "Which digit is larger?"
python examples/describe_image.py photo.jpg --question "What is this?" --model baidu/ERNIE-4.5-VL-28B-A3B-Paddle

The model that comes with the package reads handwritten digits and knows nothing else.
"""

from __future__ import annotations

import argparse

from ernie45 import ErnieForConditionalGeneration, ErnieProcessor, parse_response
from ernie45.chat import prompt_opens_thinking


def main() -> None:
    """Prints the answer as it comes; reasoning, if there is any, in front of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", nargs="+", help="files or URLs")
    parser.add_argument("--question", default="Which digit is this?")
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name")
    parser.add_argument("--quantization", choices=("wint8", "wint4"), help="quantise the weights while loading")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="think before answering")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args()

    processor = ErnieProcessor.from_pretrained(options.model)
    pictures = [{"type": "image_url", "image_url": {"url": image}} for image in options.images]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": options.question}]}]
    inputs = processor(messages, enable_thinking=options.thinking)  # wrong pictures are reported before the long work

    model = ErnieForConditionalGeneration.from_pretrained(options.model, quantization=options.quantization)
    ids, _ = model.generate(**inputs, tokenizer=processor.tokenizer, max_new_tokens=options.max_new_tokens)
    opened = prompt_opens_thinking(processor.apply_chat_template(messages, enable_thinking=options.thinking))
    response = parse_response(processor.decode(ids[0].tolist()), "ernie-45-vl", prompt_opened_thinking=opened)
    if response.reasoning:
        print(f"(thinking: {response.reasoning.strip()})\n")
    print(response.content)
    print(f"[{int(inputs['attention_mask'].sum())} tokens of prompt, {ids.shape[1]} of answer]")


if __name__ == "__main__":
    main()
