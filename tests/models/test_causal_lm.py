"""The model as a Paddle layer: published names, views, initial weights, loss, multi-token prediction, saving."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.config import ErnieConfig
from ernie45.errors import CheckpointError, ErnieError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops import custom
from tests.helpers.tiny import DENSE, MOE, difference, read_folder, same_bits, tiny_config, tiny_model, token_ids

MTP = {**MOE, "num_nextn_predict_layers": 2}


def run(model: ErnieForCausalLM, ids: paddle.Tensor) -> paddle.Tensor:
    with paddle.no_grad():
        return model(ids)


# Published names. The lists are written out by hand from the description of the files, without the library's table.


def expected_tensors(keys: dict[str, Any]) -> dict[str, list[int]]:
    hidden, heads, groups = keys["hidden_size"], keys["num_attention_heads"], keys["num_key_value_heads"]
    dim, width = keys.get("head_dim", hidden // heads), keys["intermediate_size"]
    tensors = {"ernie.embed_tokens.weight": [keys["vocab_size"], hidden], "ernie.norm.weight": [hidden]}
    if not keys["tie_word_embeddings"]:
        tensors["lm_head.weight"] = [hidden, keys["vocab_size"]]

    def mlp(prefix: str, inner: int) -> None:
        tensors[f"{prefix}.up_gate_proj.weight"] = [hidden, 2 * inner]
        tensors[f"{prefix}.down_proj.weight"] = [inner, hidden]

    def attention(prefix: str) -> None:
        tensors[f"{prefix}.input_layernorm.weight"] = [hidden]
        tensors[f"{prefix}.post_attention_layernorm.weight"] = [hidden]
        tensors[f"{prefix}.self_attn.qkv_proj.weight"] = [hidden, (heads + 2 * groups) * dim]
        tensors[f"{prefix}.self_attn.o_proj.weight"] = [heads * dim, hidden]

    for i in range(keys["num_hidden_layers"]):
        prefix = f"ernie.layers.{i}"
        attention(prefix)
        if "moe_num_experts" not in keys or i < keys["moe_layer_start_index"]:
            mlp(f"{prefix}.mlp", width)
            continue
        tensors[f"{prefix}.mlp.gate.weight"] = [hidden, keys["moe_num_experts"]]
        if keys["moe_use_aux_free"]:
            tensors[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = [1, keys["moe_num_experts"]]
        for expert in range(keys["moe_num_experts"]):
            mlp(f"{prefix}.mlp.experts.{expert}", keys["moe_intermediate_size"])
        if keys["moe_num_shared_experts"]:
            mlp(f"{prefix}.mlp.shared_experts", keys["moe_intermediate_size"] * keys["moe_num_shared_experts"])
    for j in range(keys.get("num_nextn_predict_layers", 0)):
        attention(f"ernie.mtp_block.{j}")
        mlp(f"ernie.mtp_block.{j}.mlp", width)
        tensors[f"ernie.mtp_emb_norm.{j}.weight"] = [hidden]
        tensors[f"ernie.mtp_hidden_norm.{j}.weight"] = [hidden]
        tensors[f"ernie.mtp_linear_proj.{j}.weight"] = [2 * hidden, hidden]
    return tensors


def is_float32(name: str) -> bool:
    return name.endswith((".mlp.gate.weight", ".e_score_correction_bias"))


architectures = pytest.mark.parametrize(
    "keys",
    [
        DENSE,
        {**DENSE, "tie_word_embeddings": False, "num_key_value_heads": 4},
        MOE,
        {**MOE, "head_dim": 6, "moe_num_shared_experts": 0, "tie_word_embeddings": True},
        {**MOE, "moe_layer_start_index": 2, "moe_use_aux_free": False},
        {**MTP, "head_dim": 10, "moe_layer_start_index": 2},
    ],
    ids=["dense", "untied", "moe", "no shared expert", "dense first layers", "mtp"],
)


@architectures
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_dict_has_the_published_names_shapes_and_dtypes(keys: dict[str, Any], dtype: str) -> None:
    model = ErnieForCausalLM(ErnieConfig(**keys), dtype=dtype, mtp=True)
    found = model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in found.items()} == expected_tensors(keys)
    for name, tensor in found.items():
        assert str(tensor.dtype) == ("paddle.float32" if is_float32(name) else f"paddle.{dtype}"), name


@architectures
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_files_have_the_published_names(keys: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    model = tiny_model(ErnieConfig(**keys), dtype=dtype, mtp=True)
    model.save_pretrained(tmp_path / "paddle", progress=False)
    stored = read_folder(tmp_path / "paddle")
    assert {name: list(array.shape) for name, (_, array) in stored.items()} == expected_tensors(keys)
    short = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    assert {name: kind for name, (kind, _) in stored.items()} == {n: "F32" if is_float32(n) else short for n in stored}

    model.save_pretrained(tmp_path / "pt", layout="pt", progress=False)
    queries, kv = keys["num_attention_heads"] * keys["head_dim"], keys["num_key_value_heads"] * keys["head_dim"]
    expected: dict[str, list[int]] = {}
    for name, shape in expected_tensors(keys).items():
        new = name.replace("ernie.", "model.", 1)
        if "qkv_proj" in name:
            for part, width in (("q_proj", queries), ("k_proj", kv), ("v_proj", kv)):
                expected[new.replace("qkv_proj", part)] = [width, shape[0]]
        elif "up_gate_proj" in name:
            for part in ("gate_proj", "up_proj"):
                expected[new.replace("up_gate_proj", part)] = [shape[1] // 2, shape[0]]
        else:
            as_it_is = "norm" in name or "embed" in name or name.endswith("bias")
            expected[new] = shape if as_it_is else shape[::-1]
    stored = read_folder(tmp_path / "pt")
    assert {name: list(array.shape) for name, (_, array) in stored.items()} == expected
    for name, (kind, _) in stored.items():
        assert kind == ("F32" if is_float32(name) else short), name


# Views and copies.


def test_experts_in_state_dict_are_views_of_the_stacked_parameters() -> None:
    model = tiny_model()
    bank = model.ernie.layers[1].mlp.experts["0"]
    view = model.state_dict()["ernie.layers.1.mlp.experts.3.down_proj.weight"]
    assert view.data_ptr() == bank.down_proj.data_ptr() + 3 * 10 * 24 * 4
    bank.down_proj.set_value(paddle.full_like(bank.down_proj, 7.0))
    assert (model.state_dict()["ernie.layers.1.mlp.experts.3.down_proj.weight"] == 7).all()


def test_every_parameter_is_presented_exactly_once() -> None:
    model = tiny_model(tiny_config(MTP), mtp=True)
    assert sum(p.size for p in model.parameters()) == sum(t.size for t in model.state_dict().values())


def test_set_state_dict_copies_everything() -> None:
    source, target = tiny_model(seed=1), tiny_model(seed=2)
    ids = token_ids(1, 5)
    assert difference(run(source, ids), run(target, ids)) > 0.1
    assert target.set_state_dict(source.state_dict()) == ([], [])
    assert difference(run(source, ids), run(target, ids)) == 0
    source.ernie.norm.weight.set_value(paddle.zeros([24]))
    assert difference(run(source, ids), run(target, ids)) > 0.1, "a copy, not the same memory"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_set_state_dict_takes_numpy_arrays_and_other_dtypes(dtype: str) -> None:
    source, target = tiny_model(seed=1, dtype="bfloat16"), tiny_model(seed=2, dtype=dtype)
    target.set_state_dict({name: tensor.numpy() for name, tensor in source.state_dict().items()})
    for name, tensor in target.state_dict().items():
        assert difference(tensor, source.state_dict()[name]) == 0, name


def test_set_state_dict_reports_missing_and_unexpected_names() -> None:
    model = tiny_model(seed=1)
    values = {name: tensor.clone() for name, tensor in tiny_model(seed=2).state_dict().items()}
    del values["ernie.norm.weight"], values["ernie.layers.2.mlp.experts.0.down_proj.weight"]
    values["other"] = paddle.zeros([1])
    missing, unexpected = model.set_state_dict(values)
    assert missing == ["ernie.layers.2.mlp.experts.0.down_proj.weight", "ernie.norm.weight"]
    assert unexpected == ["other"]


def test_set_state_dict_with_wrong_shapes_copies_nothing() -> None:
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = dict(other.state_dict())
    values["ernie.norm.weight"] = paddle.zeros([23])
    values["lm_head.weight"] = paddle.zeros([61, 24])
    with pytest.raises(CheckpointError) as caught:
        model.set_state_dict(values)
    assert "ernie.norm.weight: [23], expected [24]" in str(caught.value)
    assert "lm_head.weight: [61, 24], expected [24, 61]" in str(caught.value)
    assert all(difference(tensor, before[name]) == 0 for name, tensor in model.state_dict().items())


def test_paddle_save_and_load(tmp_path: Path) -> None:
    source, target = tiny_model(seed=1), tiny_model(seed=2)
    paddle.save(source.state_dict(), str(tmp_path / "model.pdparams"))
    assert target.set_state_dict(paddle.load(str(tmp_path / "model.pdparams"))) == ([], [])
    assert difference(run(source, token_ids(1, 5)), run(target, token_ids(1, 5))) == 0


# Half precision.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("keys", [DENSE, MOE], ids=["dense", "moe"])
def test_half_precision_weights_compute_in_float32_on_a_cpu(keys: dict[str, Any], dtype: str) -> None:
    half, ids = tiny_model(ErnieConfig(**keys), dtype=dtype), token_ids(2, 7)
    wide = tiny_model(ErnieConfig(**keys), seed=5)
    wide.set_state_dict(half.state_dict())
    with custom.reference_only():  # the fused products round activations
        loss, logits = half(ids, labels=ids)
        expected = run(wide, ids)
    assert logits.dtype == paddle.float32
    assert difference(logits, expected) < 1e-6
    loss.backward()
    assert all(p.grad.dtype == p.dtype for p in half.parameters() if not p.stop_gradient)


# Initial weights.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_weights(dtype: str) -> None:
    config = tiny_config(MTP, hidden_size=64, vocab_size=300)
    model = ErnieForCausalLM(config, dtype=dtype, mtp=True)
    for name, tensor in model.state_dict().items():
        values = tensor.astype("float32").numpy()
        if "norm" in name:
            assert (values == 1).all(), name
        elif name.endswith("bias"):
            assert (values == 0).all(), name
        else:
            spread = math.sqrt(0.3333 / 64)
            assert abs(values.mean()) < 5 * spread / math.sqrt(values.size), name
            assert values.std() == pytest.approx(spread, rel=5 / math.sqrt(values.size)), name


def test_every_draw_is_different_and_experts_differ() -> None:
    first, second = ErnieForCausalLM(tiny_config()), ErnieForCausalLM(tiny_config())
    assert difference(first.head.weight, second.head.weight) > 0
    bank = first.ernie.layers[1].mlp.experts["0"].up_gate_proj
    assert difference(bank[0], bank[1]) > 0


# Loss and training.


def test_labels_are_not_shifted_and_ignored_ones_do_not_count() -> None:
    model, ids = tiny_model(), token_ids(2, 6)
    labels = token_ids(2, 6, seed=9).numpy()
    labels[0, 3:] = -100
    loss, logits = model(ids, labels=paddle.to_tensor(labels))
    shares = logits.numpy() - np.log(np.exp(logits.numpy()).sum(axis=-1, keepdims=True))
    wanted = [-shares[b, t, labels[b, t]] for b in range(2) for t in range(6) if labels[b, t] != -100]
    assert float(loss) == pytest.approx(np.mean(wanted), rel=1e-5)
    assert difference(logits, run(model, ids)) < 1e-6


@pytest.mark.parametrize("keys", [DENSE, MOE], ids=["dense", "moe"])
def test_a_plain_training_loop_learns_a_sentence(keys: dict[str, Any]) -> None:
    model, ids = ErnieForCausalLM(tiny_config(keys)), token_ids(1, 9)
    model.train()
    optimizer = paddle.optimizer.AdamW(3e-3, parameters=model.parameters())
    losses = []
    for _ in range(25):
        loss, _ = model(ids[:, :-1], labels=ids[:, 1:])
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None and not p.stop_gradient]
        assert not missing, "parameters without a gradient"
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_the_correction_bias_is_not_trained() -> None:
    model = tiny_model()
    frozen = [name for name, p in model.named_parameters() if p.stop_gradient]
    assert frozen == [f"ernie.layers.{i}.mlp.moe_statics.e_score_correction_bias" for i in (1, 2)]


# Multi-token prediction.


@pytest.fixture
def with_mtp() -> ErnieForCausalLM:
    return tiny_model(tiny_config(MTP), mtp=True)


def test_mtp_shapes_and_that_depth_zero_is_the_model_itself(with_mtp: ErnieForCausalLM) -> None:
    ids = token_ids(2, 8)
    with paddle.no_grad():
        logits = with_mtp.next_n_logits(ids)
    assert [found.shape for found in logits] == [[2, 6, 61]] * 3
    assert difference(logits[0], run(with_mtp, ids[:, :6])) < 1e-5


def test_mtp_depth_d_sees_d_tokens_more(with_mtp: ErnieForCausalLM) -> None:
    ids = token_ids(1, 8).numpy()
    with paddle.no_grad():
        before = with_mtp.next_n_logits(paddle.to_tensor(ids))
        ids[0, 4] = 3 if ids[0, 4] != 3 else 4
        after = with_mtp.next_n_logits(paddle.to_tensor(ids))
    for depth in range(3):
        changed = np.abs(before[depth].numpy() - after[depth].numpy()).max(axis=(0, 2)) > 1e-4
        assert changed.tolist() == [position + depth >= 4 for position in range(6)]


def test_mtp_is_the_published_formula(with_mtp: ErnieForCausalLM) -> None:
    """Depth 0 written out: norm(embedding of the next token) | norm(hidden state), projected, one layer, norm, head."""
    ids, decoder = token_ids(1, 8), with_mtp.ernie
    with paddle.no_grad():
        place = decoder.place(ids[:, :6])
        hidden = decoder.run_layers(decoder.embed(ids[:, :6]), place)
        embedding = decoder.embed_tokens.weight[ids[0, 1:7]].unsqueeze(0)
        joined = paddle.concat([decoder.mtp_emb_norm[0](embedding), decoder.mtp_hidden_norm[0](hidden)], axis=-1)
        projected = paddle.matmul(joined, decoder.mtp_linear_proj[0].weight)
        output = decoder.mtp_block[0](projected, decoder.rotary(place.positions), place.mask)
        expected = paddle.matmul(decoder.norm(output), with_mtp.head.weight)
        assert difference(with_mtp.next_n_logits(ids)[1], expected) < 1e-5


@pytest.mark.parametrize("shared", ["ernie.embed_tokens.weight", "ernie.norm.weight", "lm_head.weight"])
def test_mtp_shares_embedding_norm_and_head(with_mtp: ErnieForCausalLM, shared: str) -> None:
    ids = token_ids(1, 8)
    with paddle.no_grad():
        before = with_mtp.next_n_logits(ids)
        tensor = with_mtp.state_dict()[shared]
        tensor.set_value(tensor * paddle.to_tensor(np.random.default_rng(0).random(tensor.shape, np.float32)))
        after = with_mtp.next_n_logits(ids)
    assert all(difference(a, b) > 1e-3 for a, b in zip(before, after, strict=True))


def test_mtp_blocks_are_dense_even_in_a_moe_model(with_mtp: ErnieForCausalLM) -> None:
    extra = with_mtp.state_dict().keys() - tiny_model().state_dict().keys()
    assert extra == expected_tensors(MTP).keys() - expected_tensors(MOE).keys()
    assert not [name for name in extra if "expert" in name or ".gate." in name or "embed" in name or "head" in name]


def test_mtp_is_off_unless_asked_for(with_mtp: ErnieForCausalLM) -> None:
    model = ErnieForCausalLM(tiny_config(MTP))
    assert model.config.num_nextn_predict_layers == 0
    with pytest.raises(ErnieError, match="load it with mtp=True"):
        model.next_n_logits(token_ids(1, 8))
    with pytest.raises(ErnieError, match="expected more than 2 tokens per row"):
        with_mtp.next_n_logits(token_ids(1, 2))


@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_mtp_from_and_to_a_checkpoint(with_mtp: ErnieForCausalLM, layout: str, tmp_path: Path) -> None:
    ids = token_ids(1, 8)
    with_mtp.save_pretrained(tmp_path / "with", layout=layout, progress=False)
    loaded = ErnieForCausalLM.from_pretrained(tmp_path / "with", mtp=True, progress=False)
    with paddle.no_grad():
        for found, expected in zip(loaded.next_n_logits(ids), with_mtp.next_n_logits(ids), strict=True):
            assert difference(found, expected) == 0
    loaded.save_pretrained(tmp_path / "again", layout=layout, progress=False)
    assert same_bits(read_folder(tmp_path / "again"), read_folder(tmp_path / "with"))

    plain = ErnieForCausalLM.from_pretrained(tmp_path / "with", progress=False)
    assert not [name for name in plain.state_dict() if "mtp" in name]
    assert difference(run(plain, ids), run(with_mtp, ids)) == 0
    plain.save_pretrained(tmp_path / "without", layout=layout, progress=False)
    assert not [name for name in read_folder(tmp_path / "without") if "mtp" in name]
    asked = ErnieForCausalLM.from_pretrained(tmp_path / "without", mtp=True, progress=False)
    assert not [name for name in asked.state_dict() if "mtp" in name]


def test_a_model_without_mtp_blocks_saves_although_its_config_announced_them(tmp_path: Path) -> None:
    ErnieForCausalLM(tiny_config(MTP)).save_pretrained(tmp_path, progress=False)
    assert ErnieConfig.from_pretrained(tmp_path).num_nextn_predict_layers == 0
    assert not [name for name in read_folder(tmp_path) if "mtp" in name]
