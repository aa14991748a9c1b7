"""Tokens and labels of sequences: where answers stand under any template, their end, and truncation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.chat import PLAIN_TEMPLATE, THINKING_TEMPLATE, VISION_TEMPLATE
from ernie45.errors import ErnieError
from ernie45.losses import IGNORED_LABEL
from ernie45.processing.positions import position_ids, token_types
from ernie45.processing.processor import ErnieProcessor
from ernie45.training.data import Conversation, Encoder, Example, Text, parse
from tests.helpers.text_part import text_tokenizer
from tests.helpers.vision import write_processor_folder

TOKENIZER = text_tokenizer()


def chat(*contents: str, **fields: Any) -> Any:
    roles = ("user", "assistant") * len(contents)
    return parse({"messages": [message(*pair) for pair in zip(roles, contents, strict=False)], **fields}, Path("."))


def message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def text_of(example: Example) -> str:
    return TOKENIZER.decode(example.input_ids)


def learned(example: Example) -> list[str]:
    """The learned stretches."""
    found, labels = [], [IGNORED_LABEL, *example.labels.tolist()]
    for before, label in zip(labels, labels[1:], strict=False):
        if label != IGNORED_LABEL:
            found = [*found, ""] if before == IGNORED_LABEL else found
            found[-1] += TOKENIZER.decode(label)
    return found


# ---- answers


def test_labels_are_shifted_and_prompts_continue_as_at_inference() -> None:
    (example,) = Encoder(TOKENIZER)(chat("2+2?", "4"))
    prompt = TOKENIZER.apply_chat_template([message("user", "2+2?")])
    answer = TOKENIZER.encode("4")
    assert example.input_ids.tolist() == prompt + answer
    assert example.labels.tolist() == [IGNORED_LABEL] * (len(prompt) - 1) + answer + [TOKENIZER.eos_token_id]
    np.testing.assert_array_equal(example.position_ids, np.arange(len(example)))
    assert example.learned == 2 and example.images is None


def test_every_answer_ends_in_the_end_of_text_though_the_input_keeps_the_separator() -> None:
    (example,) = Encoder(TOKENIZER)(chat("2+2?", "4", "And 3+4?", "7"))
    assert learned(example) == ["4</s>", "7</s>"]
    ends = np.flatnonzero(example.labels == TOKENIZER.eos_token_id)
    assert example.input_ids[ends[0] + 1] == TOKENIZER.sep_token_id and ends[1] == len(example) - 1


def test_what_follows_the_last_learned_answer_is_left_out() -> None:
    (example,) = Encoder(TOKENIZER)(chat("2+2?", "4", "And 3+4?", "7", label=[1, 0]))
    assert text_of(example).endswith("Assistant: 4")


ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
GENERATION = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (PLAIN_TEMPLATE, None, ["4</s>", "7</s>"]),
        (VISION_TEMPLATE, None, ["4</s>", "7</s>"]),
        (
            THINKING_TEMPLATE,
            None,
            ["<response>\n4\n</response>\n<|im_end|>", "<response>\n7\n</response>\n<|im_end|>"],
        ),
        (ROLES + GENERATION, "<user>2+2?<assistant>4<user>3+4?<assistant>7", ["4</s>", "7</s>"]),
        (
            ROLES + "</s>\n" + GENERATION,
            "<user>2+2?</s>\n<assistant>4</s>\n<user>3+4?</s>\n<assistant>7",
            ["4</s>", "7</s>"],
        ),
        (
            ROLES + "<|im_end|>{{ '\\n' }}" + GENERATION,
            "<user>2+2?<|im_end|>\n<assistant>4<|im_end|>\n<user>3+4?<|im_end|>\n<assistant>7",
            ["4<|im_end|>", "7<|im_end|>"],
        ),
    ],
)
def test_answers_are_found_under_any_template(template: str, text: str | None, expected: list[str]) -> None:
    (example,) = Encoder(TOKENIZER, chat_template=template)(chat("2+2?", "4", "3+4?", "7"))
    assert learned(example) == expected
    assert text is None or text_of(example) == text


def thoughtful() -> Conversation:
    messages = [
        message("user", "2+2?"),
        message("assistant", "4", reasoning_content="Two, two."),
        message("user", "3+4?"),
        message("assistant", "7", reasoning_content="Three, four."),
    ]
    record = parse({"messages": messages}, Path("."))
    assert isinstance(record, Conversation)
    return record


def test_a_template_that_drops_earlier_reasoning_makes_a_sequence_of_each_answer() -> None:
    first, second = Encoder(TOKENIZER, chat_template=THINKING_TEMPLATE)(thoughtful())
    assert learned(first) == ["Two, two.\n</think>\n<response>\n4\n</response>\n<|im_end|>"]
    assert learned(second) == ["Three, four.\n</think>\n<response>\n7\n</response>\n<|im_end|>"]
    prompt = TOKENIZER.apply_chat_template(thoughtful().messages[:3], chat_template=THINKING_TEMPLATE)
    assert second.input_ids[: len(prompt)].tolist() == prompt  # what inference will see, without the first thought


def test_reasoning_that_stays_is_learned_in_one_sequence() -> None:
    (example,) = Encoder(TOKENIZER, chat_template=VISION_TEMPLATE)(thoughtful())
    assert learned(example) == ["\nTwo, two.\n</think>\n4</s>", "\nThree, four.\n</think>\n7</s>"]


def test_template_variables_reach_the_template() -> None:
    encoder = Encoder(TOKENIZER, chat_template="{{ hail }}" + ROLES + GENERATION, template_kwargs={"hail": "Ave! "})
    assert text_of(encoder(chat("a", "b"))[0]) == "Ave! <user>a<assistant>b"


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (PLAIN_TEMPLATE, thoughtful().messages, "leaves its reasoning_content out"),
        (ROLES + "{% endfor %}{% if add_generation_prompt %}>>{% endif %}", None, "does not continue the prompt"),
        (
            ROLES + "{{ '</s>' if m.content == 'Probe' }}" + GENERATION,
            None,
            "does not end it with </s>, as other answers",
        ),
        (PLAIN_TEMPLATE, [message("assistant", "a")], "an answer to nothing"),
        (PLAIN_TEMPLATE, [message("user", "a"), message("assistant", " ")], "an answer without content"),
    ],
)
def test_templates_and_answers_that_do_not_fit_are_refused(template: str, messages: Any, problem: str) -> None:
    messages = messages or [message("user", "a"), message("assistant", "b")]
    record = Conversation(tuple(messages), tuple(m["role"] == "assistant" for m in messages))
    with pytest.raises(ErnieError, match=problem):
        Encoder(TOKENIZER, chat_template=template)(record)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ErnieError, match="truncation is 'middle', expected one of delete, left, right, oral"):
        Encoder(TOKENIZER, truncation="middle")  # type: ignore[arg-type]
    with pytest.raises(ErnieError, match="max_length is 0"):
        Encoder(TOKENIZER, max_length=0)


# ---- length


LONG = chat("Tell me a long story.", "Once upon a time.", "And then?", "The end.")


def lengths() -> tuple[int, int]:
    """Tokens of the whole of LONG, and of its last turn alone."""
    last = chat("And then?", "The end.")
    return tuple(len(Encoder(TOKENIZER)(record)[0]) for record in (LONG, last))  # type: ignore[return-value]


def encode(truncation: Any, max_length: int, record: Any = LONG) -> tuple[list[Any], int]:
    encoder = Encoder(TOKENIZER, max_length=max_length, truncation=truncation)
    return encoder(record), encoder.dropped


@pytest.mark.parametrize("truncation", ["delete", "left", "right", "oral"])
def test_what_fits_is_kept_whole(truncation: str) -> None:
    (example,), dropped = encode(truncation, lengths()[0])
    assert len(example) == lengths()[0] and dropped == 0


def test_delete_drops_and_counts() -> None:
    assert encode("delete", lengths()[0] - 1) == ([], 1)


@pytest.mark.parametrize(("truncation", "part"), [("left", slice(-20, None)), ("right", slice(20))])
def test_left_and_right_cut_tokens(truncation: str, part: slice) -> None:
    (whole,), _ = encode("delete", 1000)
    (example,), _ = encode(truncation, 20)
    np.testing.assert_array_equal(example.input_ids, whole.input_ids[part])
    np.testing.assert_array_equal(example.labels, whole.labels[part])
    np.testing.assert_array_equal(example.position_ids, np.arange(20))


def test_what_has_nothing_left_to_learn_is_dropped() -> None:
    assert encode("right", 5) == ([], 1)


def test_oral_drops_the_oldest_turns_and_then_cuts_the_last_answer() -> None:
    whole, last = lengths()
    for max_length in (whole - 1, last):
        (example,), dropped = encode("oral", max_length)
        assert text_of(example) == "<|begin_of_sentence|>User: And then?\nAssistant: The end." and dropped == 0
    (example,), dropped = encode("oral", last - 2)
    assert text_of(example).startswith("<|begin_of_sentence|>User: And then?\nAssistant: ") and len(example) == last - 2
    assert example.learned and TOKENIZER.eos_token_id not in example.labels
    assert encode("oral", 5) == ([], 1)


def test_oral_keeps_the_system_message() -> None:
    record = parse({"system": "Be brief.", "src": ["a", "b"], "tgt": ["c", "d"]}, Path("."))
    whole = len(Encoder(TOKENIZER)(record)[0])
    (example,), _ = encode("oral", whole - 1, record)
    assert text_of(example) == "<|begin_of_sentence|>Be brief.\nUser: b\nAssistant: d"


def test_pairs_are_dropped_if_both_together_are_too_long() -> None:
    record = parse({"question": "2+2?", "chosen": "4", "rejected": "It is 5."}, Path("."))
    (pair,), _ = encode("right", 1000, record)
    assert len(pair) == len(pair.chosen) + len(pair.rejected)
    assert encode("right", len(pair) - 1, record) == ([], 1)


def test_long_texts_become_several_sequences_that_learn_every_token_once() -> None:
    ids = [*TOKENIZER.encode("one two three four five six"), TOKENIZER.eos_token_id]
    examples, dropped = encode("delete", 4, Text("one two three four five six"))
    assert [token for example in examples for token in example.labels.tolist()] == ids[1:] and dropped == 0
    assert [token for example in examples for token in example.input_ids.tolist()] == ids[:-1]
    assert max(map(len, examples)) == 4


# ---- media


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ErnieProcessor:
    folder = write_processor_folder(tmp_path_factory.mktemp("checkpoint"))
    return ErnieProcessor.from_pretrained(folder, image_min_pixels=784)


def with_pictures(*labels: int) -> Any:
    def part(height: int, width: int) -> dict[str, Any]:
        return {"type": "image", "image": np.full((height, width, 3), 80, np.uint8)}

    messages = [
        {"role": "user", "content": [part(28, 56), {"type": "text", "text": "?"}]},
        message("assistant", "Red."),
        {"role": "user", "content": [part(56, 56)]},
        message("assistant", "Blue."),
    ]
    return Conversation(tuple(messages), (False, bool(labels[0]), False, bool(labels[1])))


def test_a_sequence_with_pictures_is_the_processors(processor: ErnieProcessor) -> None:
    record = with_pictures(0, 1)
    (example,) = Encoder(processor.tokenizer, processor)(record)
    expected = processor(record.messages[:3], enable_thinking=False)
    prompt = expected["input_ids"].shape[1]
    np.testing.assert_array_equal(example.input_ids[:prompt], expected["input_ids"][0].numpy())
    np.testing.assert_array_equal(example.position_ids[:prompt], expected["position_ids"][0].numpy())
    np.testing.assert_array_equal(example.token_type_ids[:prompt], expected["token_type_ids"][0].numpy())
    np.testing.assert_array_equal(example.images, expected["images"].numpy())
    np.testing.assert_array_equal(example.grid_thw, expected["grid_thw"].numpy())
    assert learned(example) == ["Blue.</s>"]


def test_pictures_behind_the_last_learned_answer_are_left_out(processor: ErnieProcessor) -> None:
    (example,) = Encoder(processor.tokenizer, processor)(with_pictures(1, 0))
    assert example.grid_thw.tolist() == [[1, 2, 4]] and len(example.images) == 8
    np.testing.assert_array_equal(
        example.position_ids, position_ids(example.input_ids, example.grid_thw, processor.vision)
    )
    np.testing.assert_array_equal(
        example.token_type_ids, token_types(example.input_ids, example.grid_thw, processor.vision)
    )


@pytest.mark.parametrize("truncation", ["delete", "left", "right", "oral"])
def test_pictures_are_never_cut(processor: ErnieProcessor, truncation: Any) -> None:
    whole = len(Encoder(processor.tokenizer, processor)(with_pictures(1, 1))[0])
    encoder = Encoder(processor.tokenizer, processor, max_length=whole - 1, truncation=truncation)
    assert encoder(with_pictures(1, 1)) == [] and encoder.dropped == 1


def test_pictures_need_a_processor_and_no_answer_has_them(processor: ErnieProcessor) -> None:
    with pytest.raises(ErnieError, match=r'messages\[0\]\["content"\]\[0\]: a picture or video, for which'):
        Encoder(TOKENIZER, chat_template=VISION_TEMPLATE)(with_pictures(1, 1))
    user, picture = message("user", "?"), with_pictures(1, 1).messages[0]
    record = Conversation((user, {**picture, "role": "assistant"}), (False, True))
    with pytest.raises(ErnieError, match="an answer with a picture or video"):
        Encoder(processor.tokenizer, processor)(record)
