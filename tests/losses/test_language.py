"""Losses of the language model on logits."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.losses import (
    language_model_loss,
    losses_by_kind,
    token_balanced_loss,
    token_log_probs,
    token_losses,
)
from tests.helpers.losses import check, random, slow_language_model_loss, slow_token_losses, value_and_gradient
from tests.helpers.numeric import numeric_gradient


@settings(max_examples=20)
@given(
    labels=st.lists(st.sampled_from([-100, 0, 1, 4, 6]), min_size=1, max_size=6),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_language_model_loss(labels: list[int], scale: float) -> None:
    wanted = np.array([labels])
    check(
        lambda x: language_model_loss(x, paddle.to_tensor(wanted)),
        lambda x: slow_language_model_loss(x, wanted),
        scale * random(1, len(labels), 7),
    )


def test_language_model_loss_without_labels_is_zero_with_zero_gradient() -> None:
    value, gradient = value_and_gradient(
        lambda x: language_model_loss(x, paddle.full([2, 3], -100, "int64")), random(2, 3, 5)
    )
    assert value == 0 and not gradient.any()


def test_language_model_loss_does_not_shift() -> None:
    logits = np.full((1, 3, 4), -50, np.float32)
    logits[0, [0, 1, 2], [3, 1, 2]] = 50
    assert float(language_model_loss(paddle.to_tensor(logits), paddle.to_tensor([[3, 1, 2]]))) < 1e-6


def test_language_model_loss_is_computed_in_float32() -> None:
    logits = paddle.to_tensor(random(2, 4, 9)).astype("bfloat16")
    labels = paddle.to_tensor(np.arange(8).reshape(2, 4))
    loss = language_model_loss(logits, labels)
    assert loss.dtype == paddle.float32
    expected = slow_language_model_loss(logits.astype("float32").numpy().astype(np.float64), labels.numpy())
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_language_model_loss_of_extreme_logits_is_finite() -> None:
    logits = paddle.to_tensor(np.array([[[3e4, -3e4, 0.0]]], np.float32))
    assert 60 < float(language_model_loss(logits, paddle.to_tensor([[1]]))) < 1e5  # Paddle cuts it off at 64
    assert float(language_model_loss(logits / 1000, paddle.to_tensor([[1]]))) == pytest.approx(60)


def test_token_losses_have_the_shape_of_the_labels() -> None:
    logits, labels = random(2, 3, 7), np.array([[0, -100, 6], [-100, 2, 2]])
    losses = token_losses(paddle.to_tensor(logits).astype("bfloat16"), paddle.to_tensor(labels))
    assert losses.shape == [2, 3] and losses.dtype == paddle.float32
    rounded = paddle.to_tensor(logits).astype("bfloat16").astype("float64").numpy()
    np.testing.assert_allclose(losses.numpy().ravel(), slow_token_losses(rounded, labels), rtol=1e-5)


@settings(max_examples=20)
@given(
    labels=st.lists(st.sampled_from([-100, 0, 1, 4, 6]), min_size=1, max_size=6),
    denominator=st.sampled_from([1, 3, 4096, 0.5]),
)
def test_token_balanced_loss_has_the_mean_for_value_and_a_fixed_denominator_in_its_gradient(
    labels: list[int], denominator: float
) -> None:
    logits, wanted = random(1, len(labels), 7), np.array([labels])
    value, gradient = value_and_gradient(
        lambda x: token_balanced_loss(x, paddle.to_tensor(wanted), denominator), logits
    )
    assert value == pytest.approx(slow_language_model_loss(logits.astype(np.float64), wanted), rel=1e-5)
    expected = numeric_gradient(lambda x: sum(slow_token_losses(x, wanted)) / denominator, logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5 / denominator)


@pytest.mark.parametrize("denominator", [0, -1, float("nan")])
def test_token_balanced_loss_refuses_a_denominator_that_is_not_positive(denominator: float) -> None:
    with pytest.raises(ErnieError, match="denominator: expected a positive number of tokens, found"):
        token_balanced_loss(paddle.zeros([1, 1, 3]), paddle.zeros([1, 1], "int64"), denominator)


def test_losses_by_kind_of_row() -> None:
    types = [[0, 0, 0], [0, 0, 1], [1, 2, 1], [0, 0, 0], [1, 0, 0]]
    labels = [[5, -100, 5], [-100, 5, -100], [5, 5, -100], [-100, -100, 5], [5, -100, -100]]
    losses = [[1.0, 0.0, 2.0], [0.0, 4.0, 0.0], [8.0, 16.0, 0.0], [0.0, 0.0, 3.0], [5.0, 0.0, 0.0]]
    found = losses_by_kind(paddle.to_tensor(losses), paddle.to_tensor(labels), paddle.to_tensor(types))
    assert found == {"text": 2.0, "image": 4.5, "video": 12.0}


def test_losses_by_kind_leave_out_what_is_not_learned() -> None:
    types, labels = paddle.to_tensor([[0, 0], [1, 1]]), paddle.to_tensor([[-100, 5], [-100, -100]])
    assert losses_by_kind(paddle.to_tensor([[0.0, 7.0], [0.0, 0.0]]), labels, types) == {"text": 7.0}


def test_token_log_probs() -> None:
    logits, labels = random(2, 3, 7), np.array([[0, -100, 6], [-100, 2, 2]])
    found = token_log_probs(paddle.to_tensor(logits).astype("bfloat16"), paddle.to_tensor(labels))
    assert found.shape == [2, 3] and found.dtype == paddle.float32
    rounded = paddle.to_tensor(logits).astype("bfloat16").astype("float64").numpy()
    np.testing.assert_allclose(-found.numpy().ravel(), slow_token_losses(rounded, labels), rtol=1e-5)
    factors = random(2, 3, seed=1)
    check(
        lambda x: (token_log_probs(x, paddle.to_tensor(labels)) * paddle.to_tensor(factors)).sum(),
        lambda x: -float(np.dot(slow_token_losses(x, labels), factors.ravel())),
        logits,
    )


def test_token_log_probs_are_not_cut_off() -> None:
    logits = np.array([[[1e4, -1e4, 0.0]]], np.float32)
    value, gradient = value_and_gradient(lambda x: token_log_probs(x, paddle.to_tensor([[1]])).sum(), logits)
    assert value == -2e4 and gradient.tolist() == [[[-1, 1, 0]]]
