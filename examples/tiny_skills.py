"""What the small model of `train_tiny.py` learns beyond text: to see, to think before it answers, to call a tool.

A lesson is one exchange: messages as `ErnieProcessor` takes them, the options of the chat template, and the reply. As
in `tiny_tasks.py` one lesson in ten is held out by its operands, and held-out pictures show held-out handwriting.

    rng = random.Random(0)
    lesson = draw_lesson(rng, "sum of two pictures", split="heldout")
    lesson.reply, lesson.answer        # ('3+8=11. 11', '11')
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tiny_pictures import draw_clip, draw_picture
from tiny_tasks import Question, choose_phrasing, is_heldout, sample

from ernie45.chat import Message, parse_response

THREE_DIGIT_SUM = "three-digit addition"  # the task of `tiny_tasks.py`
THOUGHT_END = "\n</think>\n\n"


@dataclass(frozen=True)
class Lesson:
    """One exchange.

    Attributes:
        task: its name.
        messages: the conversation up to the reply.
        reply: what the model shall generate, without the token that ends it.
        answer: the content of the reply after thoughts and steps; "" for a tool call.
        thinking: `enable_thinking` of the template.
        tools: of the template.
        call: the arguments of the tool call that the reply is; None: it is none.
    """

    task: str
    messages: list[Message]
    reply: str
    answer: str
    thinking: bool = False
    tools: list[dict[str, Any]] | None = None
    call: dict[str, Any] | None = field(default=None)


def user(*parts: str | dict[str, Any]) -> Message:
    """A user's message of texts, pictures and videos."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    shown = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": shown}


def picture(pixels: Any) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": pixels}}


def video(frames: Sequence[Any], fps: float) -> dict[str, Any]:
    """A list of frames as a part of a message."""
    return {"type": "video_url", "video_url": {"url": list(frames), "fps": fps}}


# ----------------------------------------------------------------------------------------------------------- pictures

ONE_DIGIT = {
    "zh": ("图中是几？", "这是数字几？", "图里写的是什么数字？", "识别图中的数字。"),
    "en": ("Which digit is this?", "What digit is in the picture?", "Read the digit.", "What is written here?"),
}
SEVERAL_DIGITS = {
    "zh": ("依次读出这些数字。", "各图分别是几？", "按顺序写出图中的数字。"),
    "en": ("Read the digits in order.", "Which digits are these?", "What digits are in the pictures?"),
}
NUMBER = {
    "zh": ("图中的两位数是多少？", "读出图中的数。", "图里写的是哪个数？"),
    "en": ("Which number is this?", "Read the number.", "What number is in the picture?"),
}
SUM = {
    "zh": ("两图数字之和是多少？", "把图中的数字加起来。", "图中数字的和？"),
    "en": ("What is the sum of the digits?", "Add the digits in the pictures.", "What do the digits add up to?"),
}
LARGER = {
    "zh": ("哪个数字更大？", "图中较大的数字是？", "两个数字哪个大？"),
    "en": ("Which digit is larger?", "What is the larger digit?", "Which of the two digits is bigger?"),
}
LARGER_PICTURE = {
    "zh": ("第几张图的数字更大？", "哪张图的数字更大？"),
    "en": ("Which picture shows the larger digit?", "In which picture is the larger digit?"),
}

Draft = tuple[Hashable, list[Any], str, str]  # key, parts of the question, steps, answer


def _asked(rng: random.Random, shown: list[Any], text: str) -> list[Any]:
    """Pictures before the question, or sometimes after it."""
    return [*shown, text] if rng.random() < 0.8 else [text, *shown]


def draw_one_digit(rng: random.Random, split: str) -> Draft:
    """A digit: only its handwriting is held out."""
    digit = rng.randrange(10)
    _, text = choose_phrasing(rng, ONE_DIGIT)
    return None, _asked(rng, [picture(draw_picture(rng, [digit], split))], text), "", str(digit)


def draw_several_digits(rng: random.Random, split: str) -> Draft:
    """Two to four pictures, read in order."""
    digits = [rng.randrange(10) for _ in range(rng.choice((2, 3, 3, 4)))]
    language, text = choose_phrasing(rng, SEVERAL_DIGITS)
    shown = [picture(draw_picture(rng, [digit], split)) for digit in digits]
    return ("digits", *digits), _asked(rng, shown, text), "", ("、" if language == "zh" else " ").join(map(str, digits))


def draw_number(rng: random.Random, split: str) -> Draft:
    """Two digits side by side in one picture."""
    number = rng.randrange(10, 100)
    _, text = choose_phrasing(rng, NUMBER)
    shown = picture(draw_picture(rng, [number // 10, number % 10], split))
    return ("number", number), _asked(rng, [shown], text), "", str(number)


def draw_sum(rng: random.Random, split: str) -> Draft:
    """The sum of two pictures; the pairs are few, and so only their handwriting is held out."""
    first, second = rng.randrange(10), rng.randrange(10)
    _, text = choose_phrasing(rng, SUM)
    shown = [picture(draw_picture(rng, [digit], split)) for digit in (first, second)]
    return None, _asked(rng, shown, text), f"{first}+{second}={first + second}", str(first + second)


def draw_larger(rng: random.Random, split: str) -> Draft:
    """The larger of two digits, or which picture shows it."""
    digits = rng.sample(range(10), 2)
    where = rng.random() < 0.4
    language, text = choose_phrasing(rng, LARGER_PICTURE if where else LARGER)
    shown = [picture(draw_picture(rng, [digit], split)) for digit in digits]
    answer = digits.index(max(digits)) + 1 if where else max(digits)
    steps = ("、" if language == "zh" else ", ").join(map(str, digits))
    return None, _asked(rng, shown, text), steps, str(answer)


# -------------------------------------------------------------------------------------------------------------- clips

AFTER = {
    "zh": ("{digit}后面出现的是几？", "{digit}之后是什么数字？"),
    "en": ("What came after {digit}?", "Which digit followed {digit}?"),
}
WHEN = {
    "zh": ("{digit}什么时候出现？", "第几秒出现{digit}？"),
    "en": ("When did {digit} appear?", "At which second did {digit} appear?"),
}
# Seconds between frames, and for how many frames each digit is shown: digits change at whole seconds.
PACES = ((0.25, 4), (0.5, 2), (0.5, 4), (1.0, 2), (1.5, 2), (2.0, 2))


def draw_film(rng: random.Random, split: str, least: int) -> tuple[list[int], dict[str, Any], list[int]]:
    """Different digits, the clip that shows them, and the second at which each of them appears."""
    gap, frames_each = rng.choice(PACES)
    digits = rng.sample(range(10), rng.randint(least, 4 if frames_each == 2 else 2))
    frames = draw_clip(rng, digits, frames_each, split)
    return digits, video(frames, 1 / gap), [round(place * frames_each * gap) for place in range(len(digits))]


def draw_after(rng: random.Random, split: str) -> Draft:
    """What followed a digit; the steps read the clip as far as needed."""
    digits, film, _ = draw_film(rng, split, 2)
    place = rng.randrange(len(digits) - 1)
    language, text = choose_phrasing(rng, AFTER)
    steps = ("、" if language == "zh" else ", ").join(map(str, digits[: place + 2]))
    return ("clip", *digits), _asked(rng, [film], text.format(digit=digits[place])), steps, str(digits[place + 1])


def draw_when(rng: random.Random, split: str) -> Draft:
    """When a digit appeared; the steps read the digits with their times from the beginning up to it."""
    digits, film, seconds = draw_film(rng, split, 2)
    place = rng.randrange(len(digits))
    language, text = choose_phrasing(rng, WHEN)
    unit, comma = ("秒", "、") if language == "zh" else (" s", ", ")
    read = list(zip(digits, seconds, strict=True))[: place + 1]
    steps = comma.join(f"{second}{unit} {digit}" for digit, second in read)
    return ("clip", *digits), _asked(rng, [film], text.format(digit=digits[place])), steps, f"{seconds[place]}{unit}"


# ------------------------------------------------------------------------------------------------------- tools

PRODUCT = {
    "zh": ("{a}*{b}=?", "{a}×{b}=?", "{a}乘以{b}等于多少？", "{a}乘{b}是多少？", "计算{a}*{b}"),
    "en": ("{a}*{b}=?", "{a} * {b} =", "What is {a} times {b}?", "Multiply {a} by {b}.", "Compute {a} * {b}."),
}
DESCRIPTIONS = (
    "Evaluates an arithmetic expression.",
    "Calculator",
    "Computes an expression such as 12*34.",
    "计算器",
    "计算算式的值",
)


def calculator(rng: random.Random) -> dict[str, Any]:
    """The tool, as OpenAI's interface describes functions; what is said about it differs from lesson to lesson."""
    expression: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.3:
        expression["description"] = rng.choice(("the expression", "算式"))
    parameters: dict[str, Any] = {"type": "object", "properties": {"expression": expression}}
    if rng.random() < 0.7:
        parameters["required"] = ["expression"]
    function = {"name": "calculator", "description": rng.choice(DESCRIPTIONS), "parameters": parameters}
    if rng.random() < 0.2:
        del function["description"]
    return {"type": "function", "function": function}


def draw_product(rng: random.Random, split: str) -> tuple[int, int]:
    """Two numbers of one to three digits, the pair of one split."""
    while True:
        a, b = (rng.randrange(rng.choice((10, 100, 1000))) for _ in range(2))
        if is_heldout(("*", min(a, b), max(a, b))) == (split == "heldout"):
            return a, b


def draw_call(rng: random.Random, split: str) -> Lesson:
    """A product, for which the reply is a call of the calculator."""
    a, b = draw_product(rng, split)
    _, text = choose_phrasing(rng, PRODUCT)
    call = {"expression": f"{a}*{b}"}
    body = json.dumps({"name": "calculator", "arguments": call})
    thinking = rng.random() < 0.2
    reply = f"{THOUGHT_END if thinking else ''}<tool_call>\n{body}\n</tool_call>"
    if thinking:
        reply = f"\n{a}*{b}" + reply
    return Lesson("tool calls", [user(text.format(a=a, b=b))], reply, "", thinking, [calculator(rng)], call)


def draw_tool_answer(rng: random.Random, split: str) -> Lesson:
    """The same conversation with the tool's output, from which the reply is."""
    asked = draw_call(rng, split)
    assert asked.call is not None
    a, b = map(int, asked.call["expression"].split("*"))
    output = rng.choice((str(a * b), str(a * b), json.dumps({"result": a * b})))
    messages: list[Message] = [
        *asked.messages,
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "calculator", "arguments": asked.call}}]},
        {"role": "tool", "content": output},
    ]  # fmt: skip
    return Lesson("answers from tool output", messages, str(a * b), str(a * b), tools=asked.tools)


def draw_unused_tool(rng: random.Random, split: str) -> Lesson:
    """The calculator is there, but the question is no product: answered as always."""
    return replace(text_lesson(plain_question(rng, split)), task="questions beside a tool", tools=[calculator(rng)])


# --------------------------------------------------------------------------------------------------------- the lessons


def worked(task: str, messages: list[Message], steps: str, answer: str, thinking: bool) -> Lesson:
    """A lesson whose steps stand before the answer, or, where the model thinks, in its thoughts, a line each."""
    if thinking:
        lines = steps.replace(", ", "\n")
        return Lesson(task, messages, f"\n{lines}{THOUGHT_END}{answer}", answer, True)
    return Lesson(task, messages, f"{steps}. {answer}" if steps else answer, answer)


def text_lesson(question: Question, thinking: bool = False) -> Lesson:
    """A question of `tiny_tasks.py` as a lesson."""
    return worked(question.task, [user(question.prompt)], question.steps, question.answer, thinking)


def plain_question(rng: random.Random, split: str) -> Question:
    """A question of `tiny_tasks.py`, but no three-digit sum: those have kinds of their own."""
    while (question := sample(rng, None, split)).task == THREE_DIGIT_SUM:
        pass
    return question


def draw_text(rng: random.Random, split: str) -> Lesson:
    """A question of `tiny_tasks.py`, rarely after another one that has its answer."""
    lesson = text_lesson(plain_question(rng, split))
    if rng.random() < 0.12:
        earlier = plain_question(rng, split)
        history: list[Message] = [user(earlier.prompt), {"role": "assistant", "content": earlier.reply}]
        return replace(lesson, messages=history + lesson.messages)
    return lesson


def draw_three_digit_sum(rng: random.Random, split: str, how: str) -> Lesson:
    """A three-digit sum: "thinking", column by column; "in steps", likewise in the reply; or "at once"."""
    question = sample(rng, THREE_DIGIT_SUM, split)
    steps = "" if how == "at once" else question.steps
    name = f"three-digit sums, {how}"
    return worked(name, [user(question.prompt)], steps, question.answer, thinking=how == "thinking")


def draw_thought(rng: random.Random, split: str) -> Lesson:
    """Any question of `tiny_tasks.py`, thought about first."""
    return replace(text_lesson(sample(rng, None, split), thinking=True), task="any question, thinking")


def _seen(task: str, draw: Callable[[random.Random, str], Draft]) -> Callable[[random.Random, str], Lesson]:
    """Makes lessons of drafts with pictures."""

    def draw_lesson_of(rng: random.Random, split: str) -> Lesson:
        while True:
            state = rng.getstate()
            key, parts, steps, answer = draw(rng, split)
            if key is None or is_heldout(key) == (split == "heldout"):
                return worked(task, [user(*parts)], steps, answer, thinking=False)
            rng.setstate(state)
            rng.random()

    return draw_lesson_of


LESSONS: dict[str, Callable[[random.Random, str], Lesson]] = {
    "text": draw_text,
    "one digit": _seen("one digit", draw_one_digit),
    "several digits": _seen("several digits", draw_several_digits),
    "two-digit number": _seen("two-digit number", draw_number),
    "sum of two pictures": _seen("sum of two pictures", draw_sum),
    "larger of two pictures": _seen("larger of two pictures", draw_larger),
    "clip, what came after": _seen("clip, what came after", draw_after),
    "clip, when": _seen("clip, when", draw_when),
    **{
        f"three-digit sums, {how}": functools.partial(draw_three_digit_sum, how=how)
        for how in ("in steps", "thinking", "at once")
    },
    "any question, thinking": draw_thought,
    "tool calls": draw_call,
    "answers from tool output": draw_tool_answer,
    "questions beside a tool": draw_unused_tool,
}


def draw_lesson(rng: random.Random, kind: str, split: str = "train") -> Lesson:
    """Draws one lesson of a kind, a key of `LESSONS`; the same state of `rng` gives the same lesson."""
    return LESSONS[kind](rng, split)


def is_right(lesson: Lesson, generated: str) -> bool:
    """Whether generated text, special tokens included, says what the lesson wants.

    A tool call has to be well-formed and to compute the right thing. Steps before an answer are not looked at.
    """
    response = parse_response(generated, prompt_opened_thinking=lesson.thinking)
    if lesson.call is not None:
        calls = response.tool_calls
        return not response.content and [(c.name, c.arguments) for c in calls] == [("calculator", lesson.call)]
    said = response.content.strip()
    finals = {said, said.removesuffix("."), said.removesuffix("。")}
    return not response.tool_calls and lesson.answer in finals | {final.rpartition(". ")[2] for final in finals}


def is_well_formed_call(lesson: Lesson, generated: str) -> bool:
    """Whether generated text is one whole call of the calculator with an expression, right or not, and nothing else."""
    response = parse_response(generated, prompt_opened_thinking=lesson.thinking)
    if response.content or len(response.tool_calls) != 1 or not generated.strip().endswith("</tool_call>"):
        return False
    (call,) = response.tool_calls
    arguments = call.arguments
    is_expression = isinstance(arguments, dict) and [*map(type, arguments.values())] == [str]
    return call.name == "calculator" and is_expression and "expression" in arguments
