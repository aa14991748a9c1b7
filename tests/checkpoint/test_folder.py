"""Checkpoint folders: which files make one up, and all that is wrong with them in one error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ernie45.checkpoint.folder import INDEX_NAME, CheckpointFolder
from ernie45.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHT_MAP = {"a": FIRST, "b": FIRST, "c": SECOND}


def save(folder: Path, name: str, *tensors: str, metadata: dict[str, str] | None = None) -> None:
    arrays = {tensor: np.full((2, 3), ord(tensor[0]), np.float32) for tensor in tensors}
    save_file(arrays, folder / name, metadata=metadata)


def save_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path, FIRST, "a", "b", metadata={"format": "np", "from": "first"})
    save(tmp_path, SECOND, "c", metadata={"format": "np", "from": "second", "more": "x"})
    save_index(tmp_path, WEIGHT_MAP)
    return tmp_path


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointFolder(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_single_file(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a", "b", metadata={"format": "np"})
    with CheckpointFolder(tmp_path) as folder:
        assert set(folder.tensors) == {"a", "b"} and folder.total_bytes == 48
        assert folder.metadata == {"format": "np"}
        assert folder.files == [tmp_path / "model.safetensors"]
        assert folder.read("b").tolist() == [[98.0] * 3] * 2
        folder.release("b")
        assert folder.read("b")[0, 0] == 98.0


def test_shards_with_an_index(sharded: Path) -> None:
    with CheckpointFolder(sharded) as folder:
        assert set(folder.tensors) == {"a", "b", "c"} and folder.total_bytes == 72
        assert folder.tensors["c"].file.name == SECOND
        assert [folder.read(name)[0, 0] for name in "abc"] == [97.0, 98.0, 99.0]
        assert folder.metadata == {"format": "np", "from": "first", "more": "x"}


def test_single_file_wins_over_an_index(sharded: Path) -> None:
    save(sharded, "model.safetensors", "z")
    assert set(CheckpointFolder(sharded).tensors) == {"z"}


def test_shards_in_a_sub_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    save(tmp_path / "shards", "x.safetensors", "a")
    save_index(tmp_path, {"a": "shards/x.safetensors"})
    assert set(CheckpointFolder(tmp_path).tensors) == {"a"}


def test_complete_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    assert set(CheckpointFolder(sharded).tensors) == {"a", "b", "c"}
    (sharded / FIRST).unlink()
    assert f"{FIRST}: missing" in error_of(sharded)


def test_one_file_of_another_name(tmp_path: Path) -> None:
    save(tmp_path, "weights.safetensors", "a")
    assert set(CheckpointFolder(tmp_path).tensors) == {"a"}
    save(tmp_path, "other.safetensors", "b")
    assert "not clear which of these make up the checkpoint: other.safetensors, weights.safetensors" in error_of(
        tmp_path
    )


def test_two_sets_of_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    save(sharded, "model-00001-of-00003.safetensors", "a")
    assert "not clear" in error_of(sharded)


def test_every_problem_is_in_one_error(tmp_path: Path) -> None:
    names = [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    for name, tensors in zip(names[:4], (["a"], ["b"], ["c"], ["d", "a"]), strict=True):
        save(tmp_path, name, *tensors)
    os.truncate(tmp_path / names[1], (tmp_path / names[1]).stat().st_size - 5)
    save_index(tmp_path, dict(zip(["a", "b", "x", "d", "e", "f"], [*names, "../out.safetensors"], strict=True)))
    message = error_of(tmp_path)
    assert "5 problems" in message and len(message.splitlines()) == 6
    assert "refuses '../out.safetensors'" in message
    assert f"- {names[1]}: truncated" in message and "(5 are missing)" in message
    assert f"{names[2]}: lacks 1 of the 1 tensors that {INDEX_NAME} places in it: 'x'" in message
    assert f"{names[4]}: missing (the index places 1 tensors in it)" in message
    assert f"tensor 'a' is in two files, {names[0]} and {names[3]}" in message


def test_many_problems_are_cut_short(tmp_path: Path) -> None:
    save_index(tmp_path, {str(number): f"{number}.safetensors" for number in range(100)})
    message = error_of(tmp_path)
    assert "100 problems" in message and "and 70 more problems" in message and len(message.splitlines()) == 32


@pytest.mark.parametrize(
    "shard",
    ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "C:\\x.safetensors"]
    + ["x\0.safetensors", "x\n.safetensors", "", "x.bin", "y" * 300 + ".safetensors", "\ud800.safetensors", 3, None],
)
def test_shard_paths_that_leave_the_folder_are_refused(tmp_path: Path, shard: object) -> None:
    save_index(tmp_path, {"a": shard})
    assert "refuses" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "'weight_map'"),
        ("{}", "'weight_map'"),
        ('{"weight_map": []}', "'weight_map'"),
        ('{"weight_map": {}}', "'weight_map'"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key 'a' occurs twice"),
    ],
)
def test_broken_index(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    message = error_of(tmp_path)
    assert INDEX_NAME in message and words in message


def test_index_that_is_a_folder_or_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).mkdir()
    assert "cannot be read" in error_of(tmp_path)
    (tmp_path / INDEX_NAME).rmdir()
    (tmp_path / INDEX_NAME).symlink_to("nowhere")
    assert "cannot be read" in error_of(tmp_path)


def test_dangling_link_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../blobs/0123")
    assert "is a link to ../blobs/0123, which does not exist" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["model_state.pdparams", "pytorch_model.bin", "consolidated.pth"])
def test_pickled_checkpoints_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    message = error_of(tmp_path)
    assert name in message and "never opens them" in message


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "absent")
    assert "found nothing" in error_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "found config.json" in error_of(tmp_path)
    assert "is a file" in error_of(tmp_path / "config.json")


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    assert "cannot be listed: Permission denied" in error_of(tmp_path)


def test_unknown_tensor_names_the_closest(sharded: Path) -> None:
    save(sharded, "model.safetensors", "layers.0.weight")
    with pytest.raises(CheckpointError, match="no tensor 'layers.0.wieght' .* layers.0.weight"):
        CheckpointFolder(sharded).read("layers.0.wieght")


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["metadata", "weight_map"]),
        st.recursive(
            st.none() | st.integers() | st.text() | st.sampled_from([FIRST, SECOND, ".", "..", "./x.safetensors"]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
            max_leaves=8,
        ),
    )
)
def test_any_index_is_read_or_is_a_checkpoint_error(sharded: Path, index: dict) -> None:
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    try:
        folder = CheckpointFolder(sharded)
    except CheckpointError as error:
        assert INDEX_NAME in str(error) or "missing" in str(error)
    else:
        assert folder.tensors.keys() >= index["weight_map"].keys()
