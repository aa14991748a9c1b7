"""Generating with pictures: batches, caches, conversations, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.errors import ErnieError
from ernie45.generation.prompt_cache import PromptCache
from ernie45.models.cache import KVCache
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers.tiny import difference
from tests.helpers.vision import vision_config, write_vision_folder

PLACEHOLDER, BEGIN, END = 1536, 2545, 2546
NEW = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ErnieForConditionalGeneration:
    config = vision_config(tie_word_embeddings=False)  # a tied random head repeats the last token for ever
    folder = write_vision_folder(tmp_path_factory.mktemp("vision"), config)
    return ErnieForConditionalGeneration.from_pretrained(folder, dtype="float32", progress=False)


@pytest.fixture
def encoded(model: ErnieForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pictures in each call of the encoder."""
    calls: list[int] = []
    correct = model.encode_images

    def counting(images: paddle.Tensor, grid: np.ndarray) -> paddle.Tensor:
        calls.append(len(grid))
        return correct(images, grid)

    monkeypatch.setattr(model, "encode_images", counting)
    return calls


def picture(frames: int, rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Random patches and the tokens that stand for them."""
    patches = np.random.default_rng([seed, frames, rows, columns]).integers(0, 256, (frames * rows * columns, 588))
    count = max(1, frames // 2) * rows * columns // 4
    return patches.astype("uint8"), [BEGIN, *[PLACEHOLDER] * count, END]


def prompt(*parts: Any) -> dict[str, Any]:
    """Inputs of one row from text ids and (frames, rows, columns[, seed]) of pictures."""
    ids: list[int] = []
    patches, grid = [np.zeros([0, 588], "uint8")], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            pixels, tokens = picture(*part)
            ids += tokens
            patches.append(pixels)
            grid.append(part[:3])
    return {"input_ids": [ids], "images": np.concatenate(patches), "grid_thw": np.array(grid, "int64").reshape(-1, 3)}


def batch(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_ids": [row["input_ids"][0] for row in rows],
        "images": np.concatenate([row["images"] for row in rows]),
        "grid_thw": np.concatenate([row["grid_thw"] for row in rows]),
    }


def reply(model: ErnieForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=NEW, eos_token_id=[], **options).ids.tolist()


@paddle.no_grad()
def step_by_step(model: ErnieForConditionalGeneration, inputs: dict[str, Any]) -> list[int]:
    """The greedy reply without any cache: the whole row is computed for each token."""
    ids, chosen = list(inputs["input_ids"][0]), []
    for _ in range(NEW):
        logits = model(paddle.to_tensor([ids]), images=paddle.to_tensor(inputs["images"]), grid_thw=inputs["grid_thw"])
        chosen.append(int(logits[0, -1].argmax()))
        ids.append(chosen[-1])
    return chosen


ROWS = [
    prompt(5, 6, (1, 4, 6), 7),
    prompt(5, (6, 2, 2), 9, 10, (1, 2, 4, 1), 11, 12),
    prompt(8, 9, 10),
    prompt((1, 2, 2), (1, 2, 2, 1), 4),
]


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_with_a_cache_as_without(model: ErnieForConditionalGeneration, row: int) -> None:
    assert reply(model, ROWS[row]) == [step_by_step(model, ROWS[row])]


def test_each_row_of_a_batch_as_alone(model: ErnieForConditionalGeneration) -> None:
    assert reply(model, batch(*ROWS)) == [reply(model, row)[0] for row in ROWS]


def test_padding_may_be_anywhere(model: ErnieForConditionalGeneration) -> None:
    ids, row = ROWS[0]["input_ids"][0], {k: v for k, v in ROWS[0].items() if k != "input_ids"}
    padded = {"input_ids": [[0, *ids[:2], 0, *ids[2:]]], "attention_mask": [[0, 1, 1, 0, *[1] * (len(ids) - 2)]]}
    assert reply(model, {**padded, **row}) == reply(model, ROWS[0])


@paddle.no_grad()
def test_forward_takes_left_padded_batches(model: ErnieForConditionalGeneration) -> None:
    rows = ROWS[:2]
    longest = max(len(row["input_ids"][0]) for row in rows)
    ids = [[0] * (longest - len(row["input_ids"][0])) + row["input_ids"][0] for row in rows]
    mask = [[0] * (longest - len(row["input_ids"][0])) + [1] * len(row["input_ids"][0]) for row in rows]
    joined = batch(*rows)
    together = model(
        paddle.to_tensor(ids),
        images=paddle.to_tensor(joined["images"]),
        grid_thw=joined["grid_thw"],
        attention_mask=paddle.to_tensor(mask),
    )
    for number, row in enumerate(rows):
        alone = model(
            paddle.to_tensor(row["input_ids"]), images=paddle.to_tensor(row["images"]), grid_thw=row["grid_thw"]
        )
        assert difference(together[number, -alone.shape[1] :], alone[0]) < 2e-5


@paddle.no_grad()
def test_forward_continues_a_cache_with_another_picture(model: ErnieForConditionalGeneration) -> None:
    """Positions of the second part follow those of the first, though they are not given."""
    first, second = prompt(5, (1, 4, 4), 6), prompt(7, (1, 2, 2, 3), 8)
    whole = {**batch(first, second), "input_ids": [first["input_ids"][0] + second["input_ids"][0]]}
    cache = KVCache(model.config)
    parts = [
        model(paddle.to_tensor(p["input_ids"]), paddle.to_tensor(p["images"]), p["grid_thw"], cache=cache)
        for p in (first, second)
    ]
    expected = model(paddle.to_tensor(whole["input_ids"]), paddle.to_tensor(whole["images"]), whole["grid_thw"])
    assert difference(paddle.concat(parts, axis=1), expected) < 2e-5


def test_a_conversation_encodes_each_picture_once(model: ErnieForConditionalGeneration, encoded: list[int]) -> None:
    cache = PromptCache(model.config)
    first = reply(model, ROWS[0], cache=cache)
    grown = prompt(5, 6, (1, 4, 6), 7, *first[0], 13, 14, (1, 2, 2, 7), 15)
    second = reply(model, grown, cache=cache)
    assert encoded == [1, 1]
    fresh = PromptCache(model.config)
    assert second == reply(model, grown, cache=fresh)
    assert set(fresh.features) == set(cache.features) and len(cache.features) == 2


def test_a_conversation_that_is_taken_back_does_not_encode_again(
    model: ErnieForConditionalGeneration, encoded: list[int]
) -> None:
    """The template may drop reasoning in front of a picture, whose features then stay though its keys and values go."""
    cache = PromptCache(model.config)
    reply(model, prompt(5, 6, 7, (1, 4, 4), 8), cache=cache)
    changed = prompt(5, 7, (1, 4, 4), 8)
    found = reply(model, changed, cache=cache)
    assert encoded == [1]
    assert found == [step_by_step(model, changed)]


def test_another_picture_behind_the_same_placeholders_is_noticed(model: ErnieForConditionalGeneration) -> None:
    cache = PromptCache(model.config)
    reply(model, prompt(5, (1, 4, 4, 0), 6), cache=cache)
    other = prompt(5, (1, 4, 4, 1), 6)
    assert reply(model, other, cache=cache) == [step_by_step(model, other)]
    assert reply(model, other) != reply(model, prompt(5, (1, 4, 4, 0), 6))  # else this test would show nothing


def test_a_prompt_that_ends_inside_what_is_held(model: ErnieForConditionalGeneration) -> None:
    """The last token of a prompt is always computed, even if it is a picture's."""
    cache = PromptCache(model.config)
    whole = prompt(5, (1, 4, 4), 6)
    reply(model, whole, cache=cache)
    cut = {**whole, "input_ids": [whole["input_ids"][0][:-2]]}  # the last one now is a placeholder
    assert reply(model, cut, cache=cache) == [step_by_step(model, cut)]


def test_the_same_picture_twice_is_encoded_once(model: ErnieForConditionalGeneration, encoded: list[int]) -> None:
    twice = prompt(5, (1, 4, 4), 6, (1, 4, 4), 7)
    assert reply(model, twice) == [step_by_step(model, twice)]
    assert encoded[0] == 1


def test_sampled_replies_and_beams_start_from_the_same_pictures(model: ErnieForConditionalGeneration) -> None:
    several = model.generate(
        **ROWS[1], max_new_tokens=3, do_sample=True, num_return_sequences=3, seed=1, eos_token_id=[]
    )
    assert several.ids.shape == [3, 3]
    beam = model.generate(**ROWS[1], max_new_tokens=3, num_beams=2, eos_token_id=[])
    greedy = model.generate(**ROWS[1], max_new_tokens=3, eos_token_id=[])
    assert float(beam.scores[0]) >= float(greedy.scores[0]) - 1e-5


def test_types_and_positions_that_are_given_are_taken(model: ErnieForConditionalGeneration) -> None:
    row = ROWS[0]
    length = len(row["input_ids"][0])
    text_only = np.zeros([1, length + 1], "int64")  # upstream's further column
    flat = np.tile(np.arange(length)[None, :, None], [1, 1, 3])
    given = model.generate(**row, token_type_ids=text_only, position_ids=flat, max_new_tokens=NEW, eos_token_id=[])
    with paddle.no_grad():
        logits = model(
            paddle.to_tensor(row["input_ids"]),
            paddle.to_tensor(row["images"]),
            row["grid_thw"],
            token_type_ids=paddle.to_tensor(text_only),
            position_ids=paddle.to_tensor(flat),
        )
    assert int(given.ids[0, 0]) == int(logits[0, -1].argmax())
    assert difference(logits, model(**{k: paddle.to_tensor(v) for k, v in row.items()})) > 1e-3


def test_other_positions_or_types_are_not_taken_from_the_cache(model: ErnieForConditionalGeneration) -> None:
    row, cache = ROWS[0], PromptCache(model.config)
    in_a_line = 3 + np.arange(len(row["input_ids"][0]))[None, :, None].repeat(3, axis=2)
    text_only = np.zeros([1, len(row["input_ids"][0])], "int64")
    found = []
    for changes in ({}, {"position_ids": in_a_line}, {"token_type_ids": text_only}, {}):
        given = {**row, **changes, "max_new_tokens": NEW, "eos_token_id": []}
        found.append(float(model.generate(**given, cache=cache).scores[0]))
        assert found[-1] == pytest.approx(float(model.generate(**given).scores[0]), abs=1e-5)
    assert min(abs(found[1] - found[0]), abs(found[2] - found[0])) > 1e-3


WRONG: list[tuple[dict[str, Any], str]] = [
    ({**ROWS[0], "images": None, "grid_thw": None}, "belong to no picture or video"),
    ({**ROWS[2], "images": ROWS[0]["images"], "grid_thw": ROWS[0]["grid_thw"]}, "more items than places"),
    ({**ROWS[0], "images": ROWS[0]["images"][:-1]}, "images: expected uint8 .24, 588."),
    ({**ROWS[0], "images": ROWS[0]["images"].astype("int64")}, "images: expected uint8"),
    ({**ROWS[0], "grid_thw": [[1, 3, 8]]}, "must be multiples of 2"),
    ({**ROWS[0], "grid_thw": [[3, 2, 4]]}, "a video needs a multiple of 2"),
    ({**ROWS[0], "grid_thw": [1, 4, 6]}, "expected integers .items, 3."),
    ({**ROWS[0], "token_type_ids": [[0, 1]]}, "token_type_ids: expected rows"),
    ({**ROWS[0], "position_ids": [[[0, 0, 0]]]}, "position_ids: expected rows"),
]


@pytest.mark.parametrize(("inputs", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_go_together(model: ErnieForConditionalGeneration, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        model.generate(**inputs, max_new_tokens=1)


def test_a_failed_call_leaves_the_cache_usable(model: ErnieForConditionalGeneration) -> None:
    cache = PromptCache(model.config)
    expected = reply(model, ROWS[0])
    reply(model, ROWS[0], cache=cache)
    with pytest.raises(ErnieError):
        model.generate(**WRONG[0][0], cache=cache)
    assert reply(model, ROWS[0], cache=cache) == expected


def test_pictures_are_refused_by_text_models() -> None:
    from tests.helpers.tiny import tiny_model

    with pytest.raises(ErnieError, match="images"):
        tiny_model().generate([[5, 6]], images=np.zeros([4, 588], "uint8"))


def test_saved_as_loaded_in_both_layouts(model: ErnieForConditionalGeneration, tmp_path: Path) -> None:
    """What is saved is what was loaded, in both layouts."""
    for layout in ("paddle", "pt"):
        model.save_pretrained(tmp_path / layout, layout=layout, progress=False)
        again = ErnieForConditionalGeneration.from_pretrained(tmp_path / layout, dtype="float32", progress=False)
        own, other = model.state_dict(), again.state_dict()
        assert own.keys() == other.keys()
        assert all(difference(own[name], other[name]) == 0 for name in own)
