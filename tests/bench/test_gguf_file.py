"""GGUF files, read back with the package gguf, and run by llama.cpp where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ernie45.bench.gguf_file import gguf_name, write_gguf
from ernie45.checkpoint.dtypes import convert
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.hub import resolve_folder
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError

gguf = pytest.importorskip("gguf")


def float32(tensor: object) -> np.ndarray:
    """The numbers of a tensor that gguf's reader found."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.11.self_attn.o_proj.weight", "blk.11.attn_output.weight"),
        ("model.layers.3.mlp.gate.weight", "blk.3.ffn_gate_inp.weight"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "blk.3.ffn_up_exps.weight"),
        ("model.layers.3.mlp.moe_statics.e_score_correction_bias", "blk.3.exp_probs_b.bias"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert gguf_name(name) == expected


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_tensor_is_that_of_the_pt_layout(tmp_path: Path, reference: Path, kind: str, layout: str) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(reference / kind / layout, file, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    found = {tensor.name: float32(tensor) for tensor in gguf.GGUFReader(file).tensors}
    expected: dict[str, list[np.ndarray]] = {}
    with CheckpointFolder(reference / kind / "pt") as folder:
        for name in sorted(folder.tensors, key=lambda name: [int(p) if p.isdigit() else 0 for p in name.split(".")]):
            if "mtp" not in name:
                numbers = convert(folder.read(name), folder.tensors[name].dtype, "F32")
                expected.setdefault(gguf_name(name), []).append(numbers)
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        whole = np.stack(parts) if "_exps" in name else parts[0]
        np.testing.assert_allclose(found[name].reshape(whole.shape), whole, rtol=2**-8, err_msg=name)


def test_hyperparameters(tmp_path: Path, reference: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(reference / "moe" / "paddle", file, progress=False)
    config = ErnieConfig.from_pretrained(reference / "moe" / "paddle")
    fields = gguf.GGUFReader(file).fields
    found = {name.removeprefix("ernie4_5-moe."): field.contents() for name, field in fields.items()}
    assert found["general.architecture"] == "ernie4_5-moe"
    assert found["block_count"] == config.num_hidden_layers
    assert found["expert_count"] == config.banks[0].num_experts
    assert found["expert_used_count"] == config.moe_k
    assert found["leading_dense_block_count"] == config.banks[0].first_layer
    assert found["expert_shared_feed_forward_length"] == config.shared_intermediate_size
    assert found["rope.freq_base"] == pytest.approx(config.rope_theta)
    assert found["attention.head_count_kv"] == config.num_key_value_heads


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ErnieError, match="expected a checkpoint folder"):
        write_gguf(tmp_path / "nothing", tmp_path / "model.gguf", progress=False)


@pytest.mark.parity
@pytest.mark.parametrize("flash", [True, False])
def test_llama_cpp_continues_as_we_do(tmp_path: Path, flash: bool) -> None:
    pytest.importorskip("llama_cpp")
    from ernie45 import ErnieTokenizer
    from ernie45.bench.llama import LlamaCpp
    from ernie45.bench.ours import Ernie45

    write_gguf(resolve_folder("ernie45-tiny"), tmp_path / "tiny.gguf", progress=False)
    theirs = LlamaCpp(str(tmp_path / "tiny.gguf"), threads=1, flash=flash)
    ours = Ernie45("ernie45-tiny", threads=1, options={"dtype": "float32"})
    tokenizer = ErnieTokenizer.from_pretrained("ernie45-tiny")
    for question in ("23+58=?", "Reverse t o j w", "把26、15、96从小到大排序"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        answers = [model.continue_greedily([ids], 32)[0] for model in (theirs, ours)]
        ends = [answer.index(tokenizer.eos_token_id) for answer in answers]  # nothing was learned about what follows
        assert answers[0][: ends[0]] == answers[1][: ends[1]]
