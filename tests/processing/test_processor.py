"""The processor on pictures and videos made here: the prompt, the tokens, the patches, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ernie45.chat import parse_response, prompt_opens_thinking
from ernie45.errors import ConfigError, ErnieError
from ernie45.processing import processor as module
from ernie45.processing.image import encode_picture
from ernie45.processing.limits import MediaLimits
from ernie45.processing.positions import position_ids, token_types
from ernie45.processing.processor import ErnieProcessor
from ernie45.tokenizer import ErnieTokenizer
from tests.helpers.vision import vision_config, write_processor_folder

NO_THOUGHT = "<think>\n\n</think>\n\n"
PICTURE_PLACE = "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
VIDEO_PLACE = "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>"
VISION = vision_config().vision
assert VISION is not None
KEYS = ["input_ids", "attention_mask", "token_type_ids", "position_ids", "images", "grid_thw"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processor_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> ErnieProcessor:
    return ErnieProcessor.from_pretrained(folder, video_min_pixels=784, video_max_pixels=56 * 56)


def picture(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_part(source: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source, **fields}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def arrays(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def expanded(text: str, *counts: int) -> str:
    """The decoded prompt: `[]` stands for a picture and `{}` for a video, with so many tokens each."""
    for count in counts:
        tokens = "<|IMAGE_PLACEHOLDER|>" * count
        mark = min((text.index(mark), mark) for mark in ("[]", "{}") if mark in text)[1]
        name = "IMAGE" if mark == "[]" else "VIDEO"
        text = text.replace(mark, f"<|{name}_START|>{tokens}<|{name}_END|>", 1)
    return text


# ---- prompt and tokens


def test_a_question_about_a_picture(processor: ErnieProcessor):
    inputs = arrays(processor([user(text_part("What is this? "), image_part(picture(56, 84)))]))
    assert list(inputs) == KEYS
    ids, grid = inputs["input_ids"][0], inputs["grid_thw"]
    assert grid.tolist() == [[1, 4, 6]]
    asked = expanded("<|begin_of_sentence|>User: What is this? Picture 1:[]\nAssistant: " + NO_THOUGHT, 6)
    assert processor.decode(ids) == asked
    assert inputs["images"].shape == (24, 588) and inputs["images"].dtype == np.uint8
    assert {inputs[name].dtype for name in KEYS if name != "images"} == {np.dtype("int64")}
    np.testing.assert_array_equal(inputs["attention_mask"], np.ones([1, len(ids)]))
    np.testing.assert_array_equal(inputs["token_type_ids"][0], token_types(ids, grid, VISION))
    np.testing.assert_array_equal(inputs["position_ids"][0], position_ids(ids, grid, VISION))


def test_media_keep_their_order_and_are_counted_apart(processor: ErnieProcessor):
    conversation = [
        {"role": "system", "content": "Be brief."},
        user(image_part(picture(28, 56)), text_part("and"), {"type": "video_url", "video_url": [picture(28, 28)] * 4}),
        {"role": "assistant", "content": "Yes."},
        user(image_part(picture(84, 28)), image_part(picture(56, 56)), text_part("?")),
    ]
    inputs = arrays(processor(conversation, image_min_pixels=784))
    assert inputs["grid_thw"].tolist() == [[1, 2, 4], [4, 2, 2], [1, 6, 2], [1, 4, 4]]
    text = (
        "<|begin_of_sentence|>Be brief.\nUser: Picture 1:[]andVideo 1:{}\nAssistant: Yes.<|end_of_sentence|>"
        "User: Picture 2:[]Picture 3:[]?\nAssistant: "
    )
    assert processor.decode(inputs["input_ids"][0]) == expanded(text, 2, 2, 3, 4) + NO_THOUGHT
    first, _ = encode_picture(picture(28, 56), MediaLimits().replace(image_min_pixels=784).image, VISION)
    np.testing.assert_array_equal(inputs["images"][:8], first)


def test_pieces_of_text_are_encoded_apart(processor: ErnieProcessor):
    inputs = arrays(processor([user(text_part("a b"), image_part(picture(56, 56)), text_part("c d"))]))
    ids = inputs["input_ids"][0].tolist()
    encode = processor.tokenizer.encode
    before, after = encode("<|begin_of_sentence|>User: a bPicture 1:"), encode("c d\nAssistant: " + NO_THOUGHT)
    assert ids == [*before, VISION.image_start_id, *[VISION.placeholder_id] * 4, VISION.image_end_id, *after]


def test_text_alone(processor: ErnieProcessor):
    inputs = arrays(processor([{"role": "user", "content": "Hi"}]))
    assert processor.decode(inputs["input_ids"][0]) == "<|begin_of_sentence|>User: Hi\nAssistant: " + NO_THOUGHT
    assert inputs["images"].shape == (0, 588) and inputs["images"].dtype == np.uint8
    assert inputs["grid_thw"].shape == (0, 3)
    assert not inputs["token_type_ids"].any()
    count = inputs["input_ids"].shape[1]
    np.testing.assert_array_equal(inputs["position_ids"][0], np.repeat(np.arange(count)[:, None], 3, axis=1))


def test_a_tool_may_return_pictures(processor: ErnieProcessor):
    call = {"function": {"name": "zoom", "arguments": {"box": [0, 1]}}}
    conversation = [
        user(text_part("Look."), image_part(picture(28, 56))),
        {"role": "assistant", "content": None, "reasoning_content": "closer", "tool_calls": [call]},
        {"role": "tool", "content": [text_part("zoomed: "), image_part(picture(56, 56))]},
    ]
    inputs = arrays(processor(conversation, tools=[{"name": "zoom"}], enable_thinking=True, image_min_pixels=784))
    text = (
        '<|begin_of_sentence|>\n<tool_list>\n[{"name": "zoom"}]\n</tool_list>\nUser: Look.Picture 1:[]\nAssistant: '
        '<think>\ncloser\n</think>\n\n<tool_call>\n{"name": "zoom", "arguments": {"box": [0, 1]}}\n</tool_call>'
        "<|end_of_sentence|>User: <tool_output>\nzoomed: Picture 2:[]\n</tool_output>\nAssistant: <think>"
    )
    assert processor.decode(inputs["input_ids"][0]) == expanded(text, 2, 4)


def test_thinking_on_and_off(processor: ErnieProcessor):
    question = [{"role": "user", "content": "Hi"}]
    on = processor.apply_chat_template(question, enable_thinking=True)
    off = processor.apply_chat_template(question, enable_thinking=False)
    assert on.endswith("Assistant: <think>") and off.endswith("Assistant: " + NO_THOUGHT)
    assert processor.apply_chat_template(question) == off
    thought = parse_response("\nhm\n</think>\n\nYes", prompt_opened_thinking=prompt_opens_thinking(on))
    assert (thought.reasoning, thought.content) == ("hm", "Yes")
    assert parse_response("Yes", prompt_opened_thinking=prompt_opens_thinking(off)).reasoning is None
    for thinking, prompt in ((True, on), (False, off)):
        ids = processor(question, enable_thinking=thinking)["input_ids"]
        assert processor.decode(ids[0]) == prompt


def test_a_conversation_that_ends_with_an_answer(processor: ErnieProcessor):
    conversation = [user(image_part(picture(56, 56))), {"role": "assistant", "content": "A cat."}]
    ids = processor(conversation, add_generation_prompt=False)["input_ids"]
    assert processor.decode(ids[0]).endswith("<|IMAGE_END|>\nAssistant: A cat.<|end_of_sentence|>")


def test_the_template_of_the_checkpoint_is_used(tmp_path: Path):
    template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' else "
        "'<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}{% endfor %}{% endfor %}{{ options.mode }}"
    )
    processor = ErnieProcessor.from_pretrained(write_processor_folder(tmp_path, chat_template=template))
    ids = processor([user(image_part(picture(56, 56)), text_part("x"))], template_kwargs={"options": {"mode": "!"}})
    assert processor.decode(ids["input_ids"][0]) == expanded("[]x!", 4)


# ---- sources


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_a_picture_in_any_form_is_the_same(processor: ErnieProcessor, tmp_path: Path):
    array = picture(70, 50)
    content = png(array)
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    body = base64.b64encode(content).decode()
    sources = [array, Image.fromarray(array), content, path, str(path), f"data:image/png;base64,{body}", body]
    parts = [image_part(source) for source in sources]
    parts += [{"type": "image_url", "image_url": array}, {"type": "image", "image": array}]
    parts += [{"type": "image", "image_url": {"url": str(path)}}, {"type": "image", "url": str(path)}]
    rows = [arrays(processor([user(part)])) for part in parts]
    for row in rows:
        for name in KEYS:
            np.testing.assert_array_equal(row[name], rows[0][name])


def test_a_picture_gets_its_size_first(processor: ErnieProcessor):
    array = picture(70, 50)
    sized = arrays(processor([user(image_part(array, image_width=112, image_height=56))]))
    resized = np.asarray(Image.fromarray(array).resize((112, 56), Image.Resampling.BICUBIC))
    assert sized["grid_thw"].tolist() == [[1, 4, 8]]
    np.testing.assert_array_equal(sized["images"], processor([user(image_part(resized))])["images"].numpy())


def test_equal_sources_are_read_once(processor: ErnieProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[Any] = []
    monkeypatch.setattr(module, "encode_picture", lambda *options: read.append(options[0]) or encode_picture(*options))
    path, array = tmp_path / "picture.png", picture(56, 56)
    path.write_bytes(png(array))
    inputs = processor(
        [[user(image_part(str(path)), image_part(array))], [user(image_part(array), image_part(str(path)))]]
    )
    assert len(read) == 2
    assert inputs["grid_thw"].tolist() == [[1, 4, 4]] * 4
    processor([user(image_part(str(path)), image_part(str(path), image_width=28, image_height=28))])
    assert len(read) == 4


def test_a_video_is_pairs_of_equally_large_frames(processor: ErnieProcessor):
    frames = [picture(56, 84, seed) for seed in range(5)]
    inputs = arrays(processor([user({"type": "video", "video": frames}, text_part("?"))], video_max_pixels=84 * 56))
    assert inputs["grid_thw"].tolist() == [[6, 4, 6]]
    assert inputs["images"].shape == (6 * 24, 588)
    assert (inputs["input_ids"] == VISION.placeholder_id).sum() == 18
    assert (inputs["token_type_ids"] == 2).sum() == 18
    np.testing.assert_array_equal(inputs["images"][-24:], inputs["images"][-48:-24])


def test_a_video_may_choose_its_frames(processor: ErnieProcessor, tmp_path: Path):
    path = tmp_path / "clip.gif"
    first, *others = [Image.fromarray(picture(28, 28, seed)) for seed in range(20)]
    first.save(path, save_all=True, append_images=others, duration=100)

    def frames(part: dict[str, Any], **limits: Any) -> int:
        return int(processor([user({"type": "video_url", **part})], **limits)["grid_thw"][0, 0])

    url = {"video_url": {"url": str(path)}}
    assert frames(url, target_frames=8) == frames(url, video_target_frames=8) == 8
    assert frames({**url, "target_frames": 4}, target_frames=8) == 4
    assert frames({"video_url": {"url": str(path), "target_frames": 4}}) == 4
    assert frames(url) == 16  # min_frames


# ---- limits


def test_limits_at_construction_and_per_call(folder: Path):
    question = [user(image_part(picture(280, 280)))]

    def sides(processor: ErnieProcessor, **limits: Any) -> list[int]:
        return processor(question, **limits)["grid_thw"][0].tolist()

    small = ErnieProcessor.from_pretrained(folder, image_max_pixels=56 * 56)
    assert sides(ErnieProcessor.from_pretrained(folder)) == [1, 20, 20]
    assert sides(small) == [1, 4, 4]
    assert sides(small, image_max_pixels=112 * 112) == [1, 8, 8]
    assert sides(small, image_max_pixels=10**6, image_min_pixels=560 * 560) == [1, 40, 40]
    assert sides(small) == [1, 4, 4]


def test_wrong_limits(processor: ErnieProcessor, folder: Path):
    message = "no setting max_pixels; there are image_min_pixels, "
    with pytest.raises(ErnieError, match=message):
        processor([{"role": "user", "content": "Hi"}], max_pixels=3)
    with pytest.raises(ErnieError, match=message):
        ErnieProcessor.from_pretrained(folder, max_pixels=3)


# ---- batches


def test_a_batch_is_its_rows(processor: ErnieProcessor):
    conversations = [
        [user(image_part(picture(56, 84)), text_part("first"))],
        [{"role": "user", "content": "no picture"}],
        [user({"type": "video", "video": [picture(28, 28)] * 2}), {"role": "assistant", "content": "x"}, user(
            text_part("more"), image_part(picture(100, 60)), image_part(picture(56, 56)))],
    ]  # fmt: skip
    batch = arrays(processor(conversations))
    rows = [arrays(processor(conversation)) for conversation in conversations]
    longest = max(row["input_ids"].shape[1] for row in rows)
    assert batch["input_ids"].shape == (3, longest) and batch["position_ids"].shape == (3, longest, 3)
    for index, row in enumerate(rows):
        padding = longest - row["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
            np.testing.assert_array_equal(batch[name][index, padding:], row[name][0])
            assert not batch[name][index, :padding].any()
    for name in ("images", "grid_thw"):
        np.testing.assert_array_equal(batch[name], np.concatenate([row[name] for row in rows]))


def test_padding_has_the_pad_token(tmp_path: Path):
    processor = ErnieProcessor.from_pretrained(write_processor_folder(tmp_path, vision_config(pad_token_id=9)))
    hi, longer = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hi there, who are you?"}]
    inputs = arrays(processor([hi, longer]))
    assert set(inputs["input_ids"][inputs["attention_mask"] == 0]) == {9}


# ---- what is refused


@pytest.mark.parametrize(
    "text", [PICTURE_PLACE, f"{PICTURE_PLACE} and", "x<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>"]
)
def test_text_cannot_make_a_place_for_a_picture(processor: ErnieProcessor, text: str):
    for parts in (
        [text_part(text)],
        [text_part(text), image_part(picture())],
        [image_part(picture()), text_part(text)],
    ):
        with pytest.raises(ErnieError, match=r"the prompt has places for \d pictures and \d videos, the messages hold"):
            processor([user(*parts)])


def test_text_in_pieces_cannot_make_a_place_either(processor: ErnieProcessor):
    with pytest.raises(ErnieError, match="places for 1 pictures and 0 videos, the messages hold 0 pictures"):
        processor([user(text_part(PICTURE_PLACE[:20]), text_part(PICTURE_PLACE[20:]))])


@pytest.mark.parametrize("parts", [[], [image_part(picture(56, 56))]])
def test_text_cannot_hold_placeholder_tokens(processor: ErnieProcessor, parts: list):
    with pytest.raises(ErnieError, match=r"holds <\|IMAGE_PLACEHOLDER\|>, which stands for a picture"):
        processor([user(text_part("<|IMAGE_PLACEHOLDER|>"), *parts)])


def test_other_marks_in_text_do_no_harm(processor: ErnieProcessor):
    text = "<|IMAGE_END|><|image@placeholder|><|VIDEO_START|>"
    inputs = arrays(processor([user(text_part(text), image_part(picture(56, 56)))]))
    assert (inputs["input_ids"] == VISION.placeholder_id).sum() == 4


def test_a_template_that_leaves_pictures_out(processor: ErnieProcessor):
    with pytest.raises(ErnieError, match="places for 0 pictures and 0 videos, the messages hold 1 pictures"):
        processor([user(image_part(picture()))], chat_template="{{ messages[0].role }}")


def test_a_template_that_changes_the_order(processor: ErnieProcessor):
    template = VIDEO_PLACE + PICTURE_PLACE
    video = {"type": "video", "video": [picture()] * 2}
    with pytest.raises(ErnieError, match="in order"):
        processor([user(image_part(picture()), video)], chat_template=template)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio"}, r'messages\[0\]\["content"\]\[1\] has the type \'audio\', expected text, image_url'),
        ({"type": "image_url"}, r'messages\[0\]\["content"\]\[1\] has no image, expected'),
        ({"type": "image_url", "image_url": {}}, "has no image, expected"),
        ({"type": "video", "video_url": {"detail": "low"}}, "has no video, expected"),
        (image_part(b"no picture"), r'messages\[0\]\["content"\]\[1\]: '),
        (image_part("no-such-file.png"), r'messages\[0\]\["content"\]\[1\]: .*no-such-file.png'),
        ({"type": "video", "video": []}, r'messages\[0\]\["content"\]\[1\]: .*without frames'),
        ({"type": "video", "video": [picture()], "fps": -1}, r'messages\[0\]\["content"\]\[1\]: .*fps'),
        (image_part(picture(), image_width=5), "image_width 5 and image_height None, expected two positive"),
        (image_part(picture(), image_width=0, image_height=5), "image_width 0 and image_height 5"),
        (image_part(picture(), image_width=10**6, image_height=10**6), "asks for 1000000x1000000 pixels"),
    ],
)
def test_wrong_parts(processor: ErnieProcessor, part, message):
    with pytest.raises(ErnieError, match=message):
        processor([user(text_part("x"), part)])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is "),
        ("Hi", "messages is 'Hi'"),
        ({"role": "user", "content": "Hi"}, "messages is "),
        ([[{"role": "user", "content": "Hi"}], []], r"messages\[1\] is "),
        ([[{"role": "user", "content": "Hi"}], [{"role": "user"}]], r'messages\[1\]\[0\]\["content"\] is None'),
        ([[user(image_part(b"x"))]], r'messages\[0\]\[0\]\["content"\]\[0\]: '),
    ],
)
def test_wrong_messages(processor: ErnieProcessor, messages, message):
    with pytest.raises(ErnieError, match=message):
        processor(messages)


def test_a_text_model_has_no_processor(tmp_path: Path):
    folder = write_processor_folder(tmp_path, vision_config().text_part())
    with pytest.raises(ErnieError, match="a text model"):
        ErnieProcessor.from_pretrained(folder)


def test_a_tokenizer_of_another_checkpoint(tmp_path: Path):
    folder = write_processor_folder(tmp_path, vision_config(image_end_token_id=5))
    with pytest.raises(ErnieError, match=r"the id of <\|IMAGE_END\|> is 5, but 2546 in the tokenizer"):
        ErnieProcessor.from_pretrained(folder)


def test_limits_of_the_training_pipeline_are_not_read(tmp_path: Path):
    folder = write_processor_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 1, "max_pixels": 784}))
    assert ErnieProcessor.from_pretrained(folder).limits == MediaLimits()
    assert isinstance(ErnieProcessor.from_pretrained(folder).tokenizer, ErnieTokenizer)


def test_limits_that_the_checkpoint_sets_for_itself(tmp_path: Path) -> None:
    """Entries by our names count, those of the published files do not; what the caller says comes first."""
    folder = write_processor_folder(tmp_path)
    settings = {"min_pixels": 1, "max_pixels": 2, "image_max_pixels": 12544, "fps": 4, "patch_size": 14}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    limits = ErnieProcessor.from_pretrained(folder).limits
    assert (limits.image.max_pixels, limits.frames.fps) == (12544, 4)
    assert limits.image.min_pixels == MediaLimits().image.min_pixels
    assert ErnieProcessor.from_pretrained(folder, fps=1).limits.frames.fps == 1
    (folder / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="preprocessor_config.json: cannot be read as JSON"):
        ErnieProcessor.from_pretrained(folder)
