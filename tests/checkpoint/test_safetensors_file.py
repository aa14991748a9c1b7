"""Reading single files: what the safetensors package writes is read, and whatever is wrong is one clear error."""

from __future__ import annotations

import copy
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ernie45.checkpoint.safetensors_file import SafetensorsFile
from ernie45.checkpoint.safetensors_header import MAX_HEADER_BYTES
from ernie45.errors import CheckpointError

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "np"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "I64", "shape": [0, 5], "data_offsets": [32, 32]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}
DATA = np.arange(6, dtype="<f4").tobytes() + np.arange(4, dtype="<u2").tobytes() + b"\x07"


def encode(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(path) as file:
        return {name: file.read(name).copy() for name in file.tensors}


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def changed(name: str, **fields: Any) -> dict[str, Any]:
    header = copy.deepcopy(HEADER)
    header[name] |= fields
    return header


def test_reads_every_tensor(tmp_path: Path) -> None:
    with SafetensorsFile(write(tmp_path, encode(HEADER))) as file:
        assert file.metadata == {"format": "np"}
        assert list(file.tensors) == ["a", "b", "empty", "c"]
        assert file.tensors["a"].shape == (2, 3) and file.tensors["a"].byte_count == 24
        np.testing.assert_array_equal(file.read("a"), np.arange(6, dtype=np.float32).reshape(2, 3))
        assert file.read("b").dtype == np.uint16 and file.read("b").tolist() == [0, 1, 2, 3]
        assert file.read("empty").shape == (0, 5) and file.read("empty").dtype == np.int64
        assert file.read("c").shape == () and file.read("c") == 7
        assert not any(file.read(name).flags.writeable for name in file.tensors)


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dtypes = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    tensors = {f"t.{dtype}": generator.integers(0, 2, (3, 5)).astype(dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    read = read_all(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parity
def test_reads_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    tensor = torch.randn(4, 6).to(torch.bfloat16)
    eighth = torch.randn(4).to(torch.float8_e4m3fn)
    safetensors_torch.save_file({"w": tensor, "q": eighth}, tmp_path / "model.safetensors")
    read = read_all(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(read["w"].view(np.int16), tensor.view(torch.int16).numpy())
    np.testing.assert_array_equal(read["q"], eighth.view(torch.uint8).numpy())


def test_views_share_the_mapping_and_outlive_close(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path, encode(HEADER)))
    first, second = file.read("b"), file.read("b")
    assert np.shares_memory(first, second)
    file.close()
    assert first.tolist() == [0, 1, 2, 3]
    assert file.read("c") == 7, "reading after close maps the file again"


def test_unaligned_tensor_is_an_aligned_copy(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    array = SafetensorsFile(write(tmp_path, encode(text, b"\x01" + np.float32([1, 2]).tobytes()))).read("b")
    assert array.flags.aligned and not array.flags.writeable
    assert array.tolist() == [1, 2]


def resident_bytes_of_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_release_drops_resident_pages_and_keeps_the_view_valid(tmp_path: Path) -> None:
    size = 1 << 25
    save_file({"a": np.full(size, 1, np.uint8), "b": np.full(size, 2, np.uint8)}, tmp_path / "model.safetensors")
    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        view = file.read("a")
        assert view.max() == 1
        before = resident_bytes_of_files()
        file.release("a")
        assert before - resident_bytes_of_files() > 0.9 * size
        assert view.min() == 1
        assert file.read("b").min() == 2
        del view


def test_release_without_madvise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    with SafetensorsFile(write(tmp_path, encode(HEADER))) as file:
        assert file.read("c") == 7
        file.release("c")
        assert file.read("c") == 7


def test_release_of_tiny_or_unread_tensors_is_harmless(tmp_path: Path) -> None:
    with SafetensorsFile(write(tmp_path, encode(HEADER))) as file:
        file.release("a")
        kept = file.read("a")
        for name in file.tensors:
            file.release(name)
        assert kept[1, 2] == 5


@pytest.mark.parametrize("when", ["before the first read", "after the first read"])
def test_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path, when: str) -> None:
    path = write(tmp_path, encode(HEADER, DATA))
    file = SafetensorsFile(path)
    if when == "after the first read":
        file.read("a")
    os.truncate(path, 20)
    with pytest.raises(CheckpointError, match="changed while in use"):
        file.read("b")


def test_unknown_tensor(tmp_path: Path) -> None:
    with (
        SafetensorsFile(write(tmp_path, encode(HEADER))) as file,
        pytest.raises(CheckpointError, match="no tensor 'nothing' among the 4"),
    ):
        file.read("nothing")


def test_missing_folder_link_and_pipe(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "model.safetensors")
    assert "is a folder" in error_of(tmp_path)
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "blob")
    assert "is a link to" in error_of(link) and "does not exist" in error_of(link)
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in error_of(tmp_path / "pipe")
    assert "cannot be opened" in error_of(tmp_path / ("x" * 300))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, encode(HEADER))

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod would not stop a test that runs as root
    assert "permission denied" in error_of(path)


def test_empty_short_and_foreign_files(tmp_path: Path) -> None:
    assert "is empty" in error_of(write(tmp_path, b""))
    assert "too few" in error_of(write(tmp_path, b"abc"))
    assert "announces a header of 1000 bytes" in error_of(write(tmp_path, struct.pack("<Q", 1000) + b"{}"))
    assert f"limit is {MAX_HEADER_BYTES}" in error_of(write(tmp_path, b"<!DOCTYPE html><html></html>"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    assert "git lfs pull" in error_of(write(tmp_path, pointer))


def test_truncated_and_too_long(tmp_path: Path) -> None:
    whole = encode(HEADER)
    message = error_of(write(tmp_path, whole[:-3]))
    assert "truncated" in message and "(3 are missing)" in message and "download it again" in message
    assert "(2 too many)" in error_of(write(tmp_path, whole + b"xx"))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[]", "begins with b'[]'"),
        (b"{", "damaged header"),
        (b'{"a": \xff}', "damaged header"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8"}}', "the key 'dtype' occurs twice"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": NaN}', "damaged header"),
        (b'{"a": ' + b"9" * 5000 + b"}", "damaged header"),
        ({"a": 3}, "tensor 'a': expected an object"),
        ({"a": {}}, "no dtype and no shape and no data_offsets"),
        ({"\ud800": {}}, "not valid Unicode"),
        ({"__metadata__": [1]}, "'__metadata__' must map text to text"),
        ({"__metadata__": {"a": 1}}, "'__metadata__' must map text to text"),
        (changed("a", dtype="F4"), "tensor 'a': unknown dtype 'F4'"),
        (changed("a", dtype=["F32"]), "unknown dtype"),
        (changed("a", shape=[2, -3]), "non-negative integers"),
        (changed("a", shape=[2, 3.0]), "non-negative integers"),
        (changed("a", shape=[True, 6]), "non-negative integers"),
        (changed("a", shape=6), "non-negative integers"),
        (changed("a", shape=[1] * 40 + [6]), "at most 32"),
        (changed("empty", shape=[0, 2**62, 2**62]), "larger than any memory"),
        (changed("a", shape=[2, 4]), "takes 32 bytes, but data_offsets [0, 24] span 24"),
        (changed("a", dtype="F64"), "takes 48 bytes"),
        (changed("a", data_offsets=[24, 0]), "two ascending"),
        (changed("a", data_offsets=[0, 24, 24]), "two ascending"),
        (changed("a", data_offsets=[-24, 0]), "two ascending"),
        (changed("b", data_offsets=[20, 28]), "tensor 'b' overlaps the tensor before it: it begins at byte 20"),
        (changed("b", data_offsets=[25, 33]), "tensor 'b' leaves a gap before it: it begins at byte 25"),
        (changed("a", data_offsets=[1, 25]), "tensor 'a' leaves a gap before it: it begins at byte 1"),
    ],
)
def test_damaged_header(tmp_path: Path, header: Any, words: str) -> None:
    message = error_of(write(tmp_path, encode(header)))
    assert words in message
    assert len(message) < 1000


def mutate_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    position = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(["flip", "insert", "delete", "truncate", "length"])):
        case "flip":
            position %= len(content)
            flipped = content[position] ^ draw(st.integers(1, 255))
            return content[:position] + bytes([flipped]) + content[position + 1 :]
        case "insert":
            return content[:position] + draw(st.binary(min_size=1, max_size=9)) + content[position:]
        case "delete":
            return content[:position] + content[position + draw(st.integers(1, 16)) :]
        case "truncate":
            return content[:position]
        case _:
            return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + content[8:]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["F32", "BF16", "", "é"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def mutate_header(draw: st.DrawFn) -> bytes:
    header = copy.deepcopy(HEADER)
    target = header[draw(st.sampled_from(sorted(header)))] if draw(st.booleans()) else header
    key = draw(st.sampled_from([*target, "new"]))
    if draw(st.integers(0, 4)) == 0:
        target.pop(key, None)
    elif key in ("shape", "data_offsets") and draw(st.booleans()):
        target[key] = draw(st.lists(st.integers(-1, 40), max_size=3))
    else:
        target[key] = draw(JSON_VALUES)
    return encode(header)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    content = mutate_header(draw) if draw(st.booleans()) else encode(HEADER)
    for _ in range(draw(st.integers(0, 2))):
        content = mutate_bytes(draw, content) if content else content
    return content


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutated_files())
def test_any_mutation_is_read_or_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    try:
        tensors = read_all(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assume(b"-0" not in content)  # to Python's JSON reader the same as 0, to the package not an integer
        theirs = dict(safetensors.deserialize(content))
        assert theirs.keys() == tensors.keys(), "what we accept, the format's own reader accepts too"
        for name, tensor in tensors.items():
            assert tensor.tobytes() == theirs[name]["data"] and list(tensor.shape) == theirs[name]["shape"]
