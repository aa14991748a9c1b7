"""Packed rows: every sequence once, none sees another, and the model says the same as of each sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ErnieForConditionalGeneration
from ernie45.errors import ErnieError
from ernie45.losses import IGNORED_LABEL
from ernie45.processing.processor import ErnieProcessor
from ernie45.training.data import Conversation, Encoder, Example, Pair, pack
from ernie45.training.data.packing import first_fit
from tests.helpers.tiny import DENSE, MOE, difference, tiny_config, tiny_model
from tests.helpers.vision import write_vision_folder


def example(length: int, seed: int = 0) -> Example:
    generator = np.random.default_rng([seed, length])
    ids, labels = generator.integers(3, DENSE["vocab_size"], (2, length))
    labels[: length // 2] = IGNORED_LABEL
    return Example(ids, labels, np.arange(length))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 50))
@settings(max_examples=100)
def test_first_fit_places_every_sequence_once_in_rows_with_room(lengths: list[int], capacity: int) -> None:
    rows = first_fit(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) <= capacity
    # no two rows could be one: the bound of any first-fit
    assert all(left + right > capacity for i, left in enumerate(filled) for right in filled[:i])
    assert rows == sorted(sorted(row) for row in rows)


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4).filter(any), st.integers(0, 5))
@settings(max_examples=60)
def test_rows_hold_their_documents_and_padding_that_nobody_sees(lengths: list[list[int]], extra: int) -> None:
    rows = [[example(n, seed=i) for i, n in enumerate(row)] for row in lengths]
    width = max(map(sum, lengths)) + extra
    batch = pack(rows, width, pad_token_id=1)
    number = 0
    for index, row in enumerate(rows):
        start = 0
        for document in row:
            part = (index, slice(start, start + len(document)))
            np.testing.assert_array_equal(batch.input_ids[part], document.input_ids)
            np.testing.assert_array_equal(batch.labels[part], document.labels)
            np.testing.assert_array_equal(batch.position_ids[part], np.arange(len(document)))
            assert set(batch.document_ids[part]) == {number}
            start, number = start + len(document), number + 1
            assert set(batch.attn_mask_startend_row_indices[index, 0, part[1], 0]) == {start}
        assert set(batch.input_ids[index, start:]) <= {1} and set(batch.labels[index, start:]) <= {IGNORED_LABEL}
        assert set(batch.document_ids[index, start:]) <= {-1}
        np.testing.assert_array_equal(batch.position_ids[index, start:], np.arange(width - start))
        assert set(batch.attn_mask_startend_row_indices[index, 0, start:, 0]) <= {width}
    assert batch.tokens == sum(map(sum, lengths)) and len(batch.pairs) == 0
    assert batch.learned == sum(document.learned for row in rows for document in row)


def test_dtypes_and_shapes() -> None:
    batch = pack([[example(3)], []], 5)
    ends = batch.attn_mask_startend_row_indices
    assert ends.shape == (2, 1, 5, 1) and ends.dtype == np.int32
    assert {array.dtype for array in (batch.input_ids, batch.labels, batch.position_ids)} == {np.dtype("int64")}
    assert batch.images is None and batch.grid_thw is None and batch.token_type_ids is None


def test_pairs_are_numbered_by_their_documents() -> None:
    rows = [[example(2), Pair(example(3), example(4))], [Pair(example(1), example(2))]]
    batch = pack(rows)
    assert batch.pairs.tolist() == [[1, 2], [3, 4]]
    assert np.bincount(batch.document_ids[batch.document_ids >= 0]).tolist() == [2, 3, 4, 1, 2]


def test_rows_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(ErnieError, match="a row holds 7 tokens, which are more than its length of 6"):
        pack([[example(3), example(4)]], 6)


@pytest.mark.parametrize("base", [DENSE, MOE])
@paddle.no_grad()
def test_packed_equals_separate(base: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(base))
    rows = [[example(5), Pair(example(7), example(3))], [example(11)]]
    batch = pack(rows, 17)
    _, packed = model(**batch.inputs())
    documents = [document for row in rows for sequence in row for document in sequence.examples]
    for number, document in enumerate(documents):
        alone = model(paddle.to_tensor(document.input_ids).unsqueeze(0))[0]
        assert difference(packed.numpy()[batch.document_ids == number], alone) < 1e-5


@paddle.no_grad()
def test_the_loss_of_a_batch_is_the_mean_over_all_learned_tokens() -> None:
    model = tiny_model()
    rows = [[example(5), example(7)], [example(11)]]
    loss, _ = model(**pack(rows, 13).inputs())
    documents = [document for row in rows for document in row]
    alone = [model(**pack([[document]]).inputs())[0] for document in documents]
    expected = np.average([float(value) for value in alone], weights=[document.learned for document in documents])
    assert abs(float(loss) - expected) < 1e-5


def picture(height: int, width: int, seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"type": "image", "image": pixels}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_folder(tmp_path_factory.mktemp("checkpoint"))


@paddle.no_grad()
def test_packed_equals_separate_with_pictures_and_videos(folder: Path) -> None:
    model = ErnieForConditionalGeneration.from_pretrained(folder)
    processor = ErnieProcessor.from_pretrained(folder, image_min_pixels=784, video_min_pixels=784, video_max_pixels=784)
    frames = [picture(28, 28, seed)["image"] for seed in range(4)]
    questions: list[Any] = [
        [picture(28, 56, 1), {"type": "text", "text": "?"}, picture(56, 28, 2)],
        "2+2?",
        [{"type": "text", "text": "!"}, {"type": "video", "video": frames}],
    ]
    encoder = Encoder(processor.tokenizer, processor)
    examples = [
        encoder(Conversation(({"role": "user", "content": q}, {"role": "assistant", "content": "4"}), (False, True)))[0]
        for q in questions
    ]
    batch = pack([[examples[0], examples[1]], [examples[2]]], sum(map(len, examples)))
    assert batch.position_ids.shape == (*batch.input_ids.shape, 3) and len(batch.grid_thw) == 3
    _, packed = model(**batch.inputs())
    for number, alone in enumerate(examples):
        _, logits = model(**pack([[alone]]).inputs())
        assert difference(packed.numpy()[batch.document_ids == number], logits[0]) < 1e-4
    with pytest.raises(ErnieError, match="some sequences were made with a processor and some without"):
        pack([[examples[0], example(3)]])
