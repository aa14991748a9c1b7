"""Products with packed weights have a gradient for their input, which training beside them needs."""

from __future__ import annotations

import importlib

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.ops import custom
from tests.helpers.packed import KINDS, packed, published

pytestmark = pytest.mark.skipif(custom.library() is None, reason="no native library here")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs_first", [False, True])
@pytest.mark.parametrize("step", [64, 70, 8192])
def test_the_gradient_is_that_of_what_the_weight_stands_for(
    kind: str, outputs_first: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("ernie45.ops.linear"), "GRADIENT_OUTPUTS", step)
    source = published("wint8" if outputs_first and kind == "wint4" else kind, 66, 150, outputs_first)
    generator = np.random.default_rng(0)
    x = paddle.to_tensor(generator.standard_normal((2, 3, 66), dtype="float32"), stop_gradient=False)
    factors = generator.standard_normal((2, 3, 150), dtype="float32")
    product = ops.linear_transposed if outputs_first else ops.linear
    (product(x, packed(source)) * paddle.to_tensor(factors)).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), factors @ source.meaning.T, rtol=1e-4, atol=1e-3)


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
