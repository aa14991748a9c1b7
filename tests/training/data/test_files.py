"""Lines of several files in a mixed order, without holding a file in memory."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.errors import ErnieError
from ernie45.training.data import DataFiles, Source, Text


def write(path: Path, count: int, prefix: str = "") -> Path:
    path.write_text("".join(json.dumps({"text": f"{prefix}{i}"}) + "\n" for i in range(count)), encoding="utf-8")
    return path


def texts(files: DataFiles, epoch: int = 0) -> list[str]:
    records = [files.read(epoch, place) for place in range(len(files.order(epoch)))]
    return [record.text for record in records if isinstance(record, Text)]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a.jsonl", 6, "a"), write(tmp_path / "b.jsonl", 12, "b")


def test_concat_takes_every_line_once_in_order_or_shuffled(two: tuple[Path, Path]) -> None:
    ordered = [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(12)]
    assert texts(DataFiles(two, shuffle=False)) == ordered
    files = DataFiles(two, seed=3)
    first, second = texts(files), texts(files, epoch=1)
    assert sorted(first) == sorted(second) == sorted(ordered) and ordered != first != second
    assert texts(DataFiles(two, seed=3)) == first != texts(DataFiles(two, seed=4))


def test_random_draws_by_weight_and_repeats_what_is_small(two: tuple[Path, Path]) -> None:
    sources = [Source(two[0], 3.0), Source(two[1], 1.0)]
    drawn = texts(DataFiles(sources, mix="random", samples=4000))
    counts = Counter(text[0] for text in drawn)
    assert len(drawn) == 4000 and abs(counts["a"] / 4000 - 0.75) < 0.03
    each = Counter(drawn)
    assert max(each[f"a{i}"] for i in range(6)) - min(each[f"a{i}"] for i in range(6)) <= 1
    assert len(texts(DataFiles(sources, mix="random"))) == 18


@pytest.mark.parametrize(("mix", "counts"), [("interleave_under", (6, 6)), ("interleave_over", (12, 12))])
def test_interleaving_ends_with_the_first_or_the_last_file(two: tuple[Path, Path], mix: Any, counts: Any) -> None:
    drawn = texts(DataFiles(two, mix=mix, shuffle=False))
    found = Counter(text[0] for text in drawn)
    assert (found["a"], found["b"]) == counts
    assert [text[0] for text in drawn] == ["a", "b"] * counts[0]
    assert drawn[:4] == ["a0", "b0", "a1", "b1"]


def test_interleaving_spaces_files_by_weight(two: tuple[Path, Path]) -> None:
    drawn = texts(DataFiles([Source(two[0], 1), Source(two[1], 2)], mix="interleave_under", shuffle=False))
    assert Counter(text[0] for text in drawn) == {"a": 6, "b": 12}
    assert all(sum(text[0] == "a" for text in drawn[i : i + 3]) == 1 for i in range(0, 18, 3))


def test_a_text_file_has_a_text_in_each_line_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("one\r\n\n  \n两\nthree".encode())
    files = DataFiles([path], shuffle=False)
    assert texts(files) == ["one", "两", "three"]
    assert files.where(0, 1) == f"{path}, line 4"


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": 3}\n', encoding="utf-8")
    files = DataFiles([path], shuffle=False)
    with pytest.raises(ErnieError, match=f"^{path}, line 3: text is "), files.naming(0, 1):
        files.read(0, 1)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    fields = {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**fields, "images": ["b.png"]}), encoding="utf-8")
    record: Any = DataFiles([path]).read(0, 0)
    assert record.messages[0]["content"][0]["image_url"]["url"] == str(tmp_path / "b.png")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path, line = tmp_path / "large.jsonl", json.dumps({"text": "x" * 20000}) + "\n"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(1000):
            file.write(line)
    tracemalloc.start()
    files = DataFiles([path], seed=1)
    assert all(len(text) == 20000 for text in (files.read(0, place).text for place in range(0, 1000, 10)))  # type: ignore[union-attr]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000 and peak < 1_000_000


def test_the_fingerprint_tells_other_data_and_settings_not_other_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", 5)
    prints = [DataFiles([tmp_path / name / "a.jsonl"]).fingerprint() for name in ("one", "two")]
    assert prints[0] == prints[1] == json.loads(json.dumps(prints[0]))
    write(tmp_path / "two" / "a.jsonl", 6)
    assert DataFiles([tmp_path / "two" / "a.jsonl"]).fingerprint() != prints[0]
    assert DataFiles([tmp_path / "one" / "a.jsonl"], seed=1).fingerprint() != prints[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": "shuffled"}, "mix is 'shuffled', expected one of concat, random"),
        ({"weights": (1, 2)}, 'which mix="concat" has no use for'),
        ({"weights": (1, 0), "mix": "random"}, r"the weights of the data files are \[1, 0\]"),
        ({"samples": 3}, 'samples is 3: expected a positive number, and mix="random"'),
    ],
)
def test_impossible_settings_are_refused(two: tuple[Path, Path], settings: dict[str, Any], message: str) -> None:
    weights = settings.pop("weights", (1, 1))
    with pytest.raises(ErnieError, match=message):
        DataFiles([Source(path, weight) for path, weight in zip(two, weights, strict=True)], **settings)


def test_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ErnieError, match="no data files"):
        DataFiles([])
    with pytest.raises(ErnieError, match="missing.jsonl: cannot be read"):
        DataFiles([tmp_path / "missing.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ErnieError, match="empty.jsonl: no lines"):
        DataFiles([tmp_path / "empty.jsonl"])


def test_orders_are_numbers_of_lines(two: tuple[Path, Path]) -> None:
    order = DataFiles(two).order(0)
    assert order.dtype == np.int64 and sorted(order) == list(range(18))
