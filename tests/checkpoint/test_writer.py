"""Writing checkpoints: readable by others, reproducible, one tensor in memory at a time, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ernie45.checkpoint import writer
from ernie45.checkpoint.dtypes import DTYPES
from ernie45.checkpoint.folder import INDEX_NAME, CheckpointFolder
from ernie45.checkpoint.writer import TensorPlan, write_checkpoint, write_json_atomic, write_text_atomic
from ernie45.errors import CheckpointError


def plan(name: str, array: np.ndarray, dtype: str = "F32") -> TensorPlan:
    return TensorPlan(name, dtype, array.shape, lambda: array)


def plans_of(count: int, value: float = 0.0) -> list[TensorPlan]:
    return [plan(f"t{number}", np.full((2, 5), value + number, np.float32)) for number in range(count)]


def write(folder: Path, plans: list[TensorPlan], **options: Any) -> list[Path]:
    return write_checkpoint(folder, plans, **({"metadata": {"format": "np"}, "progress": False} | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def first_values(folder: Path) -> list[float]:
    with CheckpointFolder(folder) as checkpoint:
        return [float(checkpoint.read(name).flat[0]) for name in sorted(checkpoint.tensors)]


def test_single_file_is_readable_by_the_safetensors_package(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {name: generator.integers(0, 2, (3, 5)).astype(info.storage) for name, info in DTYPES.items()}
    arrays |= {"scalar": np.array(3.0, np.float32), "empty": np.empty((0, 4), np.float32)}
    plans = [plan(name, array, name if name in DTYPES else "F32") for name, array in arrays.items()]
    assert write(tmp_path / "new" / "folder", plans) == [tmp_path / "new" / "folder" / "model.safetensors"]
    loaded = dict(safetensors.deserialize((tmp_path / "new" / "folder" / "model.safetensors").read_bytes()))
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name]["data"] == array.tobytes() and tuple(loaded[name]["shape"]) == array.shape
        assert loaded[name]["dtype"] == (name if name in DTYPES else "F32")
    with CheckpointFolder(tmp_path / "new" / "folder") as checkpoint:
        assert all(entry.start % DTYPES[entry.dtype].item_size == 0 for entry in checkpoint.tensors.values())
        assert all(checkpoint.read(name).tobytes() == array.tobytes() for name, array in arrays.items())
        assert all(checkpoint.tensors[p.name].dtype == p.dtype for p in plans)
        assert checkpoint.metadata == {"format": "np"}


def test_shards_and_index(tmp_path: Path) -> None:
    plans = [*plans_of(5), plan("large", np.ones((10, 10), np.float32)), plan("last", np.ones(2, np.float32))]
    files = write(tmp_path, plans, max_shard_bytes=100)
    names = [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    assert [path.name for path in files] == [*names, INDEX_NAME]
    assert sorted(contents(tmp_path)) == sorted([*names, INDEX_NAME])
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": 5 * 40 + 400 + 8}
    tensors_of = [["t0", "t1"], ["t2", "t3"], ["t4"], ["large"], ["last"]]
    assert index["weight_map"] == {t: name for name, ts in zip(names, tensors_of, strict=True) for t in ts}
    for name, tensors in zip(names, tensors_of, strict=True):
        assert list(load_file(tmp_path / name)) == tensors
    assert CheckpointFolder(tmp_path).total_bytes == 608


def test_all_that_fits_is_one_file(tmp_path: Path) -> None:
    assert [path.name for path in write(tmp_path, plans_of(5), max_shard_bytes=200)] == ["model.safetensors"]


@pytest.mark.parametrize("max_shard_bytes", [100, 10_000])
def test_same_input_same_bytes(tmp_path: Path, max_shard_bytes: int) -> None:
    for folder, metadata in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        write(tmp_path / folder, plans_of(5), metadata=metadata, max_shard_bytes=max_shard_bytes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=8
    ),
    st.integers(1, 200),
)
def test_whatever_is_written_is_read_back(tmp_path: Path, shapes: list[tuple[str, list[int]]], limit: int) -> None:
    arrays = {}
    for number, (dtype, shape) in enumerate(shapes):
        storage = DTYPES[dtype].storage
        arrays[f"é.{number}"] = (dtype, (np.arange(np.prod(shape, dtype=int)) % 2).astype(storage).reshape(shape))
    write(tmp_path, [plan(name, array, dtype) for name, (dtype, array) in arrays.items()], max_shard_bytes=limit)
    with CheckpointFolder(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == arrays.keys()
        for name, (dtype, array) in arrays.items():
            assert checkpoint.tensors[name].dtype == dtype
            np.testing.assert_array_equal(checkpoint.read(name), array)


def test_one_tensor_alive_at_a_time(tmp_path: Path) -> None:
    produced: list[weakref.ref[np.ndarray]] = []
    most = 0

    def produce() -> np.ndarray:
        nonlocal most
        array = np.zeros(4, np.float32)
        produced.append(weakref.ref(array))
        most = max(most, sum(reference() is not None for reference in produced))
        return array

    write(tmp_path, [TensorPlan(f"t{number}", "F32", (4,), produce) for number in range(6)], max_shard_bytes=40)
    assert len(produced) == 6 and most == 1


def test_tensors_are_produced_in_the_order_of_their_plans_and_lie_wide_ones_first(tmp_path: Path) -> None:
    order: list[str] = []

    def produce(name: str, dtype: str) -> np.ndarray:
        order.append(name)
        return np.full(3, len(order), DTYPES[dtype].storage)

    dtypes = {"a": "I8", "b": "F32", "c": "I8", "d": "BF16", "e": "F32"}
    write(tmp_path, [TensorPlan(name, dtype, (3,), partial(produce, name, dtype)) for name, dtype in dtypes.items()])
    assert order == list("abcde")
    with CheckpointFolder(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == list("bedac")
        assert [int(checkpoint.read(name)[0]) for name in "abcde"] == [1, 2, 3, 4, 5]


def test_produced_transposed_arrays_are_written_in_order(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write(tmp_path, [plan("t", array)])
    np.testing.assert_array_equal(CheckpointFolder(tmp_path).read("t"), array)


@pytest.mark.parametrize(
    ("before", "after"), [(10_000, 10_000), (10_000, 100), (100, 10_000), (100, 100), (100, 50), (50, 100)]
)
def test_replaces_what_was_there(tmp_path: Path, before: int, after: int) -> None:
    write(tmp_path, plans_of(5), max_shard_bytes=before)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-vision.safetensors").write_text("not ours")
    files = write(tmp_path, plans_of(5, value=10), max_shard_bytes=after)
    assert first_values(tmp_path) == [10, 11, 12, 13, 14]
    assert sorted(contents(tmp_path)) == sorted(
        ["config.json", "model-vision.safetensors", *(path.name for path in files)]
    )


@pytest.mark.parametrize("max_shard_bytes", [10_000, 100])
def test_may_read_from_the_folder_it_replaces(tmp_path: Path, max_shard_bytes: int) -> None:
    write(tmp_path, plans_of(5), max_shard_bytes=100)
    with CheckpointFolder(tmp_path) as old:

        def produce(name: str) -> Callable[[], np.ndarray]:
            return lambda: old.read(name) + 1

        plans = [TensorPlan(name, "F32", entry.shape, produce(name)) for name, entry in old.tensors.items()]
        write(tmp_path, plans, max_shard_bytes=max_shard_bytes)
        assert old.read("t0").flat[0] == 0, "the old mapping outlives its files"
    assert first_values(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("max_shard_bytes", [10_000, 100])
def test_failure_while_producing_changes_nothing(tmp_path: Path, error: BaseException, max_shard_bytes: int) -> None:
    def fail() -> np.ndarray:
        raise error

    plans = [*plans_of(4, value=10), TensorPlan("bad", "F32", (1,), fail)]
    with pytest.raises(type(error)):
        write(tmp_path / "absent", plans, max_shard_bytes=max_shard_bytes)
    assert not (tmp_path / "absent").exists()
    write(tmp_path / "old", plans_of(5), max_shard_bytes=100)
    before = contents(tmp_path / "old")
    with pytest.raises(type(error)):
        write(tmp_path / "old", plans, max_shard_bytes=max_shard_bytes)
    assert contents(tmp_path / "old") == before


def killed_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process "die" before the given change of the folder: nothing cleans up after it."""
    remaining = calls

    def dying(original: Callable[..., None]) -> Callable[..., None]:
        def change(*arguments: Any, **options: Any) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                raise SystemExit
            original(*arguments, **options)

        return change

    for owner, name in ((os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("before", [10_000, 100, 50])
@pytest.mark.parametrize("after", [10_000, 100, 50])
def test_killed_while_swapping_never_mixes_two_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    outcomes = []
    for calls in range(20):
        folder = tmp_path / str(calls)
        write(folder, plans_of(5), max_shard_bytes=before)
        with monkeypatch.context() as patch:
            killed_after(calls, patch)
            try:
                write(folder, plans_of(5, value=10), max_shard_bytes=after)
                finished = True
            except SystemExit:
                finished = False
        try:
            values = first_values(folder)
        except CheckpointError as error:
            assert "a write to this folder was interrupted" in str(error)
        else:
            assert values in ([0, 1, 2, 3, 4], [10, 11, 12, 13, 14])
            outcomes.append(values[0])
        write(folder, plans_of(5, value=20), max_shard_bytes=after)
        assert first_values(folder) == [20, 21, 22, 23, 24], "writing again repairs the folder"
        assert not [name for name in contents(folder) if name.endswith(".partial")]
        if finished:
            break
    assert finished and outcomes[0] == 0 and outcomes[-1] == 10 and outcomes == sorted(outcomes)


def test_leftovers_of_a_killed_write_are_ignored_and_removed(tmp_path: Path) -> None:
    write(tmp_path, plans_of(2))
    (tmp_path / "model-00001-of-00009.safetensors.partial").write_bytes(b"half")
    assert first_values(tmp_path) == [0, 1]
    write(tmp_path, plans_of(2))
    assert list(contents(tmp_path)) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 5), np.float64), r"float64 \[2, 5\]"),
        (np.zeros((5, 2), np.float32), r"float32 \[5, 2\]"),
        (np.zeros(10, np.float32), r"float32 \[10\]"),
        ([0.0], "list"),
    ],
)
def test_array_unlike_its_plan(tmp_path: Path, array: Any, found: str) -> None:
    bad = TensorPlan("w", "F32", (2, 5), lambda: array)
    with pytest.raises(CheckpointError, match=f"tensor 'w': expected .* float32 .2, 5. for F32, found {found}"):
        write(tmp_path, [bad])
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("plans", "options", "words"),
    [
        ([], {}, "nothing to write"),
        (plans_of(1) * 2, {}, "tensor 't0': the name is taken"),
        ([plan("__metadata__", np.zeros(1, np.float32))], {}, "the name is taken"),
        ([plan("t", np.zeros(1, np.float32), "float32")], {}, "unknown dtype 'float32'"),
        ([TensorPlan("t", "F32", (-1,), lambda: np.zeros(1))], {}, "negative size"),
        (plans_of(1), {"max_shard_bytes": 0}, "max_shard_bytes must be positive"),
        (plans_of(1), {"metadata": {"format": 1}}, "metadata must map text to text"),
    ],
)
def test_bad_plans(tmp_path: Path, plans: list[TensorPlan], options: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path / "new", plans, **options)
    assert not (tmp_path / "new").exists()


def test_space_is_checked_before_anything_is_produced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    huge = TensorPlan("t", "F32", (10**9,), lambda: pytest.fail("produced"))
    with pytest.raises(CheckpointError, match=r"takes 4\.00 GB .*, 1\.00 GB are free"):
        write(tmp_path, [huge])


def test_destination_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be written: File exists"):
        write(tmp_path / "file", plans_of(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.partial: cannot be written: No space left"):
        write(tmp_path, plans_of(1))
    assert list(contents(tmp_path)) == ["file"]


def test_progress_counts_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(writer, "_WRITE_STEP_BYTES", 1000)
    monkeypatch.setattr(writer, "_BAR_DELAY_SECONDS", 0.0)
    write(tmp_path, [plan("t", np.zeros(1000, np.float32))], progress=True)
    shown = capsys.readouterr().err
    assert "writing: 100%" in shown and "4.00k/4.00k" in shown and "B/s" in shown


def test_text_and_json_are_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_json_atomic(path, {"b": "é", "a": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'
    write_text_atomic(path, "line\n")
    assert contents(tmp_path) == {"config.json": b"line\n"}
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        write_text_atomic(tmp_path / "absent" / "x", "text")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        write_text_atomic(path, "new")
    assert contents(tmp_path) == {"config.json": b"line\n"}
