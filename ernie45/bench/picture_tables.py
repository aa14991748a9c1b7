"""The tables of a report that are about pictures and videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ernie45.bench.limits import (
    STORAGES,
    operations_per_token,
    operations_per_vision_token,
    picture_operations,
    picture_tokens,
)
from ernie45.bench.measure import Result
from ernie45.bench.plan import AnswerTask, EncodeTask, Plan
from ernie45.bench.speeds import Figure, Speed, decode_speed, number, product_speed, table
from ernie45.config import ErnieConfig
from ernie45.memory import format_bytes

BASELINE = "transformers"  # whose fastest dtype others are compared with

NOTE = (
    "Seconds are those of vision tower and adapter on random pixels. Limits count their products with weights and the "
    "attention inside each frame; for the first token also the decoder. The pixels that transformers gets are "
    "normalised already; the faster of its dtypes is what others are compared with. Memory is what the largest picture "
    "took in the first round on top of what the process held before. Text tasks above use the experts for text alone; "
    "peak memory includes pictures. llama.cpp and PaddleFormers are not measured on vision-language models."
)


class PictureTables:
    """Tables in Markdown.

    Args:
        config: architecture, with vision.
        plan: what was measured.
        results: of each contender, by name.
    """

    def __init__(self, config: ErnieConfig, plan: Plan, results: Mapping[str, Result]):
        self.config, self.plan, self.results = config, plan, results

    def __iter__(self) -> Iterator[str]:
        """All of them, and what they mean."""
        yield "## Pictures"
        for task in self.plan.media:
            yield self._encode_table(task)
        yield from self._together_table()
        yield self._answer_table()
        yield NOTE

    def _encode_table(self, task: EncodeTask) -> str:
        vision = self.config.vision
        assert vision is not None
        tokens = picture_tokens(vision, task.frames, task.height, task.width)
        seconds = {name: self._seconds(name, task) for name in self.results}
        head = [f"{task}: {tokens} tokens", "seconds", "tokens/s", "of its limit", *_compared_head(seconds)]
        rows = []
        for name, own in seconds.items():
            share = self._encode_speed(name, task).share.median
            rows.append(
                [name, own.text(), number(tokens / own.median), f"{share:.2f}", *_compared(own.median, seconds)]
            )
        return table(head, rows)

    def _together_table(self) -> Iterator[str]:
        task, single = self.plan.together_task, self.plan.largest_picture
        rows = []
        for name, result in self.results.items():
            if task in result.samples:
                pairs = zip(result.samples[task], result.samples[single], strict=True)
                ratio = Figure.of([several.prefill / one.prefill for several, one in pairs])
                share = self._encode_speed(name, task).share.median
                rows.append([name, self._seconds(name, task).text(), f"{share:.2f}", ratio.text()])
        if rows:
            yield table([f"{task}, at once", "seconds", "of its limit", "times as long as one"], rows)

    def _answer_table(self) -> str:
        task, largest = self.plan.answer_task, self.plan.largest_picture
        seconds = {name: self._seconds(name, task) for name in self.results}
        head = [
            f"prompt of a picture of {task.width}x{task.height} and {task.text} tokens of text",
            "first token after: seconds",
            "of its limit",
            *_compared_head(seconds),
            f"decode {task.new} after it: tokens/s",
            "of its limit",
            f"memory for {largest}",
        ]
        return table(head, [self._answer_row(name, task, seconds) for name in self.results])

    def _answer_row(self, name: str, task: AnswerTask, seconds: Mapping[str, Figure]) -> list[str]:
        result = self.results[name]
        storage, samples = STORAGES[result.contender.storage], result.samples[task]
        first = product_speed(storage, 1, self._operations_of_prompt(task), samples)
        decode = decode_speed(self.config, storage, 1, samples)
        return [
            name,
            seconds[name].text(),
            f"{first.share.median:.2f}",
            *_compared(seconds[name].median, seconds),
            decode.rate.text(),
            f"{decode.share.median:.2f}",
            "unknown" if result.picture_bytes is None else format_bytes(result.picture_bytes),
        ]

    def _operations_of_prompt(self, task: AnswerTask) -> float:
        """Vision tower, adapter and decoder; the two tokens around the picture go to the experts for vision too."""
        vision = self.config.vision
        assert vision is not None
        tokens = picture_tokens(vision, 1, task.height, task.width) + 2
        decoder = tokens * operations_per_vision_token(self.config) + task.text * operations_per_token(self.config)
        return picture_operations(self.config, 1, task.height, task.width) + decoder

    def _encode_speed(self, name: str, task: EncodeTask) -> Speed:
        result = self.results[name]
        operations = task.count * picture_operations(self.config, task.frames, task.height, task.width)
        return product_speed(STORAGES[result.contender.storage], 1, operations, result.samples[task])

    def _seconds(self, name: str, task: EncodeTask | AnswerTask) -> Figure:
        return Figure.of([sample.prefill for sample in self.results[name].samples[task]])


def _compared_head(seconds: Mapping[str, Figure]) -> list[str]:
    return [f"times as fast as {BASELINE}"] if _baseline(seconds) else []


def _compared(own: float, seconds: Mapping[str, Figure]) -> list[str]:
    """How many times as fast as the fastest transformers; nothing if there was none."""
    return [f"{min(_baseline(seconds)) / own:.2f}" for _ in _baseline(seconds)[:1]]


def _baseline(seconds: Mapping[str, Figure]) -> Sequence[float]:
    return [figure.median for name, figure in seconds.items() if name.startswith(BASELINE)]
