"""Damaged checkpoint folders: a model that loads, or one clear error; never another exception, a crash or a hang."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.checkpoint.convert import convert_checkpoint
from ernie45.checkpoint.dtypes import DTYPES
from ernie45.config import ADAPTER_LIMITS, VISION_LIMITS, VISION_TOKENS, ErnieConfig
from ernie45.errors import ErnieError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.pretrained import PretrainedModel
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers.tiny import MOE, Stored, empty_like, read_folder, tiny_model, write_folder
from tests.helpers.vision import vision_config, write_vision_folder

KEYS = {**MOE, "num_nextn_predict_layers": 1}

NUMBERS = st.integers(-2, 200) | st.sampled_from([10**6, 10**9, 10**30, 10**400, -(10**9), 0.5, 1e300])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@pytest.fixture(scope="module", params=["paddle", "pt"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with every kind of tensor."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(ErnieConfig(**KEYS), mtp=True)
    model.save_pretrained(folder, layout=request.param, max_shard_bytes=60_000, progress=False)
    return folder


@pytest.fixture(scope="module", params=["paddle", "pt"])
def vision_language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"vl-{request.param}")
    return write_vision_folder(folder, vision_config(), layout=request.param)


@contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(shutil.copytree(folder, Path(temporary) / "copy"))


def loads(folder: Path, kind: type[PretrainedModel] = ErnieForCausalLM, **options: Any) -> bool:
    """Whether it loads; an ErnieError must say where the problem is."""
    try:
        kind.from_pretrained(folder, progress=False, mtp=True, **options)
    except ErnieError as error:
        assert len(str(error)) > 20
        return False
    return True


def converts(folder: Path) -> bool:
    """Whether it converts; if not, nothing may be left of the attempt."""
    destination = folder.parent / "converted"
    try:
        convert_checkpoint(folder, destination, layout="paddle", progress=False)
    except ErnieError:
        assert not destination.exists()
        return False
    return True


def test_the_undamaged_folder_loads(whole: Path) -> None:
    assert len(list(whole.glob("*.safetensors"))) >= 2
    with copy_of(whole) as folder:
        assert loads(folder) and converts(folder)


@settings(max_examples=80)
@given(
    deleted=st.sets(st.sampled_from(sorted(KEYS)), max_size=2),
    replaced=st.dictionaries(
        st.sampled_from(
            [
                *sorted(KEYS),
                "vision_config",
                "rope_theta",
                "rms_norm_eps",
                "architectures",
                "model_type",
                "eos_token_id",
            ]
            + ["pad_token_id", "dtype", "rope_parameters", "rope_scaling", "moe_layer_end_index", "compression_ratio"]
        ),
        VALUES,
        max_size=3,
    ),
)
def test_damaged_config(whole: Path, deleted: set[str], replaced: dict[str, Any]) -> None:
    with copy_of(whole) as folder:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        damaged = {key: value for key, value in {**config, **replaced}.items() if key not in deleted}
        (folder / "config.json").write_text(json.dumps(damaged), encoding="utf-8")
        loads(folder)
        converts(folder)


@settings(max_examples=20)
@given(vision=st.dictionaries(st.sampled_from([*VISION_LIMITS, "mlp_ratio"]), VALUES, max_size=2))
def test_a_vision_config_with_the_tensors_of_a_text_model(whole: Path, vision: dict[str, Any]) -> None:
    with copy_of(whole) as folder:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "vision_config": vision}))
        assert not loads(folder) and not converts(folder)


BANK_KEYS = ("moe_num_experts", "moe_intermediate_size", "moe_layer_start_index", "moe_layer_end_index")
SECTIONS = VALUES | st.lists(VALUES, min_size=3, max_size=3)


@settings(max_examples=60)
@given(
    vision=st.dictionaries(st.sampled_from([*VISION_LIMITS, "mlp_ratio"]), VALUES, max_size=2),
    top=st.dictionaries(st.sampled_from([*ADAPTER_LIMITS, *VISION_TOKENS, "freq_allocation"]), VALUES, max_size=2),
    banks=st.dictionaries(st.sampled_from(BANK_KEYS), VALUES | st.lists(st.integers(0, 4), max_size=3), max_size=1),
    rope=st.none() | st.fixed_dictionaries({"mrope_section": SECTIONS}),
)
def test_damaged_vision_config(
    vision_language: Path, vision: dict[str, Any], top: dict[str, Any], banks: dict[str, Any], rope: Any
) -> None:
    with copy_of(vision_language) as folder:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        damaged = {**config, **top, **banks, "vision_config": {**config["vision_config"], **vision}}
        (folder / "config.json").write_text(json.dumps({**damaged, "rope_scaling": rope}), encoding="utf-8")
        converted = converts(folder)
        assert converted or not loads(folder, ErnieForConditionalGeneration)
        loads(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "moe_num_experts", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [200, 1000, 10**5, 10**9, 10**30])
def test_absurd_sizes_are_refused_without_a_table_of_that_size(whole: Path, key: str, value: int) -> None:
    with copy_of(whole) as folder:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for change in ({key: value}, {key: value, "num_key_value_heads": value, "num_attention_heads": value}):
            (folder / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
            assert not loads(folder) and not converts(folder)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"])
def test_absurd_widths_are_refused_before_memory_is_taken(whole: Path, key: str) -> None:
    with copy_of(whole) as folder:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for value in (10**9, 10**30):
            (folder / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
            assert not loads(folder) and not converts(folder)


@settings(max_examples=40)
@given(data=st.data())
def test_damaged_bytes(whole: Path, data: st.DataObject) -> None:
    """Cut, lengthened, or with some bytes of the header changed."""
    with copy_of(whole) as folder:
        names = sorted(path.name for path in folder.iterdir() if path.name != "config.json")
        path = folder / data.draw(st.sampled_from(names))
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["cut", "longer", "bytes", "empty"]))
        if kind == "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        elif kind == "longer":
            content += b"\x00" * data.draw(st.integers(1, 100))
        elif kind == "bytes":
            for _ in range(data.draw(st.integers(1, 5))):
                content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
        else:
            content.clear()
        path.write_bytes(content)
        loaded = loads(folder)
        if path.suffix == ".safetensors" and kind != "bytes":
            assert not loaded
        converts(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 10**5,
        b'{"top_k": ' + b"9" * 5000 + b"}",
        b'{"temperature": -1}',
        b'{"top_k": {}}',
    ]
    + [b'{"eos_token_id": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"eos_token_id": "x"}'],
    ids=lambda content: content[:20].decode(errors="replace"),
)
def test_damaged_generation_config(whole: Path, content: bytes) -> None:
    with copy_of(whole) as folder:
        (folder / "generation_config.json").write_bytes(content)
        try:
            ErnieForCausalLM.from_pretrained(folder, progress=False)
        except ErnieError as error:
            assert "generation_config.json" in str(error)
        else:
            assert content.startswith(b'{"eos_token_id": [['), "nested lists of no ids mean no ids"


@settings(max_examples=15)
@given(data=st.data())
def test_missing_files(whole: Path, data: st.DataObject) -> None:
    with copy_of(whole) as folder:
        names = sorted(path.name for path in folder.iterdir())
        for name in data.draw(st.sets(st.sampled_from(names), min_size=1)):
            (folder / name).unlink()
        left = {path.name for path in folder.iterdir()}
        needed = {name for name in names if name.endswith(".safetensors") or name == "config.json"}
        # Without its index a complete set of shards is still one checkpoint.
        assert loads(folder) == needed.issubset(left)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, str, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 30), max_size=3)))
    return draw(st.sampled_from(["remove", "reshape", "dtype", "rename"])), draw(st.sampled_from(sorted(DTYPES))), shape


@settings(max_examples=40)
@given(data=st.data(), several=st.lists(damages(), min_size=1, max_size=3))
def test_damaged_tensors(whole: Path, data: st.DataObject, several: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """Well-formed files with missing, renamed, reshaped or retyped tensors."""
    with copy_of(whole) as folder:
        tensors: Stored = read_folder(folder)
        for kind, dtype, shape in several:
            name = data.draw(st.sampled_from(sorted(tensors)))
            old_dtype, old = tensors.pop(name)
            if kind == "reshape":
                tensors[name] = (dtype, np.zeros(shape, DTYPES[dtype].storage))
            elif kind == "dtype":
                tensors[name] = (dtype, np.zeros(old.shape, DTYPES[dtype].storage))
            elif kind == "rename":
                tensors[name + "x"] = (old_dtype, old)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_folder(folder, config, tensors, max_shard_bytes=60_000)
        loads(folder, dtype="bfloat16")
        converts(folder)


def test_the_undamaged_vision_language_folder_loads(vision_language: Path) -> None:
    with copy_of(vision_language) as folder:
        assert loads(folder) and loads(folder, ErnieForConditionalGeneration) and converts(folder)


@settings(max_examples=40)
@given(
    data=st.data(),
    changes=st.lists(st.sampled_from(["remove", "reshape", "store twice", "rename"]), min_size=1, max_size=3),
)
def test_damaged_vision_tensors(vision_language: Path, data: st.DataObject, changes: list[str]) -> None:
    """The text part loads from what the whole model refuses. Only another prefix does no harm."""
    with copy_of(vision_language) as folder:
        tensors: Stored = read_folder(folder)
        visual = sorted(name for name in tensors if "vision_model." in name or "resampler_model." in name)
        for change in changes:
            name = visual.pop(data.draw(st.integers(0, len(visual) - 1)))
            stored = tensors.pop(name)
            stem = name.removeprefix("ernie.").removeprefix("model.")
            if change == "rename":
                tensors[data.draw(st.sampled_from(["", "ernie.", "model."])) + stem] = stored
            elif change == "reshape":
                tensors[name] = empty_like("F32", 3)
            elif change == "store twice":
                tensors["ernie." + stem], tensors["model." + stem] = stored, stored
        write_folder(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")), tensors)
        whole_loads = loads(folder, ErnieForConditionalGeneration)
        assert loads(folder) and whole_loads == converts(folder) == (set(changes) == {"rename"})
