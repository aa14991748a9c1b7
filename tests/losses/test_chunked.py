"""Head and cross entropy chunk by chunk: against logits that are all there, and slow definitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.losses import chunked, chunked_head_loss, chunked_log_probs, token_balanced_loss, token_log_probs
from ernie45.ops import custom
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.losses import check, random, slow_language_model_loss, slow_token_losses
from tests.helpers.packed import packed, published

WIDTH, VOCAB = 5, 11
LABELS = np.array([[3, -100, 10, 0], [-100, -100, 4, 7]])


@pytest.fixture(autouse=True)
def _small_slices() -> Iterator[None]:
    """Three slices of the vocabulary, the last one shorter."""
    patch = pytest.MonkeyPatch()
    patch.setattr(chunked, "SLICE", 4)
    yield
    patch.undo()


def head_weight(transposed: bool) -> np.ndarray:
    weight = random(VOCAB, WIDTH, seed=1)
    return weight if transposed else weight.T.copy()


def slow_logits(hidden: np.ndarray, weight: np.ndarray, transposed: bool) -> np.ndarray:
    return hidden @ (weight.T if transposed else weight)


def slow_loss(logits: np.ndarray, labels: np.ndarray, z: float) -> float:
    squares = np.log(np.exp(logits).sum(axis=-1)) ** 2
    learned = labels != -100
    return slow_language_model_loss(logits, labels) + z * float(squares[learned].sum() / max(learned.sum(), 1))


def gradients(loss: Tensor, *tensors: Tensor) -> list[np.ndarray]:
    loss.backward()
    found = [tensor.grad.astype("float32").numpy() for tensor in tensors]
    for tensor in tensors:
        tensor.clear_gradient()
    return found


def trained(*arrays: np.ndarray) -> list[Tensor]:
    return [paddle.to_tensor(array, stop_gradient=False) for array in arrays]


@pytest.mark.parametrize("z", [0.0, 0.3])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 100])
@pytest.mark.parametrize("transposed", [True, False])
def test_chunked_head_loss(transposed: bool, chunk_tokens: int, z: float) -> None:
    hidden, weight = random(2, 4, WIDTH), head_weight(transposed)
    options = {"transposed": transposed, "chunk_tokens": chunk_tokens, "z": z}
    labels = paddle.to_tensor(LABELS)
    check(
        lambda x: chunked_head_loss(x, paddle.to_tensor(weight), labels, **options),
        lambda x: slow_loss(slow_logits(x, weight, transposed), LABELS, z),
        hidden,
    )
    check(
        lambda x: chunked_head_loss(paddle.to_tensor(hidden), x, labels, **options),
        lambda x: slow_loss(slow_logits(hidden, x, transposed), LABELS, z),
        weight,
    )


@settings(max_examples=25)
@given(
    labels=st.lists(st.sampled_from([-100, 0, 3, 4, 10]), min_size=1, max_size=9),
    chunk_tokens=st.integers(1, 5),
    transposed=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_chunked_log_probs(labels: list[int], chunk_tokens: int, transposed: bool, scale: float) -> None:
    wanted = np.array(labels)
    hidden, weight = trained(scale * random(len(labels), WIDTH), head_weight(transposed))
    factors = paddle.to_tensor(random(len(labels), seed=2))
    found = chunked_log_probs(
        hidden, weight, paddle.to_tensor(wanted), transposed=transposed, chunk_tokens=chunk_tokens
    )
    logits = slow_logits(hidden.numpy().astype(np.float64), weight.numpy(), transposed)
    np.testing.assert_allclose(-found.numpy(), slow_token_losses(logits, wanted), rtol=1e-4, atol=1e-5)
    chunks = gradients((found * factors).sum(), hidden, weight)
    whole = token_log_probs(paddle.matmul(hidden, weight, transpose_y=transposed), paddle.to_tensor(wanted))
    for first, second in zip(chunks, gradients((whole * factors).sum(), hidden, weight), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("denominator", [1.0, 4096.0])
def test_a_denominator_is_that_of_the_token_balanced_loss(denominator: float) -> None:
    hidden, weight = trained(random(2, 4, WIDTH), head_weight(True))
    labels = paddle.to_tensor(LABELS)
    loss = chunked_head_loss(hidden, weight, labels, transposed=True, chunk_tokens=2, denominator=denominator)
    whole = token_balanced_loss(paddle.matmul(hidden, weight, transpose_y=True), labels, denominator)
    assert float(loss) == pytest.approx(float(whole), rel=1e-5)
    for first, second in zip(gradients(loss, hidden, weight), gradients(whole, hidden, weight), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6 / denominator)


@pytest.mark.parametrize("loss", ["mean", "log_probs"])
def test_without_labels_the_loss_is_zero_with_zero_gradients(loss: str) -> None:
    hidden, weight = trained(random(2, 4, WIDTH), head_weight(False))
    labels = paddle.full([2, 4], -100, "int64")
    if loss == "mean":
        found = chunked_head_loss(hidden, weight, labels, transposed=False, z=1.0)
    else:
        found = chunked_log_probs(hidden, weight, labels, transposed=False).sum()
    assert float(found) == 0
    assert all(gradient.shape and not gradient.any() for gradient in gradients(found, hidden, weight))


def test_gradients_are_scaled_by_what_comes_after_the_loss() -> None:
    hidden, weight = trained(random(2, 4, WIDTH), head_weight(True))
    labels = paddle.to_tensor(LABELS)
    plain = gradients(chunked_head_loss(hidden, weight, labels, transposed=True), hidden, weight)
    scaled = gradients(chunked_head_loss(hidden, weight, labels, transposed=True) * -0.25, hidden, weight)
    for first, second in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(second, -0.25 * first, rtol=1e-6)


def test_a_tied_embedding_gets_the_gradients_of_both_its_uses() -> None:
    (weight,) = trained(head_weight(True))
    ids, labels = paddle.to_tensor([[1, 2, 3]]), paddle.to_tensor([[2, 3, -100]])
    hidden = paddle.nn.functional.embedding(ids, weight)
    found = gradients(chunked_head_loss(hidden, weight, labels, transposed=True), weight)[0]
    hidden = paddle.nn.functional.embedding(ids, weight)
    log_probs = token_log_probs(paddle.matmul(hidden, weight, transpose_y=True), labels)
    np.testing.assert_allclose(found, gradients(-log_probs.sum() / 2, weight)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("loss", ["mean", "log_probs"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen: str, loss: str) -> None:
    labels, results = paddle.to_tensor(LABELS), {}
    for stop in (None, frozen):
        tensors = dict(zip(("hidden", "weight"), trained(random(2, 4, WIDTH), head_weight(True)), strict=True))
        if stop is not None:
            tensors[stop].stop_gradient = True
        if loss == "mean":
            chunked_head_loss(**tensors, labels=labels, transposed=True).backward()
        else:
            chunked_log_probs(**tensors, labels=labels, transposed=True).sum().backward()
        results[stop] = {name: tensor.grad for name, tensor in tensors.items()}
    other = "weight" if frozen == "hidden" else "hidden"
    assert results[frozen][frozen] is None
    assert results[frozen][other].numpy().tolist() == results[None][other].numpy().tolist()


def test_without_gradients_none_is_computed() -> None:
    hidden, weight = trained(random(2, 4, WIDTH), head_weight(True))
    with paddle.no_grad():
        loss = chunked_head_loss(hidden, weight, paddle.to_tensor(LABELS), transposed=True)
    assert loss.stop_gradient
    expected = slow_language_model_loss(slow_logits(hidden.numpy(), weight.numpy(), True), LABELS)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_bfloat16_weight_is_widened_and_its_gradient_rounded_once(transposed: bool) -> None:
    weight = paddle.to_tensor(head_weight(transposed)).astype("bfloat16")
    wide = paddle.to_tensor(weight.astype("float32").numpy(), stop_gradient=False)
    weight.stop_gradient = False
    labels = paddle.to_tensor(LABELS)
    (hidden,) = trained(random(2, 4, WIDTH))
    with custom.reference_only():  # the fused loss rounds hidden states: see tests/ops/test_matmul.py
        narrow = chunked_head_loss(hidden, weight, labels, transposed=transposed, chunk_tokens=2)
    whole = chunked_head_loss(hidden, wide, labels, transposed=transposed, chunk_tokens=2)
    assert float(narrow) == float(whole)
    narrow.backward()
    assert weight.grad.dtype == paddle.bfloat16
    expected = gradients(whole, wide)[0]
    rounded = paddle.to_tensor(expected).astype("bfloat16").astype("float32").numpy()
    assert weight.grad.astype("float32").numpy().tolist() == rounded.tolist()


def test_extreme_logits_are_neither_cut_off_nor_infinite() -> None:
    hidden, weight = trained(np.array([[1.0]], np.float32), np.array([[1e4], [-1e4], [0.0]], np.float32))
    labels = paddle.to_tensor([1])
    loss = chunked_head_loss(hidden, weight, labels, transposed=True)
    assert float(loss) == 2e4
    assert [gradient.ravel().tolist() for gradient in gradients(loss, hidden, weight)] == [[2e4], [1, -1, 0]]
    assert chunked_log_probs(hidden, weight, labels, transposed=True).numpy().tolist() == [-2e4]


def test_sgd_on_the_chunks_is_sgd_on_the_whole() -> None:
    losses: dict[str, list[float]] = {}
    labels = paddle.to_tensor(LABELS)
    for way in ("chunks", "whole"):
        hidden, weight = trained(random(2, 4, WIDTH), head_weight(True))
        optimizer = paddle.optimizer.SGD(0.5, parameters=[hidden, weight])
        for _ in range(10):
            if way == "chunks":
                loss = chunked_head_loss(hidden, weight, labels, transposed=True, chunk_tokens=2)
            else:
                log_probs = token_log_probs(paddle.matmul(hidden, weight, transpose_y=True), labels)
                loss = -log_probs.sum() / int((LABELS != -100).sum())
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            losses.setdefault(way, []).append(float(loss))
    assert losses["chunks"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["chunks"][-1] < 0.5 * losses["chunks"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": paddle.to_tensor([[1, 2, 3]])}, r"hidden: expected \[1, 3, 5\] .*, found \[2, 4, 5\]"),
        ({"transposed": False}, r"hidden: expected \[2, 4, 11\] for these labels and this head, found \[2, 4, 5\]"),
        ({"labels": paddle.full([2, 4], 11, "int64")}, r"labels: expected -100 or ids 0\.\.10, found 11\.\.11"),
        ({"labels": paddle.full([2, 4], -1, "int64")}, r"labels: expected -100 or ids 0\.\.10, found -1\.\.-1"),
        ({"chunk_tokens": 0}, "chunk_tokens: expected a positive number of tokens, found 0"),
        ({"denominator": 0.0}, "denominator: expected a positive number of tokens, found 0.0"),
    ],
)
def test_bad_input_gets_a_clear_error(change: dict, message: str) -> None:
    arguments = {
        "hidden": paddle.to_tensor(random(2, 4, WIDTH)),
        "weight": paddle.to_tensor(head_weight(True)),
        "labels": paddle.to_tensor(LABELS),
        "transposed": True,
    }
    with pytest.raises(ErnieError, match=message):
        chunked_head_loss(**{**arguments, **change})


@both_instruction_sets
@pytest.mark.parametrize("kind", ["bfloat16", "wint8"])
@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("chunk_tokens", [2, 64])
def test_a_packed_weight_passes_the_gradient_on_to_hidden_states(
    isa: str, kind: str, outputs_first: bool, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "SLICE", 64)
    source = published(kind, 66, 131, outputs_first)
    meaning = source.meaning.T.copy() if outputs_first else source.meaning
    labels, results = paddle.to_tensor([3, -100, 130, 64]), []
    hidden = paddle.to_tensor(random(4, 66)).astype("bfloat16").astype("float32").numpy()
    factors = paddle.to_tensor(random(4, seed=2))
    with fused(isa, "packed_head_loss", "linear", "linear_transposed"):
        for head in (packed(source), paddle.to_tensor(meaning)):
            x, y = trained(hidden, hidden)
            options = {"transposed": outputs_first, "chunk_tokens": chunk_tokens}
            loss = chunked_head_loss(x, head, labels, z=0.01, **options)
            log_probs = chunked_log_probs(y, head, labels, **options)
            (3 * loss + (log_probs * factors).sum()).backward()
            results.append((float(loss), log_probs.numpy(), x.grad.numpy(), y.grad.numpy()))
    (loss, log_probs, *found), (exact_loss, exact_log_probs, *expected) = results
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    np.testing.assert_allclose(log_probs, exact_log_probs, rtol=1e-3, atol=1e-3)
    for gradient, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, exact, rtol=0, atol=0.01 * np.abs(exact).max())


@both_instruction_sets
def test_a_packed_head_without_labels_has_zero_loss_and_gradient(isa: str) -> None:
    (hidden,) = trained(random(4, 64))
    with fused(isa, "packed_head_loss"):
        head = packed(published("wint8", 64, 70))
        loss = chunked_head_loss(hidden, head, paddle.full([4], -100, "int64"), transposed=False)
        loss.backward()
    assert float(loss) == 0 and not hidden.grad.numpy().any()
