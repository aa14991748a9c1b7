"""Asks several questions about a video; it is read and encoded once.

python examples/ask_video.py examples/media/clip.gif "What came after 4?" "When did 9 appear?"
python examples/ask_video.py rain.mp4 "When does it begin to rain?" --model baidu/ERNIE-4.5-VL-28B-A3B-Paddle

The model that comes with the package reads handwritten digits and knows nothing else. Other files than animated
pictures need PyAV: pip install ".[video]"
"""

from __future__ import annotations

import argparse

from ernie45 import ErnieForConditionalGeneration, ErnieProcessor, PromptCache


def main() -> None:
    """Prints the answers as they come."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("video", help="file or URL")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", default="ernie45-tiny", help="folder or hub name")
    parser.add_argument("--quantization", choices=("wint8", "wint4"), help="quantise the weights while loading")
    parser.add_argument("--max-frames", type=int, default=180)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args()

    processor = ErnieProcessor.from_pretrained(options.model, max_frames=options.max_frames)
    video = {"type": "video_url", "video_url": {"url": options.video}}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": options.questions[0]}]}]
    inputs = processor(messages)  # a video that cannot be read is reported before the long work
    frames, rows, columns = inputs["grid_thw"][0].tolist()
    print(f"{frames} frames of {columns * 14} x {rows * 14} pixels, {inputs['input_ids'].shape[1]} tokens of prompt")

    model = ErnieForConditionalGeneration.from_pretrained(options.model, quantization=options.quantization)
    cache = PromptCache(model.config)
    for number, question in enumerate(options.questions):
        if number:
            messages.append({"role": "user", "content": question})
            inputs = processor(messages)
        print(f"User: {question}\nAssistant: ", end="")
        answer = ""
        for piece in model.stream(
            inputs, tokenizer=processor.tokenizer, cache=cache, max_new_tokens=options.max_new_tokens
        ):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer or "..."})


if __name__ == "__main__":
    main()
