import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.ops import custom
from ernie45.ops.adamw import AdamWStep
from tests.helpers.fused import both_instruction_sets, fused

STEP = AdamWStep(3, 0.01, 0.9, 0.95, 1e-6, 0.1, scale=0.5)


def drawn(size, seed):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def expected(gradient, master, moment1, moment2, step):
    """Master and moments after the step, in float64."""
    g, m, first, second = (np.asarray(x, np.float64) for x in (gradient, master, moment1, moment2))
    g = g * step.scale
    first = step.beta1 * first + (1 - step.beta1) * g
    second = step.beta2 * second + (1 - step.beta2) * g * g
    change = first / (1 - step.beta1**step.number) / (np.sqrt(second / (1 - step.beta2**step.number)) + step.epsilon)
    return m * (1 - step.learning_rate * step.weight_decay) - step.learning_rate * change, first, second


def check(size, parameter_dtype, gradient_dtype):
    gradient = paddle.to_tensor(drawn(size, 0)).astype(gradient_dtype)
    parameter = paddle.to_tensor(drawn(size, 1)).astype(parameter_dtype)
    master = parameter if parameter_dtype == "float32" else parameter.astype("float32")
    moments = [paddle.to_tensor(drawn(size, 2)), paddle.to_tensor(drawn(size, 3) ** 2)]
    inputs = [x.astype("float32").numpy().copy() for x in (gradient, master, *moments)]
    ops.adamw_update(parameter, gradient, master, *moments, STEP)
    for found, wanted in zip((master, *moments), expected(*inputs, STEP), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=1e-6)
    assert np.array_equal(parameter.astype("float32").numpy(), master.astype(parameter_dtype).astype("float32").numpy())


@both_instruction_sets
@settings(deadline=None, max_examples=25)
@given(
    size=st.one_of(st.integers(0, 70), st.integers(60_000, 140_000)),
    dtypes=st.tuples(*[st.sampled_from(["float32", "bfloat16"])] * 2),
)
def test_update_agrees_with_float64(isa, size, dtypes):
    with fused(isa):
        check(size, *dtypes)


def test_definition_agrees_with_float64():
    with custom.reference_only():
        check(1000, "bfloat16", "bfloat16")
        check(1000, "float32", "float32")


@both_instruction_sets
def test_nan_in_a_gradient_stays_where_it_is(isa):
    gradient = paddle.to_tensor(drawn(100, 0))
    gradient[7] = float("nan")
    parameter = paddle.to_tensor(drawn(100, 1)).astype("bfloat16")
    master = parameter.astype("float32")
    with fused(isa):
        ops.adamw_update(parameter, gradient, master, paddle.zeros([100]), paddle.zeros([100]), STEP)
    assert np.flatnonzero(np.isnan(parameter.astype("float32").numpy())).tolist() == [7]


@both_instruction_sets
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0, 5, 200_000])
def test_sum_of_squares(isa, dtype, size):
    x = paddle.to_tensor(drawn(size, 0)).astype(dtype)
    exact = (x.astype("float32").numpy().astype("float64") ** 2).sum()
    with fused(isa):
        assert abs(ops.sum_of_squares(x) - exact) <= 1e-6 * exact
    with custom.reference_only():
        assert abs(ops.sum_of_squares(x) - exact) <= 1e-5 * exact
