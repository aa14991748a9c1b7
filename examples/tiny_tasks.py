"""Questions with one short right answer, in Chinese and English: what the small model of `train_tiny.py` learns.

Where the answer takes several steps (the columns of a sum, counting, weekdays) the reply shows them first: `23+58=?`
is answered by `3+8=11, 2+5+1=8. 81`. A small model learns each step within minutes, but not to do them all at once.

Every question is drawn from operands (two numbers, a list, a weekday and a distance, ...) and a phrasing. A hash of
the operands alone puts about one question in ten into the held-out set, so that training never sees those operands
in any phrasing and accuracy on them measures learning, not memory. Facts have no operands to hold out: there it is
the combination of model, attribute and phrasing.

    rng = random.Random(0)
    question = sample(rng, task="two-digit addition", split="heldout")
    question.prompt, question.reply, question.answer        # ('23+58=?', '3+8=11, 2+5+1=8. 81', '81')
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass

HELDOUT_SHARE = 10  # one key in this many is held out


@dataclass(frozen=True)
class Question:
    """One question: its task's name, "zh" or "en", what the user says, the only right answer, and the steps to it."""

    task: str
    language: str
    prompt: str
    answer: str
    steps: str = ""

    @property
    def reply(self) -> str:
        """What the model should say: the steps, if there are any, and then the answer."""
        return f"{self.steps}. {self.answer}" if self.steps else self.answer


@dataclass(frozen=True)
class Draft:
    """A question with the key that decides its split; drawn by one of the `draw_*` functions."""

    key: Hashable
    language: str
    prompt: str
    answer: str
    steps: str = ""


def is_heldout(key: Hashable) -> bool:
    """Whether the questions made from `key` belong to the held-out set; the same in every process and version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELDOUT_SHARE == 0


def choose_phrasing(rng: random.Random, phrasings: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """Draws a language and one of its phrasings."""
    language = rng.choice(("zh", "en"))
    return language, rng.choice(phrasings[language])


# ---------------------------------------------------------------------------------------------- addition, subtraction

ADDITION = {
    "zh": ("{a}+{b}=?", "{a}+{b}=", "{a} + {b} = ?", "{a}+{b}等于多少？", "{a}加{b}等于多少？", "{a}加{b}等于几？",
           "计算{a}+{b}", "请计算：{a}+{b}", "{a}与{b}的和是多少？"),
    "en": ("{a}+{b}=?", "{a}+{b}", "{a} + {b} =", "{a} + {b}", "What is {a}+{b}?", "What is {a} plus {b}?",
           "What is {a} + {b}?", "Add {a} and {b}.", "Compute {a} + {b}."),
}  # fmt: skip
SUBTRACTION = {
    "zh": ("{a}-{b}=?", "{a}-{b}=", "{a} - {b} = ?", "{a}-{b}等于多少？", "{a}减{b}等于多少？", "{a}减{b}等于几？",
           "计算{a}-{b}", "请计算：{a}-{b}", "{a}减去{b}是多少？"),
    "en": ("{a}-{b}=?", "{a}-{b}", "{a} - {b} =", "{a} - {b}", "What is {a}-{b}?", "What is {a} minus {b}?",
           "What is {a} - {b}?", "Subtract {b} from {a}.", "Compute {a} - {b}."),
}  # fmt: skip


def draw_two_digit_pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers of one or two digits."""
    return rng.randrange(100), rng.randrange(100)


def draw_three_digit_pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers up to 999, at least one of them with three digits."""
    pair = [rng.randrange(100, 1000), rng.randrange(rng.choice((100, 1000, 1000)))]
    rng.shuffle(pair)
    return pair[0], pair[1]


def draw_addition(rng: random.Random, draw_pair: Callable[[random.Random], tuple[int, int]]) -> Draft:
    """The order of the two numbers makes no difference to the split."""
    a, b = draw_pair(rng)
    language, phrasing = choose_phrasing(rng, ADDITION)
    return Draft(("+", min(a, b), max(a, b)), language, phrasing.format(a=a, b=b), str(a + b), addition_steps(a, b))


def draw_subtraction(rng: random.Random, draw_pair: Callable[[random.Random], tuple[int, int]]) -> Draft:
    """The result is never negative."""
    b, a = sorted(draw_pair(rng))
    language, phrasing = choose_phrasing(rng, SUBTRACTION)
    return Draft(("-", a, b), language, phrasing.format(a=a, b=b), str(a - b), subtraction_steps(a, b))


def places(number: int) -> list[int]:
    """The values of the digits of a number, from the right: 1, 10, ..."""
    return [10**place for place in range(len(str(number)))]


def addition_steps(a: int, b: int) -> str:
    """The columns from the right, each with what is carried into it: "8+6=14, 7+5+1=13, 4+2+1=7"."""
    steps, carry = [], 0
    for place in places(max(a, b)):
        first, second = a // place % 10, b // place % 10
        steps.append(f"{first}+{second}{'+1' if carry else ''}={first + second + carry}")
        carry = (first + second + carry) // 10
    return ", ".join(steps)


def subtraction_steps(a: int, b: int) -> str:
    """The columns from the right, each with what is borrowed from and by it: "3+10-9=4, 1-1+10-9=1, 8-1-0=7"."""
    steps, borrowed = [], 0
    for place in places(a):
        first, second = a // place % 10 - borrowed, b // place % 10
        spelled = f"{a // place % 10}{'-1' if borrowed else ''}"
        borrowed = int(first < second)
        steps.append(f"{spelled}{'+10' if borrowed else ''}-{second}={first + 10 * borrowed - second}")
    return ", ".join(steps)


# ------------------------------------------------------------------------------------------------- comparing, sorting

COMPARING = {
    max: {
        "zh": ("{a}和{b}哪个大？", "{a}和{b}，哪个更大？", "比较{a}和{b}，较大的数是？"),
        "en": ("Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?", "The larger of {a} and {b}?"),
    },
    min: {
        "zh": ("{a}和{b}哪个小？", "{a}和{b}，哪个更小？", "比较{a}和{b}，较小的数是？"),
        "en": ("Which is smaller, {a} or {b}?", "Which number is less: {a} or {b}?", "The smaller of {a} and {b}?"),
    },
}
ASCENDING = {
    "zh": ("从小到大排列：{items}", "把{items}从小到大排序", "升序：{items}"),
    "en": ("Sort from small to large: {items}", "Sort {items} in ascending order.", "Ascending: {items}"),
}
DESCENDING = {
    "zh": ("从大到小排列：{items}", "把{items}从大到小排序", "降序：{items}"),
    "en": ("Sort from large to small: {items}", "Sort {items} in descending order.", "Descending: {items}"),
}


def draw_comparing(rng: random.Random) -> Draft:
    """The larger or smaller of two different numbers below 100 or 1000."""
    limit = rng.choice((100, 1000))
    a, b = rng.sample(range(limit), 2)
    choose = rng.choice((max, min))
    language, phrasing = choose_phrasing(rng, COMPARING[choose])
    return Draft(("compare", min(a, b), max(a, b)), language, phrasing.format(a=a, b=b), str(choose(a, b)))


def draw_sorting(rng: random.Random) -> Draft:
    """Three or four different numbers below 100; the answer uses the separator of the question."""
    numbers = rng.sample(range(100), rng.randint(3, 4))
    descending = rng.random() < 0.5
    language, phrasing = choose_phrasing(rng, DESCENDING if descending else ASCENDING)
    separator = "、" if language == "zh" else " "
    prompt = phrasing.format(items=separator.join(map(str, numbers)))
    answer = separator.join(map(str, sorted(numbers, reverse=descending)))
    return Draft(("sort", *sorted(numbers)), language, prompt, answer)


# ------------------------------------------------------------------------------------ counting, reversing, continuing

COUNTING = {
    "zh": ("{items}，其中有几个“{target}”？", "数一数：{items}，有几个“{target}”？", "“{target}”出现几次：{items}"),
    "en": ("How many {target} are in {items}?", "Count the {target} in {items}", "In {items}, how many {target}?"),
}
COUNTED_WORDS = {
    "zh": ("猫", "狗", "鱼", "鸟", "马", "牛", "羊", "花"),
    "en": ("cat", "dog", "fish", "bird", "horse", "cow", "sheep", "flower"),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
REVERSING = {
    "zh": ("把{items}倒过来写", "{items}反过来是什么？", "倒序：{items}"),
    "en": ("Reverse {items}", "Write {items} backwards.", "What is {items} in reverse?"),
}
CONTINUING = {
    "zh": ("{items}，下一个数是多少？", "找规律：{items}，？", "接着数：{items}"),
    "en": ("{items}, what comes next?", "Continue the sequence: {items}", "Next number: {items}, ?"),
}


def draw_counting(rng: random.Random) -> Draft:
    """How often one of three words or letters occurs in a list of three to five."""
    language, phrasing = choose_phrasing(rng, COUNTING)
    alphabet = rng.choice((LETTERS, COUNTED_WORDS[language]))
    words = rng.sample(alphabet, 3)
    items = rng.choices(words, k=rng.randint(3, 5))
    separator = "、" if language == "zh" else " "  # either way the target is the same token as in the list
    prompt = phrasing.format(items=separator.join(items), target=words[0])
    counted = separator.join(
        f"{item}{items[: place + 1].count(item)}" if item == words[0] else item for place, item in enumerate(items)
    )
    steps = f"{words[0]}：{counted}" if language == "zh" else f"Counting {words[0]}: {counted}"
    return Draft(("count", words[0], *items), language, prompt, str(items.count(words[0])), steps)


def draw_reversing(rng: random.Random) -> Draft:
    """Three or four different digits together, or letters or weekdays with separators: one token an item either way.

    Weekdays are here so that the model, whose embedding is also its head, must tell them apart early: as the answers
    of `draw_weekday` alone they look interchangeable at first, and their embeddings become so.
    """
    language, phrasing = choose_phrasing(rng, REVERSING)
    weekdays = (WEEKDAYS[language], "、" if language == "zh" else " ")
    alphabet, separator = rng.choice((("0123456789", ""), (LETTERS, " "), weekdays))
    items = rng.sample(alphabet, rng.randint(3, 4))
    prompt = phrasing.format(items=separator.join(items))
    return Draft(("reverse", *items), language, prompt, separator.join(reversed(items)))


def draw_continuing(rng: random.Random) -> Draft:
    """Four terms of an arithmetic sequence that rises or falls by at most 10; no term is negative."""
    start, step = rng.randrange(100), rng.randint(1, 10)
    terms = [start + step * place for place in range(5)]
    if rng.random() < 0.5:
        terms.reverse()
    language, phrasing = choose_phrasing(rng, CONTINUING)
    items = ("，" if language == "zh" else ", ").join(map(str, terms[:4]))
    rise = terms[1] - terms[0]
    columns = addition_steps(terms[3], rise) if rise > 0 else subtraction_steps(terms[3], -rise)
    steps = f"{rise:+d}, {columns}"
    return Draft(("continue", terms[0], terms[1]), language, phrasing.format(items=items), str(terms[4]), steps)


# ----------------------------------------------------------------------------------------------------------- weekdays

WEEKDAYS = {
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}
DAYS_LATER = {
    "zh": ("今天{day}，{n}天后是星期几？", "{day}过{n}天是星期几？", "{day}再过{n}天是？"),
    "en": ("Today is {day}. What day is it in {n} days?", "What day is {n} days after {day}?", "{day} plus {n} days?"),
}
DAYS_EARLIER = {
    "zh": ("今天{day}，{n}天前是星期几？", "{day}往前{n}天是星期几？", "{day}倒退{n}天是？"),
    "en": ("Today is {day}. What day was it {n} days ago?", "What day is {n} days before {day}?",
           "{day} minus {n} days?"),
}  # fmt: skip


def draw_weekday(rng: random.Random) -> Draft:
    """A weekday 1 to 9 days after or before another; the steps count the days."""
    day, distance, sign = rng.randrange(7), rng.randint(1, 9), rng.choice((1, -1))
    language, phrasing = choose_phrasing(rng, DAYS_LATER if sign > 0 else DAYS_EARLIER)
    names = WEEKDAYS[language]
    days = [names[(day + sign * step) % 7] for step in range(1, distance + 1)]
    steps = ("、" if language == "zh" else ", ").join(f"{step} {name}" for step, name in enumerate(days, 1))
    prompt = phrasing.format(day=names[day], n=distance)
    return Draft(("weekday", day, sign * distance), language, prompt, days[-1], steps)


# ---------------------------------------------------------------------------------------- facts about ERNIE 4.5 itself

MODELS = ("ERNIE-4.5-0.3B", "ERNIE-4.5-21B-A3B", "ERNIE-4.5-300B-A47B", "ERNIE-4.5-VL-28B-A3B",
          "ERNIE-4.5-VL-424B-A47B")  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """What can be asked about a model: its names, and one value for each of `MODELS` (None: not asked)."""

    zh: tuple[str, ...]
    en: tuple[str, ...]
    values: tuple[str | int | None, ...]


ATTRIBUTES = (
    Attribute(("层数", "解码层数量"), ("number of layers", "layer count"), (18, 28, 54, 28, 54)),
    Attribute(("隐藏维度", "隐藏层大小"), ("hidden size", "model width"), (1024, 2560, 8192, 2560, 8192)),
    Attribute(("前馈层宽度",), ("feed-forward width", "intermediate size"), (3072, 12288, 28672, 12288, 28672)),
    Attribute(("注意力头数",), ("number of attention heads", "attention head count"), (16, 20, 64, 20, 64)),
    Attribute(("键值头数", "KV头数"), ("number of KV heads", "KV head count"), (2, 4, 8, 4, 8)),
    Attribute(("头维度",), ("head dimension", "head size"), (128, 128, 128, 128, 128)),
    Attribute(("文本专家数",), ("number of text experts", "text expert count"), (None, 64, 64, 64, 64)),
    Attribute(("视觉专家数",), ("number of vision experts",), (None, None, None, 64, 64)),
    Attribute(("每个词元激活的专家数",), ("number of experts per token",), (None, 6, 8, 6, 8)),
    Attribute(("共享专家数",), ("number of shared experts",), (None, 2, 0, 2, 0)),
    Attribute(("文本专家宽度",), ("width of a text expert",), (None, 1536, 3584, 1536, 3584)),
    Attribute(("稠密层数",), ("number of dense layers",), (18, 1, 3, 1, 3)),
    Attribute(("总参数量",), ("total parameters", "parameter count"), ("0.36B", "21B", "300B", "28B", "424B")),
    Attribute(("激活参数量",), ("active parameters",), (None, "3B", "47B", "3B", "47B")),
    Attribute(("词表大小",), ("vocabulary size",), (103424,) * 5),
    Attribute(("上下文长度", "最大位置数"), ("context length", "maximum context"), (131072,) * 5),
    Attribute(("视觉编码器层数",), ("number of vision encoder layers",), (None, None, None, 32, 32)),
    Attribute(("图像块大小",), ("image patch size",), (None, None, None, 14, 14)),
)
FACTS = {
    "zh": ("{model}的{name}是多少？", "{model}：{name}？", "请告诉我{model}的{name}。", "{name}是多少？模型：{model}"),
    "en": ("What is the {name} of {model}?", "{model}: {name}?", "Tell me the {name} of {model}.",
           "{name} of {model}?"),
}  # fmt: skip


def draw_fact(rng: random.Random) -> Draft:
    """One attribute of one model, which goes by its name with or without the first hyphen."""
    attribute = rng.choice(ATTRIBUTES)
    model, value = rng.choice([pair for pair in zip(MODELS, attribute.values, strict=True) if pair[1] is not None])
    language, phrasing = choose_phrasing(rng, FACTS)
    name = rng.choice(attribute.zh if language == "zh" else attribute.en)
    spelled = rng.choice((model, model.replace("ERNIE-4.5-", "ERNIE 4.5 ")))
    prompt = phrasing.format(model=spelled, name=name)
    return Draft(("fact", phrasing, model, name), language, prompt, str(value))


# ------------------------------------------------------------------------------------------------------ the interface

# name: (how to draw one, share of the training questions). Short replies weigh little in the loss: larger shares.
TASKS: dict[str, tuple[Callable[[random.Random], Draft], float]] = {
    "two-digit addition": (lambda rng: draw_addition(rng, draw_two_digit_pair), 0.08),
    "three-digit addition": (lambda rng: draw_addition(rng, draw_three_digit_pair), 0.06),
    "two-digit subtraction": (lambda rng: draw_subtraction(rng, draw_two_digit_pair), 0.08),
    "three-digit subtraction": (lambda rng: draw_subtraction(rng, draw_three_digit_pair), 0.10),
    "comparing": (draw_comparing, 0.07),
    "sorting": (draw_sorting, 0.13),
    "counting": (draw_counting, 0.15),
    "reversing": (draw_reversing, 0.08),
    "continuing": (draw_continuing, 0.10),
    "weekdays": (draw_weekday, 0.05),
    "ERNIE 4.5 facts": (draw_fact, 0.10),
}
TASK_NAMES = tuple(TASKS)
TASK_SHARES = tuple(share for _, share in TASKS.values())


def sample(rng: random.Random, task: str | None = None, split: str = "train") -> Question:
    """Draws one question.

    Args:
        rng: the only source of chance; the same state gives the same question.
        task: one of `TASK_NAMES`; None draws the task too, by its share of the training data.
        split: "train" or "heldout"; no operands occur in both.

    Raises:
        ValueError: for an unknown task or split.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASK_NAMES)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}; expected 'train' or 'heldout'")
    name = task if task is not None else rng.choices(TASK_NAMES, TASK_SHARES)[0]
    draw, _ = TASKS[name]
    while True:
        draft = draw(rng)
        if is_heldout(draft.key) == (split == "heldout"):
            return Question(name, draft.language, draft.prompt, draft.answer, draft.steps)


def check(question: Question, reply: str) -> bool:
    """Whether `reply` ends in the answer, after its steps if it has any; white space and a full stop are forgiven."""
    reply = reply.strip()
    finals = {reply, reply.removesuffix("."), reply.removesuffix("。")}
    return question.answer in finals | {final.rpartition(". ")[2] for final in finals}
