import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.models.mask import AttentionMask
from ernie45.ops import custom, reference
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.tiny import difference, tiny_model, token_ids


def drawn(*shape, seed):
    """Numbers that bfloat16 holds, so that only probabilities and gradients of scores are rounded on the way."""
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    tensor = paddle.to_tensor(array).astype("bfloat16").astype("float32").detach()
    tensor.stop_gradient = False
    return tensor


def run(attend, tensors, mix):
    out = attend(*tensors)
    (out * mix).sum().backward()
    found = [out.detach(), *(tensor.grad.clone() for tensor in tensors)]
    for tensor in tensors:
        tensor.clear_gradient()
    return [x.numpy() for x in found]


@both_instruction_sets
@settings(deadline=None, max_examples=15)
@given(
    tokens=st.sampled_from([1, 2, 63, 64, 65, 130]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    head_dim=st.sampled_from([2, 8, 66, 128]),
    cut=st.none() | st.integers(1, 130),
)
def test_forward_and_gradients_agree_with_the_definition(isa, tokens, heads, head_dim, cut):
    shapes = [(2, tokens, count, head_dim) for count in (heads[0], heads[1], heads[1])]
    tensors = [drawn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    mix, scale = drawn(*shapes[0], seed=3).detach(), head_dim**-0.5
    ends = None
    if cut is not None:  # two documents
        ends = paddle.to_tensor(np.where(np.arange(tokens) < cut, cut, tokens)[None].repeat(2, 0))
    mask = AttentionMask(end_rows=ends)
    expected = run(lambda q, k, v: reference.attention(q, k, v, scale, mask.visible), tensors, mix)
    with fused(isa, "causal_attention", "causal_attention_backward"):
        found = run(lambda q, k, v: ops.causal_attention(q, k, v, scale, mask.key_ends()), tensors, mix)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= 0.02 * max(1.0, np.abs(other).max())
        assert np.linalg.norm(one - other) <= 0.005 * np.linalg.norm(other) + 1e-3


@both_instruction_sets
def test_a_token_that_sees_no_key_gets_zeros(isa):
    q, k, v = (drawn(1, 9, 2, 8, seed=seed) for seed in range(3))
    ends = AttentionMask(padding=paddle.to_tensor([[0] * 3 + [1] * 6]).astype("bool")).key_ends()
    with fused(isa):
        out, *gradients = run(lambda *x: ops.causal_attention(*x, 0.35, ends), (q, k, v), paddle.ones([1, 9, 2, 8]))
    assert np.all(out[:, :3] == 0) and np.all(out[:, 3:] != 0)
    assert all(np.all(gradient[:, :3] == 0) for gradient in gradients)


@both_instruction_sets
def test_nan_reaches_later_tokens_alone(isa):
    q, k, v = (drawn(1, 70, 1, 8, seed=seed).detach() for seed in range(3))
    k[0, 66] = float("nan")
    with fused(isa):
        out = ops.causal_attention(q, k, v, 0.35).numpy()
    assert np.isfinite(out[:, :66]).all() and np.isnan(out[:, 66:]).all()


def test_models_in_bfloat16_use_it_and_agree_with_the_definition():
    if custom.library() is None:
        pytest.skip("no fused operators here")
    model, ids = tiny_model(dtype="bfloat16"), token_ids(2, 70)
    padding = paddle.to_tensor(np.arange(70)[None] >= [[0], [5]]).astype("int64")
    with fused("avx2", "causal_attention"), paddle.no_grad():
        found = model(ids, attention_mask=padding)
    with custom.reference_only(), paddle.no_grad():
        expected = model(ids, attention_mask=padding)
    assert difference(found[1, 5:], expected[1, 5:]) < 0.15 * float(expected.abs().max())
    assert difference(found.mean(), expected.mean()) < 0.01
