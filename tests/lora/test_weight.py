"""Products with packed weights have a gradient for their input, which training beside them needs."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.ops import custom
from ernie45.ops.linear import input_gradient
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.packed import KINDS, packed, published

pytestmark = pytest.mark.skipif(custom.library() is None, reason="no native library here")


def rounded(array: np.ndarray) -> np.ndarray:
    return paddle.to_tensor(array).astype("bfloat16").astype("float32").numpy()


@both_instruction_sets
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs_first", [False, True])
@pytest.mark.parametrize("inputs", [31, 66, 130])
@pytest.mark.parametrize("outputs", [8, 150])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_what_the_weight_stands_for(
    isa: str, kind: str, outputs_first: bool, inputs: int, outputs: int, dtype: str
) -> None:
    """With both sides rounded to bfloat16."""
    source = published("wint8" if outputs_first and kind == "wint4" else kind, inputs, outputs, outputs_first)
    generator = np.random.default_rng(0)
    values = generator.standard_normal((2, 3, inputs), dtype="float32")
    x = paddle.to_tensor(values).astype(dtype).detach()
    x.stop_gradient = False
    factors = generator.standard_normal((2, 3, outputs), dtype="float32")
    product = ops.linear_transposed if outputs_first else ops.linear
    with fused(isa, "linear_transposed"):
        (product(x, packed(source)).astype("float32") * paddle.to_tensor(factors)).sum().backward()
    expected = rounded(factors) @ rounded(source.meaning.T)
    assert x.grad.dtype == x.dtype
    rounding = {"rtol": 1e-5, "atol": 1e-4} if dtype == "float32" else {"rtol": 2.0**-8, "atol": 1e-4}
    np.testing.assert_allclose(x.grad.astype("float32").numpy(), expected, **rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_gives_the_gradient_without_operators(kind: str) -> None:
    source, gradient = published(kind, 66, 150), np.random.default_rng(0).standard_normal((5, 150), dtype="float32")
    with custom.reference_only():
        found = input_gradient(paddle.to_tensor(gradient), packed(source))
    np.testing.assert_allclose(found.numpy(), gradient @ source.meaning.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_the_same_with_and_without_gradient(kind: str) -> None:
    weight = packed(published(kind, 66, 150))
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((5, 66), dtype="float32"))
    plain = ops.linear(x, weight)
    assert plain.stop_gradient
    x.stop_gradient = False
    with_gradient = ops.linear(x, weight)
    assert not with_gradient.stop_gradient
    np.testing.assert_array_equal(with_gradient.numpy(), plain.numpy())
    with paddle.no_grad():
        assert ops.linear(x, weight).stop_gradient
