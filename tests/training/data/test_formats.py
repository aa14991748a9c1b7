"""Every format of data files: what its lines become, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.processing.processor import ErnieProcessor
from ernie45.training.data import Conversation, Encoder, Example, Preference, Text, parse, read_line
from ernie45.training.data.media import resolve
from tests.helpers.vision import write_processor_folder

DATA = Path(__file__).parents[2] / "data" / "training"
START, END, STOP = "<|begin_of_sentence|>", "<|end_of_sentence|>", "</s>"
EMPTY = "<think>\n\n</think>\n\n"
TOOLS = (
    '\n<tool_list>\n[{"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}]'
    "\n</tool_list>\n"
)
CALL = '\n<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>'
TOOL_TALK = (
    f"{START}{TOOLS}User: 6*7?\nAssistant: {EMPTY}«{CALL}{STOP}»{END}"
    f"User: <tool_output>\n42\n</tool_output>\nAssistant: {EMPTY}«It is 42.{STOP}»"
)

# What each line of each file becomes with the built-in template of vision-language models. What is learned stands in
# «»; [n] are n tokens of a picture or video.
GOLDEN = {
    "erniekit_text.jsonl": [
        [f"{START}Be brief.\nUser: 2+2?\nAssistant: 4{END}User: And 3+4?\nAssistant: {EMPTY}«7{STOP}»"],
        [f"{START}User: 你好\nAssistant: {EMPTY}«你好！{STOP}»"],
        [f"{START}Be brief.\nUser: 2+2?\nAssistant: {EMPTY}«4{STOP}»"],
    ],
    "erniekit_preference.jsonl": [
        [
            f"{START}Be brief.\nUser: Hi.\nAssistant: Hello.{END}User: 2+2?\nAssistant: {EMPTY}«4{STOP}»",
            f"{START}Be brief.\nUser: Hi.\nAssistant: Hello.{END}User: 2+2?\nAssistant: {EMPTY}«5{STOP}»",
        ],
        [
            f"{START}User: 2+2?\nAssistant: {EMPTY}«4{STOP}»{END}User: Sure?\nAssistant: {EMPTY}«Yes.{STOP}»",
            f"{START}User: 2+2?\nAssistant: {EMPTY}«5{STOP}»{END}User: Sure?\nAssistant: {EMPTY}«No.{STOP}»",
        ],
    ],
    "erniekit_media.jsonl": [
        [f"{START}User: Picture 1:[6]What colour? \nAssistant: {EMPTY}«Red.{STOP}»"],
        [f"{START}Be brief.\nUser: Picture 1:[4]FirstPicture 2:[6]then\nAssistant: {EMPTY}«Red, blue.{STOP}»"],
        [f"{START}User: Video 1:[2]Which?Picture 1:[6]\nAssistant: {EMPTY}«Blue.{STOP}»"],
        [TOOL_TALK],
    ],
    "messages.jsonl": [
        [f"{START}Be brief.\nUser: 2+2?\nAssistant: {EMPTY}«4{STOP}»"],
        [f"{START}User: Picture 1:[6]andVideo 1:[2]?\nAssistant: {EMPTY}«Red.{STOP}»"],
        [f"{START}User: Colour? Picture 1:[6]\nAssistant: {EMPTY}«Blue.{STOP}»"],
        [TOOL_TALK],
        [f"{START}User: 2+2?\nAssistant: <think>«\nTwo and two.\n</think>\n4{STOP}»"],
    ],
    "messages_preference.jsonl": [
        [
            f"{START}User: Picture 1:[6]?\nAssistant: {EMPTY}«Red.{STOP}»",
            f"{START}User: Picture 1:[6]?\nAssistant: {EMPTY}«Blue.{STOP}»",
        ]
    ],
    "alpaca.jsonl": [
        [
            f"{START}Be brief.\nUser: Hi.\nAssistant: {EMPTY}«Hello.{STOP}»{END}"
            f"User: Add.\n2 and 2\nAssistant: {EMPTY}«4{STOP}»"
        ],
        [f"{START}User: Say hello.\nAssistant: {EMPTY}«Hello.{STOP}»"],
    ],
    "alpaca_preference.jsonl": [
        [
            f"{START}Be brief.\nUser: 2+2?\nAssistant: {EMPTY}«4{STOP}»",
            f"{START}Be brief.\nUser: 2+2?\nAssistant: {EMPTY}«5{STOP}»",
        ]
    ],
    "text.jsonl": [["on«e two</s>»"], ["th«ree</s>»"]],
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = write_processor_folder(tmp_path_factory.mktemp("checkpoint"))
    limits = {"image_min_pixels": 4 * 28 * 28, "video_min_pixels": 28 * 28, "video_max_pixels": 2 * 28 * 28}
    return Encoder(ErnieProcessor.from_pretrained(folder).tokenizer, ErnieProcessor.from_pretrained(folder, **limits))


def marked(encoder: Encoder, example: Example) -> str:
    """The text, with what is learned in «»."""
    decode = encoder.tokenizer.decode
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    text = decode(ids[0])
    for index, label in enumerate(labels):
        learns, learned = label >= 0, index > 0 and labels[index - 1] >= 0
        text += ("«" if learns and not learned else "") + ("»" if learned and not learns else "")
        following = ids[index + 1] if index + 1 < len(ids) else None
        text += decode(label) if learns else decode(following) if following is not None else ""
        if learns and following is not None and following != label:
            text += f"»{decode(following)}"
            labels[index] = -100
    text += "»" if labels[-1] >= 0 else ""
    return re.sub(
        r"<\|(IMAGE|VIDEO)_START\|>((?:<\|IMAGE_PLACEHOLDER\|>)+)<\|\1_END\|>",
        lambda match: f"[{match[2].count('<')}]",
        text,
    )


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_every_line_becomes_what_it_says(encoder: Encoder, name: str) -> None:
    lines = (DATA / name).read_bytes().splitlines()
    found = [
        [marked(encoder, example) for unit in encoder(read_line(line, DATA)) for example in unit.examples]
        for line in lines
    ]
    assert found == GOLDEN[name]


def test_all_files_are_tested() -> None:
    assert {path.name for path in DATA.glob("*.jsonl")} == GOLDEN.keys()


def test_the_kinds_of_records() -> None:
    kinds = {name: {type(read_line(line, DATA)) for line in (DATA / name).read_bytes().splitlines()} for name in GOLDEN}
    preferences = {name for name in GOLDEN if "preference" in name}
    assert {name for name, found in kinds.items() if found == {Preference}} == preferences
    assert kinds.pop("text.jsonl") == {Text}
    assert all(found == {Conversation} for name, found in kinds.items() if name not in preferences)


def test_relative_paths_start_at_the_data_file(tmp_path: Path) -> None:
    assert resolve("a/b.png", tmp_path) == str(tmp_path / "a/b.png")
    assert resolve(["a.png", "/b.png"], tmp_path) == [str(tmp_path / "a.png"), "/b.png"]
    for source in ("http://host/a.png", "data:image/png;base64,AAAA", "QUJD" * 20):
        assert resolve(source, tmp_path) == source


def test_marks_without_a_list_are_text() -> None:
    record = parse({"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}, DATA)
    assert isinstance(record, Conversation) and record.messages[0]["content"] == "<image>?"


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], **fields}


MIXED = {"image_info": [{"matched_text_index": 0, "image_url": "a"}], "video_info": [{"image_url": "b"}]}
TURNS = [{"text": "a", "tag": "mask"}, {"text": "b", "tag": "no_mask"}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the keys none are of no known format: expected one of: "),
        ({"prompt": "a", "answer": "b"}, "the keys answer, prompt are of no known format"),
        ({"src": ["a", "b"], "tgt": ["c"]}, "src has 2 texts and tgt 1"),
        ({"src": ["a"], "tgt": ["b"], "label": [1, 1]}, "0 or 1 for each of the 1 answers"),
        ({"src": ["a"], "tgt": ["b"], "label": [0]}, "no answer in it is to be learned"),
        ({"src": ["a"], "tgt": [" "]}, "tgt is"),
        ({"src": ["a"], "tgt": ["b"], "system": 3}, "system is a int"),
        ({"src": "a", "tgt": [], "response": ["b", "c"], "sort": [1, 1]}, "two different numbers"),
        ({"src": "a", "tgt": [], "response": [["b", "c"], ["d"]], "sort": [1, 0]}, "an odd number"),
        ({"src": "a", "tgt": ["b"], "response": ["b", "c"], "sort": [1, 0]}, "expected one more in src"),
        ({"src": "a", "tgt": [], "response": ["b"], "sort": [1]}, "two entries each"),
        ({"src": "a", "tgt": [], "response": ["b", "b"], "sort": [1, 0]}, "are the same"),
        (chat("<image>", "a", images=[]), "images: fewer entries than the messages have marks <image>"),
        (chat("?", "a", videos=["b.mp4"]), "videos: 1 entries have no mark <video>"),
        (chat("?", "a", tools="{"), "tools: a text that is not JSON"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r'messages\[0\]\["role"\] is \'bot\''),
        ({"messages": "Hi"}, "messages is 'Hi', expected a list"),
        ({"messages": [{"role": "function", "content": "[1]"}]}, "a tool call is 1"),
        (chat("?", chosen_response="a", rejected_response=[{"role": "user", "content": "b"}]), "the rejected response"),
        ({"text_info": TURNS, **MIXED}, "order: missing"),
        ({"text_info": TURNS, **MIXED, "order": {"type": ["text"], "index": [0]}}, "order: expected"),
        ({"text_info": TURNS, "image_info": [{"matched_text_index": 2}]}, "is 2, expected 0 to 1"),
        ({"text_info": [{"text": "a", "tag": "x"}]}, "is 'x', expected \"mask\""),
        ({"text_info": TURNS, "image_info": [{"matched_text_index": 0, "is_video": True}]}, "image_info with is_video"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"expected \[question, answer\]"),
        ({"text": ["a", "b"]}, "text holds 2 texts"),
    ],
)
def test_wrong_lines_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        read_line(json.dumps(fields).encode(), DATA)


@pytest.mark.parametrize(("line", "message"), [(b'{"src": ', "not JSON"), (b"[1]", "a list"), (b"\xff", "not JSON")])
def test_lines_that_are_no_objects_are_refused(line: bytes, message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        read_line(line, DATA)


SCALARS = st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["", "a", "<image>", "mask", "user", "text"])
KEYS = ["role", "content", "text", "tag", "image_url", "matched_text_index", "type", "index", "tool_calls", "name"]
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
FORMATS = [
    ("src", "tgt", "label", "is_system", "system"),
    ("src", "tgt", "response", "sort", "is_system"),
    ("text_info", "image_info", "video_info", "order", "tools"),
    ("messages", "images", "videos", "label", "tools"),
    ("messages", "chosen_response", "rejected_response"),
    ("instruction", "input", "output", "history"),
    ("question", "chosen", "rejected"),
    ("text",),
]


@given(st.sampled_from(FORMATS).flatmap(lambda keys: st.fixed_dictionaries({key: VALUES for key in keys})))
@settings(max_examples=400)
def test_any_line_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        read_line(json.dumps(fields).encode(), DATA)
    except ErnieError as error:
        assert str(error)


def test_a_system_message_stands_before_media_also_where_is_system_says_so() -> None:
    for extra in ({"system": "Be brief."}, {"system": "Be brief.", "is_system": 1}):
        record = parse({"text_info": TURNS, **extra}, DATA)
        assert isinstance(record, Conversation)
        assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    turns = [TURNS[0], {"text": "q", "tag": "no_mask"}, *TURNS]
    record = parse({"text_info": turns, "is_system": 1}, DATA)
    assert isinstance(record, Conversation) and record.messages[0]["role"] == "system"
