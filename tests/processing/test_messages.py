"""Taking pictures and videos out of messages, and putting their tokens into prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.processing.messages import IMAGE, VIDEO, check_places, encode_prompt, read_media
from ernie45.tokenizer import ErnieTokenizer
from tests.helpers.vision import vision_config

VISION = vision_config().vision
assert VISION is not None
PLACES = {
    IMAGE: "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>",
    VIDEO: "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>",
}
GRIDS = {IMAGE: (1, 4, 6), VIDEO: (4, 2, 2)}
TOKENIZER = ErnieTokenizer.from_pretrained("ernie45-tiny")

pieces = st.lists(st.one_of(st.text("ab \n文.", max_size=4), st.sampled_from([IMAGE, VIDEO]).map(lambda kind: (kind,))))


def test_media_come_in_order_with_what_their_parts_say():
    source, frames = object(), [1, 2]
    conversation = [
        {"role": "system", "content": "S", "name": "kept"},
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": frames, "fps": 1, "max_frames": None, "detail": "low"},
                {"type": "text", "text": "x"},
                {"type": "image", "image": {"url": source, "image_width": 3, "image_height": 2}, "fps": 5},
            ],
        },
    ]
    shown, (video, image) = read_media(conversation)
    assert (video.kind, video.source, video.settings) == (VIDEO, frames, {"fps": 1})
    assert (image.kind, image.source, image.size, image.settings) == (IMAGE, source, (2, 3), {})
    assert (video.where, image.where) == ('messages[1]["content"][0]', 'messages[1]["content"][2]')
    assert shown[0] == conversation[0]
    assert shown[1]["content"] == [
        {"type": "video_url", "video_url": {"url": ""}},
        {"type": "text", "text": "x"},
        {"type": "image_url", "image_url": {"url": ""}},
    ]
    assert conversation[1]["content"][0]["video_url"] is frames


def test_sources_without_truth_value_are_taken():
    _, media = read_media([{"role": "user", "content": [{"type": "image", "image": np.zeros([2, 2, 3], "uint8")}]}])
    assert media[0].source.shape == (2, 2, 3)


@given(pieces)
def test_every_place_gets_its_tokens(parts):
    prompt = "".join(part if isinstance(part, str) else PLACES[part[0]] for part in parts)
    kinds = [part[0] for part in parts if not isinstance(part, str)]
    ids = encode_prompt(prompt, np.array([GRIDS[kind] for kind in kinds]).reshape(-1, 3), TOKENIZER, VISION)
    text = prompt
    for kind, count in ((IMAGE, 6), (VIDEO, 2)):
        text = text.replace(f"<|{kind}@placeholder|>", "<|IMAGE_PLACEHOLDER|>" * count)
    assert ids.dtype == np.int64
    assert TOKENIZER.decode(ids) == text


def test_places_of_converted_checkpoints_are_known():
    prompt = "a<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|><|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>b"
    ids = encode_prompt(prompt, np.array([GRIDS[IMAGE], GRIDS[VIDEO]]), TOKENIZER, VISION)
    published = encode_prompt(f"a{PLACES[IMAGE]}{PLACES[VIDEO]}b", np.array(list(GRIDS.values())), TOKENIZER, VISION)
    np.testing.assert_array_equal(ids, published)


@given(pieces, pieces)
def test_places_must_be_those_of_the_media(written, given_parts):
    prompt = "".join(part if isinstance(part, str) else PLACES[part[0]] for part in written)
    kinds = [[part[0] for part in parts if not isinstance(part, str)] for parts in (written, given_parts)]
    content = [{"type": kind, kind: "x"} for kind in kinds[1]]
    _, media = read_media([{"role": "user", "content": content}])
    if kinds[0] == kinds[1]:
        check_places(prompt, media)
    else:
        with pytest.raises(ErnieError, match="the prompt has places for"):
            check_places(prompt, media)
