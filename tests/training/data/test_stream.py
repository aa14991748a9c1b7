"""The stream of batches: every sample once, the same after a restore, the same for any number of ranks."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.training.data import Batch, DataStream, Encoder, Source
from tests.helpers.text_part import text_tokenizer

TOKENIZER = text_tokenizer()
SAMPLES = 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of very different lengths, one of which no row can hold, and some lines that are broken."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [json.dumps({"src": f"{i}?" + "+1" * (i * 7 % 23), "tgt": f"answer {i}"}) for i in range(SAMPLES)]
    lines.insert(7, '{"src": "broken')
    lines.insert(20, json.dumps({"src": "much too long " * 40, "tgt": "no"}))
    lines.insert(30, json.dumps({"question": "unknown format"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def stream(path: Path, **options: Any) -> DataStream:
    encoder = Encoder(TOKENIZER, max_length=options.pop("max_length", 96))
    return DataStream([path], encoder, **{"report": lambda message: None, **options})


def documents(batches: list[Batch]) -> list[str]:
    """The text of every document."""
    return [
        TOKENIZER.decode(batch.input_ids[batch.document_ids == number])
        for batch in batches
        for number in range(batch.document_ids.max() + 1)
        if (batch.document_ids == number).any()
    ]


def same(left: Batch, right: Batch) -> bool:
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in fields(Batch)]
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_every_sample_once(path: Path, packing: bool) -> None:
    batches = list(stream(path, rows=3, epochs=1, packing=packing, window=2))
    found = documents(batches)
    assert len(found) == len(set(found)) == SAMPLES
    assert {len(batch.input_ids) for batch in batches} == {3}
    if packing:
        assert {batch.input_ids.shape[1] for batch in batches} == {96}
    else:
        assert all((batch.document_ids >= 0).any(axis=0).all() for batch in batches)  # no column of padding only
        assert all(len(set(row)) <= 2 for batch in batches for row in batch.document_ids.tolist())


def test_packing_wastes_little(path: Path) -> None:
    batches = list(stream(path, epochs=3, window=16))
    assert sum(batch.tokens for batch in batches[:-1]) > 0.9 * 96 * (len(batches) - 1)


def test_a_stream_without_epochs_goes_on(path: Path) -> None:
    endless = stream(path)
    found = documents([next(endless) for _ in range(60)])
    assert len(found) > 2 * SAMPLES and len(set(found)) == SAMPLES


def test_without_shuffling_and_packing_samples_come_in_the_order_of_the_file(path: Path) -> None:
    found = documents(list(stream(path, epochs=1, shuffle=False, packing=False)))
    assert [int(text.rpartition(" ")[2]) for text in found] == list(range(SAMPLES))


# ---- resuming


@given(st.integers(0, 45), st.integers(1, 3), st.booleans(), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=25)
def test_a_restored_stream_goes_on_as_if_never_stopped(
    path: Path, cut: int, rows: int, packing: bool, window: int, ranks: int
) -> None:
    options = {"rows": rows, "packing": packing, "window": window, "ranks": ranks, "rank": ranks - 1, "seed": cut}
    whole = stream(path, **options)
    for _ in range(cut):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    resumed = stream(path, **options)
    resumed.restore(state)
    assert resumed.state() == whole.state()
    for _ in range(12):
        assert same(next(whole), next(resumed))
        assert whole.state() == resumed.state()
    assert (whole.bad_lines, whole.encoder.dropped) == (resumed.bad_lines, resumed.encoder.dropped)


@pytest.mark.parametrize("cut", [0, 1, 5, 100])
def test_a_finite_stream_ends_at_the_same_place_after_a_restore(path: Path, cut: int) -> None:
    whole, resumed = stream(path, rows=2, epochs=2), stream(path, rows=2, epochs=2)
    for _, _batch in zip(range(cut), whole, strict=False):
        pass
    resumed.restore(whole.state())
    left, right = list(whole), list(resumed)
    assert len(left) == len(right) and all(map(same, left, right))


def test_a_stream_can_be_restored_in_the_middle_of_its_own_work(path: Path) -> None:
    own = stream(path)
    next(own)
    state = own.state()
    expected = [next(own) for _ in range(5)]
    own.restore(state)
    assert all(same(next(own), batch) for batch in expected)


def test_a_state_stays_small(path: Path) -> None:
    own = stream(path)
    for _ in range(30):
        next(own)
    assert len(json.dumps(own.state())) < 2000


@pytest.mark.parametrize(("change", "named"), [({"seed": 1}, "seed is 1, was 0"), ({"rows": 2}, "rows is 2, was 1")])
def test_a_state_of_other_settings_is_refused(path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ErnieError, match=named):
        stream(path, **change).restore(stream(path).state())


def test_a_state_of_other_data_is_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / path.name
    other.write_bytes(path.read_bytes() + b'{"src": "one more", "tgt": "yes"}\n')
    with pytest.raises(ErnieError, match="of another data stream"):
        stream(other).restore(stream(path).state())


# ---- ranks


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_have_as_many_batches_and_together_every_sample(path: Path, packing: bool) -> None:
    ranks = [list(stream(path, rows=2, rank=rank, ranks=3, epochs=1, packing=packing)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    found = [text for batches in ranks for text in documents(batches)]
    assert len(found) == len(set(found)) == SAMPLES


def test_ranks_report_their_imbalance(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    sizes = np.random.default_rng(0).lognormal(2.5, 1.0, 128).astype(int).clip(1, 200)
    path.write_text("".join(json.dumps({"src": "1+" * size, "tgt": "a"}) + "\n" for size in sizes), encoding="utf-8")
    own = stream(path, rows=4, ranks=4, window=8, packing=False, max_length=500, epochs=1)
    next(own)
    before, after = own.imbalance
    assert before > 1.3 and after < 1.1


# ---- what goes wrong


def test_bad_lines_are_reported_once_with_file_and_line(path: Path) -> None:
    messages: list[str] = []
    own = stream(path, epochs=2, report=messages.append)
    list(own)
    assert sorted(message.split(": ")[1] for message in messages) == [f"{path}, line 31", f"{path}, line 8"]
    assert any("not JSON" in message for message in messages) and any("question" in message for message in messages)
    assert own.bad_lines == 2 and own.encoder.dropped == 2


def test_too_many_bad_lines_are_an_error(path: Path) -> None:
    with pytest.raises(ErnieError, match=f"more than 1 lines .* the newest: {path}, line .*raise max_bad_lines"):
        list(stream(path, epochs=1, max_bad_lines=1))


def test_errors_of_the_template_name_the_line_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    roles = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    path.write_text(json.dumps({"messages": roles}), encoding="utf-8")
    with pytest.raises(ErnieError, match=f"{path}, line 1: messages.1.: the chat template leaves its reasoning"):
        list(stream(path, max_bad_lines=0))


def test_data_of_no_use_are_an_error_instead_of_an_endless_search(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"src": "too long " * 50, "tgt": "no"}), encoding="utf-8")
    with pytest.raises(ErnieError, match="nothing in the data files is of use: 0 lines .* 1 sequences are longer"):
        next(stream(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"rank": 2, "ranks": 2}, "rank is 2, expected 0 to 1 for 2 ranks"),
        ({"length": 50}, "rows of 50 tokens cannot hold sequences of up to 96"),
        ({"epochs": -1}, "epochs is -1"),
    ],
)
def test_impossible_settings_are_refused(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        stream(path, **options)


def test_several_files_are_mixed_by_weight(tmp_path: Path) -> None:
    sources = []
    for name, weight in (("a", 4.0), ("b", 1.0)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"src": name, "tgt": name}), encoding="utf-8")
        sources.append(Source(tmp_path / f"{name}.jsonl", weight))
    own = DataStream(sources, Encoder(TOKENIZER, max_length=64), mix="random", samples=500, epochs=1)
    found = documents(list(own))
    assert len(found) == 500 and 0.75 < sum("User: a" in text for text in found) / 500 < 0.85
