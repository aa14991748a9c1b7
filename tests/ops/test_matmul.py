import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.losses import chunked_head_loss
from ernie45.models.moe import ExpertBank
from ernie45.ops import custom, matmul
from ernie45.ops.adamw import AdamWStep
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.tiny import DENSE, MOE, tiny_config, tiny_model, token_ids

DTYPES = st.sampled_from(["float32", "bfloat16"])


def rounded(array):
    """float64 numbers of bfloat16."""
    return (
        paddle.to_tensor(np.asarray(array, np.float32)).astype("bfloat16").astype("float32").numpy().astype("float64")
    )


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensor(array, dtype="float32", gradient=False):
    made = paddle.to_tensor(array).astype(dtype).detach()
    made.stop_gradient = not gradient
    return made


def numbers(x):
    return x.detach().astype("float32").numpy().astype("float64")


def assert_near(found, expected, sizes, dtype="float32"):
    """Within the rounding of a float32 sum of terms of these absolute sizes, and of the result."""
    unit = 2.0**-8 if dtype == "bfloat16" else 0.0
    assert found.shape == expected.shape
    assert np.all(np.abs(found - expected) <= 1e-5 * sizes + unit * np.abs(expected))


@both_instruction_sets
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(0, 150)] * 3),
    flips=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.tuples(DTYPES, DTYPES, DTYPES),
    threads=st.integers(1, 3),
)
def test_product_rounds_both_sides_and_sums_in_float32(isa, sizes, flips, dtypes, threads):
    rows, inner, columns = sizes
    x, y = drawn(rows, inner), drawn(inner, columns, seed=1)
    with fused(isa, "matmul", threads=threads):
        found = matmul.product(
            tensor(x.T.copy() if flips[0] else x, dtypes[0]),
            tensor(y.T.copy() if flips[1] else y, dtypes[1]),
            transpose_x=flips[0],
            transpose_y=flips[1],
            dtype=dtypes[2],
        )
    left, right = rounded(x), rounded(y)
    assert str(found.dtype) == f"paddle.{dtypes[2]}"
    assert_near(numbers(found), left @ right, np.abs(left) @ np.abs(right), dtypes[2])


@both_instruction_sets
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_sums_and_many_rows_are_cut_into_blocks(isa, dtype):
    x, y = drawn(3, 9002), drawn(9002, 70, seed=1)
    with fused(isa, "matmul"):
        found = [matmul.product(tensor(x, kind), tensor(y), dtype=dtype) for kind in ("float32", "bfloat16")]
        tall = matmul.product(tensor(drawn(9001, 600)), tensor(drawn(600, 3, seed=1)), dtype=dtype)
    left, right = rounded(x), rounded(y)
    for one in found:
        assert_near(numbers(one), left @ right, np.abs(left) @ np.abs(right), dtype)
    left, right = rounded(drawn(9001, 600)), rounded(drawn(600, 3, seed=1))
    assert_near(numbers(tall), left @ right, np.abs(left) @ np.abs(right), dtype)


@both_instruction_sets
def test_nan_and_infinity_reach_what_they_touch(isa):
    x, y = drawn(20, 40), drawn(40, 70, seed=1)
    x[3, 5], y[7, 66] = np.nan, np.inf
    with fused(isa, "matmul"):
        found = numbers(matmul.product(tensor(x), tensor(y)))
    assert np.isnan(found[3]).all() and np.isinf(np.delete(found, 3, axis=0)[:, 66]).all()
    assert np.isfinite(np.delete(np.delete(found, 3, axis=0), 66, axis=1)).all()


@both_instruction_sets
def test_sides_that_do_not_fit_are_refused(isa):
    with fused(isa), pytest.raises(Exception, match=r"matmul: sums over 3 numbers of x \[2, 3\] and 4 of y"):
        matmul.product(tensor(drawn(2, 3)), tensor(drawn(4, 5)))


@both_instruction_sets
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_with_a_bfloat16_weight_has_both_gradients(isa, transposed):
    x, weight, mix = drawn(2, 9, 34), drawn(34, 67, seed=1), drawn(2, 9, 67, seed=2)
    stored = weight.T.copy() if transposed else weight
    given, parameter = tensor(x, gradient=True), tensor(stored, "bfloat16", gradient=True)
    with fused(isa, "matmul"):
        for _ in range(2):  # as of two micro batches
            out = (ops.linear_transposed if transposed else ops.linear)(given, parameter)
            (out * tensor(mix)).sum().backward()
    a, w, g = rounded(x).reshape(18, 34), rounded(weight), rounded(mix).reshape(18, 67)
    assert_near(numbers(out).reshape(18, 67), a @ w, np.abs(a) @ np.abs(w))
    assert_near(numbers(given.grad).reshape(18, 34), 2 * g @ w.T, 2 * np.abs(g) @ np.abs(w.T))
    assert parameter.grad.dtype == paddle.bfloat16
    found = numbers(parameter.grad)
    assert_near(found.T if transposed else found, 2 * a.T @ g, 2 * np.abs(a.T) @ np.abs(g), "bfloat16")


@both_instruction_sets
def test_frozen_sides_get_no_gradient(isa):
    x, weight = tensor(drawn(4, 6), gradient=True), tensor(drawn(6, 8), "bfloat16", gradient=True)
    with fused(isa, "matmul"):
        ops.linear(x, weight.detach()).sum().backward()
        assert x.grad is not None
        x.clear_gradient()
        ops.linear(x.detach(), weight).sum().backward()
    assert weight.grad is not None and float(x.grad.abs().sum()) == 0


def test_float32_weights_are_not_rounded():
    x, weight = tensor(drawn(5, 40)), tensor(drawn(40, 9, seed=1))
    exact = drawn(5, 40).astype("float64") @ drawn(40, 9, seed=1).astype("float64")
    assert np.abs(numbers(ops.linear(x, weight)) - exact).max() < 1e-5


@both_instruction_sets
@settings(deadline=None, max_examples=15)
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=6), width=st.integers(1, 70))
def test_experts_multiply_their_rows_and_get_their_gradients(isa, counts, width):
    total, inner = sum(counts), 10
    x, w, g = drawn(total, inner), drawn(len(counts), inner, width, seed=1), drawn(total, width, seed=2)
    rows, weight = tensor(x, gradient=True), tensor(w, "bfloat16", gradient=True)
    with fused(isa, "expert_linear", "expert_outer_products"):
        out = ops.expert_linear(rows, paddle.to_tensor(counts, dtype="int64"), weight)
        (out * tensor(g)).sum().backward()
    ends = np.cumsum(counts)
    for expert, last in enumerate(ends):
        part = slice(last - counts[expert], last)
        a, b, c = rounded(x[part]), rounded(w[expert]), rounded(g[part])
        assert_near(numbers(out)[part], a @ b, np.abs(a) @ np.abs(b))
        assert_near(numbers(rows.grad)[part], c @ b.T, np.abs(c) @ np.abs(b.T))
        assert_near(numbers(weight.grad)[expert], a.T @ c, np.abs(a.T) @ np.abs(c), "bfloat16")


def test_counts_that_are_not_the_rows_are_refused():
    if custom.library() is None:
        pytest.skip("no fused operators here")
    with pytest.raises(Exception, match="expert_linear: counts do not add up to the 3 rows"):
        ops.expert_linear(tensor(drawn(3, 4)), paddle.to_tensor([1, 1]), tensor(drawn(2, 4, 5), "bfloat16"))


def test_a_bank_computes_the_same_with_the_definition():
    config = tiny_config(MOE)
    bank = ExpertBank(config, config.banks[0], "bfloat16")
    bank.up_gate_proj.set_value(tensor(drawn(*bank.up_gate_proj.shape), "bfloat16"))
    bank.down_proj.set_value(tensor(drawn(*bank.down_proj.shape, seed=1), "bfloat16"))
    x, indices, weights = tensor(drawn(9, 24)), paddle.to_tensor([[0, 3]] * 9), tensor(drawn(9, 2))
    found = numbers(bank(x, indices, weights))
    with custom.reference_only():
        expected = numbers(bank(x, indices, weights))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@both_instruction_sets
def test_the_gradient_of_an_embedding_is_rounded_once(isa):
    table = tensor(drawn(11, 33), "bfloat16", gradient=True)
    ids = np.random.default_rng(1).integers(0, 4, (2, 300))
    mix = drawn(2, 300, 33, seed=2)
    with fused(isa, "sum_rows_by_id"):
        rows = ops.embedding(paddle.to_tensor(ids), table)
        (rows * tensor(mix)).sum().backward()
    assert np.array_equal(numbers(rows), rounded(drawn(11, 33))[ids])
    expected, sizes = np.zeros((11, 33)), np.zeros((11, 33))
    np.add.at(expected, ids, mix)
    np.add.at(sizes, ids, np.abs(mix))
    assert_near(numbers(table.grad), expected, sizes, "bfloat16")


@both_instruction_sets
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk", [7, 64])
def test_head_loss_agrees_with_its_definition_in_float64(isa, transposed, chunk):
    n, width, vocabulary, z = 20, 12, 83, 0.01
    x, w, labels = drawn(n, width), drawn(width, vocabulary, seed=1), np.arange(n) * 4
    labels[3] = -100
    hidden = tensor(x, gradient=True)
    weight = tensor(w.T.copy() if transposed else w, "bfloat16", gradient=True)
    with fused(isa, "head_loss"):
        loss = chunked_head_loss(
            hidden, weight, paddle.to_tensor(labels), transposed=transposed, chunk_tokens=chunk, z=z
        )
        (3 * loss).backward()
    learned = labels >= 0
    a, b = rounded(x)[learned], rounded(w)
    logits = a @ b
    normalizers = np.log(np.exp(logits).sum(-1))
    chosen = logits[np.arange(len(a)), labels[learned]]
    assert abs(float(loss) - (normalizers - chosen + z * normalizers**2).mean()) < 1e-5
    gradient = np.exp(logits - normalizers[:, None]) * (1 + 2 * z * normalizers[:, None])
    gradient[np.arange(len(a)), labels[learned]] -= 1
    gradient *= 3 / len(a)
    of_hidden, of_weight = np.zeros((n, width)), a.T @ gradient
    of_hidden[learned] = gradient @ b.T
    found = numbers(weight.grad).T if transposed else numbers(weight.grad)
    assert np.abs(numbers(hidden.grad) - of_hidden).max() < 0.01 * np.abs(of_hidden).max()
    assert np.abs(found - of_weight).max() < 0.01 * np.abs(of_weight).max()


@both_instruction_sets
def test_a_head_without_labels_has_zero_loss_and_gradient(isa):
    weight = tensor(drawn(30, 8), "bfloat16", gradient=True)
    with fused(isa, "head_loss"):
        loss = chunked_head_loss(
            tensor(drawn(4, 8), gradient=True), weight, paddle.full([4], -100, dtype="int64"), transposed=True
        )
        loss.backward()
    assert float(loss) == 0 and float(weight.grad.astype("float32").abs().sum()) == 0


@pytest.mark.parametrize("base", [DENSE, MOE], ids=["dense", "moe"])
def test_training_in_bfloat16_follows_float32(base):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = tiny_model(tiny_config(base), dtype=dtype)
        model.train()
        trained = [p for p in model.parameters() if not p.stop_gradient]
        masters = [p.astype("float32").detach() if p.dtype == paddle.bfloat16 else p for p in trained]
        moments = [(paddle.zeros(p.shape), paddle.zeros(p.shape)) for p in trained]
        ids, losses[dtype] = token_ids(4, 40), []
        for number in range(1, 21):
            loss, _ = model(ids[:, :-1], labels=ids[:, 1:])
            loss.backward()
            losses[dtype].append(float(loss))
            step = AdamWStep(number, 3e-3, 0.9, 0.95, 1e-8, 0.1)
            for parameter, master, (first, second) in zip(trained, masters, moments, strict=True):
                if parameter.grad is not None:
                    ops.adamw_update(parameter, parameter.grad, master, first, second, step)
                    parameter.grad = None
    exact, rough = np.array(losses["float32"]), np.array(losses["bfloat16"])
    assert exact[-1] < 0.8 * exact[0]
    assert np.abs(rough / exact - 1).max() < 0.03
