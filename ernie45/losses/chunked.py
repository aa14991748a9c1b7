"""Head and cross entropy in one, chunk by chunk: logits of all tokens are never there at once.

Of the tokens, only those with a label go through the head, some hundred at a time. Their logits are held in slices of
the vocabulary, so that a bfloat16 weight is widened slice by slice as well, where it has to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie45 import ops
from ernie45.errors import ErnieError
from ernie45.losses.language import IGNORED_LABEL, check_denominator
from ernie45.ops import PackedWeight, matmul
from ernie45.ops.linear import input_gradient

CHUNK_TOKENS = 512  # 212 MB of logits for a vocabulary of 103424
SLICE = 8192  # columns of logits that are computed together, a multiple of 64 for packed weights


def chunked_head_loss(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    labels: Tensor,
    *,
    transposed: bool,
    chunk_tokens: int = CHUNK_TOKENS,
    denominator: float | None = None,
    z: float = 0.0,
) -> Tensor:
    """Mean over the learned tokens of cross entropy + z * logsumexp(logits) ** 2; 0 if no token is learned.

    The value is that of `language_model_loss` on the logits of the head (for a single token not cut off at 64), plus
    the z-loss of PaLM (arXiv 2204.02311, section 5). The gradients of `hidden` and `weight` are computed in the
    forward pass, while the logits of a chunk are there, and `backward` only scales them: it can run once.

    Args:
        hidden: [..., hidden_size], after the final norm.
        weight: of the head: the embedding [vocab_size, hidden_size] if it is tied, else [hidden_size, vocab_size].
            Its gradient is summed in float32. A packed weight gets none, but `hidden` does.
        labels: [...] int64, already shifted, -100 where ignored.
        transposed: the weight is [vocab_size, hidden_size]; packed ones know that themselves.
        chunk_tokens: learned tokens whose logits are held at a time, in float32.
        denominator: if given, the gradient is that of the sum over tokens divided by it instead of the mean, as in
            `token_balanced_loss`; the value stays the mean.
        z: coefficient of the z-loss.

    Returns:
        float32 scalar.

    Raises:
        ErnieError: shapes do not go together, a label is outside the vocabulary, the denominator is not positive.
    """
    if denominator is not None:
        check_denominator(denominator)
    head = _Head(weight, transposed)
    rows, targets, _ = _learned(hidden, labels, head, chunk_tokens)
    task = _Task(head, targets, chunk_tokens)
    divisor = denominator or max(rows.shape[0], 1)
    return _MeanLoss.apply(rows, weight, task, divisor, z, paddle.is_grad_enabled())


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    labels: Tensor,
    *,
    transposed: bool,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Log-probability of every label in float32, [...]; 0 where it is -100: `token_log_probs` without the logits.

    Which gradient a token gets is known in the backward pass only, and so that computes the logits once more.

    Args:
        hidden, weight, labels, transposed, chunk_tokens: as of `chunked_head_loss`.

    Raises:
        ErnieError: shapes do not go together, or a label is outside the vocabulary.
    """
    head = _Head(weight, transposed)
    rows, targets, places = _learned(hidden, labels, head, chunk_tokens)
    found = _LogProbs.apply(rows, weight, _Task(head, targets, chunk_tokens))
    everywhere = paddle.zeros([labels.flatten().shape[0]], dtype="float32")
    return paddle.scatter(everywhere, places, found).reshape(labels.shape)


@dataclass(frozen=True)
class _Head:
    """The weight of a head, slice by slice of the vocabulary."""

    weight: Tensor | PackedWeight
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Hidden size and vocabulary."""
        if isinstance(self.weight, PackedWeight):
            return self.weight.in_features, self.weight.out_features
        hidden_size, vocab_size = self.weight.shape[::-1] if self.transposed else self.weight.shape
        return hidden_size, vocab_size

    def slices(self) -> list[tuple[int, int]]:
        """First and last + 1 of the ids of each slice."""
        vocab_size = self.shape[1]
        return [(first, min(first + SLICE, vocab_size)) for first in range(0, vocab_size, SLICE)]

    def logits(self, x: Tensor, first: int, last: int) -> Tensor:
        """x [n, hidden_size] -> [n, last - first] float32."""
        product = ops.linear_transposed if self.transposed else ops.linear
        return product(x, self._block(first, last)).astype("float32")

    def hidden_gradient(self, gradient: Tensor, first: int, last: int) -> Tensor:
        """Of logits [n, last - first] -> [n, hidden_size]."""
        block = self._block(first, last)
        if isinstance(block, PackedWeight):
            return input_gradient(gradient, block)
        product = ops.linear if self.transposed else ops.linear_transposed
        return product(gradient, block)

    def add_weight_gradient(self, total: Tensor, gradient: Tensor, x: Tensor, first: int, last: int) -> None:
        """Adds what logits [n, last - first] of x [n, hidden_size] say, to `total` in the shape of the weight."""
        if self.transposed:
            total[first:last].add_(paddle.matmul(gradient, x, transpose_x=True).astype("float32"))
        else:
            total[:, first:last].add_(paddle.matmul(x, gradient, transpose_x=True).astype("float32"))

    def _block(self, first: int, last: int) -> Tensor | PackedWeight:
        """A slice of the weight."""
        if isinstance(self.weight, PackedWeight):
            return self.weight.outputs(first, last)
        return self.weight[first:last] if self.transposed else self.weight[:, first:last]


@dataclass(frozen=True)
class _Task:
    """What goes into the two layers beside the tensors that get gradients.

    Attributes:
        targets: [n] int64, the labels of the n rows.
        chunk_tokens: rows that go through the head together.
    """

    head: _Head
    targets: Tensor
    chunk_tokens: int

    def places(self) -> list[slice]:
        """Of the rows that go through the head together."""
        rows = self.targets.shape[0]
        return [slice(first, min(first + self.chunk_tokens, rows)) for first in range(0, rows, self.chunk_tokens)]

    def chunk(self, rows: Tensor, place: slice) -> _Chunk:
        """The softmax of some of the rows. No variable of a loop may hold it: the next one would be beside it."""
        x = rows[place]
        return _Chunk(self.head, x.astype(ops.compute_dtype(x.dtype)), self.targets[place])


class _Chunk:
    """The softmax of n rows, [n, vocab_size] in slices.

    Attributes:
        log_probs: [n] float32, of the labels.
        normalizers: [n] float32, logsumexp of the logits.
    """

    def __init__(self, head: _Head, x: Tensor, targets: Tensor):
        self._head, self._x, self._targets = head, x, targets
        self._slices = head.slices()
        self._powers = [head.logits(x, *ends) for ends in self._slices]
        labels = paddle.add_n([self._pick(*pair) for pair in zip(self._powers, self._slices, strict=True)])
        largest = paddle.stack([part.max(axis=-1) for part in self._powers]).max(axis=0)
        for part in self._powers:
            part.subtract_(largest.unsqueeze(-1)).exp_()
        self._sums = paddle.add_n([part.sum(axis=-1) for part in self._powers])
        self.normalizers = largest + paddle.log(self._sums)
        self.log_probs = labels - self.normalizers

    def add_gradients(self, gradients: _Gradients, place: slice, softmax: Tensor, label: Tensor) -> None:
        """Adds those of logits whose gradient is softmax factor * softmax + label factor * one-hot label.

        The chunk is used up by that.

        Args:
            gradients: where to add them.
            place: of the rows among all.
            softmax, label: [n] float32, the two factors.
        """
        scale = (softmax / self._sums).unsqueeze(-1)
        for part, (first, last) in zip(self._powers, self._slices, strict=True):
            index, inside = self._local(first, last)
            factor = paddle.where(inside, label, paddle.zeros_like(label)).unsqueeze(-1)
            gradient = part.multiply_(scale).put_along_axis_(index, factor, axis=1, reduce="add").astype(self._x.dtype)
            if gradients.hidden is not None:
                gradients.hidden[place].add_(self._head.hidden_gradient(gradient, first, last).astype("float32"))
            if gradients.weight is not None:
                self._head.add_weight_gradient(gradients.weight, gradient, self._x, first, last)

    def _pick(self, part: Tensor, ends: tuple[int, int]) -> Tensor:
        """[n]: the logits of the labels that are in this slice, 0 for the others."""
        index, inside = self._local(*ends)
        picked = paddle.take_along_axis(part, index, axis=1).squeeze(-1)
        return paddle.where(inside, picked, paddle.zeros_like(picked))

    def _local(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Places [n, 1] of the labels in a slice, and [n] whether they are in it."""
        index = paddle.clip(self._targets, first, last - 1)
        return (index - first).unsqueeze(-1), index == self._targets


class _Gradients:
    """Sums in float32 of the gradients that are wanted; None: it is not.

    Attributes:
        hidden: [n, hidden_size].
        weight: in the shape of the weight.
    """

    def __init__(self, rows: Tensor, task: _Task):
        self._tensors = [x for x in (rows, task.head.weight) if isinstance(x, Tensor)]
        sums = [None if x.stop_gradient else paddle.zeros(x.shape, dtype="float32") for x in self._tensors]
        self.hidden, self.weight = (sums + [None])[:2]

    def results(self) -> tuple[Tensor | None, ...]:
        """In the dtypes of the rows and the weight, one for each of them that is a tensor."""
        sums = zip((self.hidden, self.weight), self._tensors, strict=False)
        return tuple(None if total is None else total.astype(x.dtype) for total, x in sums)


class _MeanLoss(PyLayer):
    """Mean loss of rows, with gradients that the forward pass computes."""

    @staticmethod
    def forward(
        ctx: PyLayer,
        rows: Tensor,
        weight: Tensor | PackedWeight,
        task: _Task,
        denominator: float,
        z: float,
        differentiable: bool,
    ) -> Tensor:
        if matmul.multiplies(rows, weight):
            total, ctx.gradients = matmul.head_loss(
                rows,
                weight,
                task.targets,
                differentiable=differentiable,
                transposed=task.head.transposed,
                chunk_tokens=task.chunk_tokens,
                divisor=denominator,
                z=z,
            )
            return total / max(rows.shape[0], 1)
        gradients = _Gradients(rows, task) if differentiable else None
        total = paddle.zeros([], dtype="float32")
        for place in task.places():
            total = total + _sum_of_losses(task.chunk(rows, place), place, gradients, denominator, z)
        ctx.gradients = None if gradients is None else gradients.results()
        return total / max(rows.shape[0], 1)

    @staticmethod
    def backward(ctx: PyLayer, gradient: Tensor) -> tuple[Tensor | None, ...]:
        results, ctx.gradients = ctx.gradients, None
        factor = float(gradient)
        return tuple(part if part is None or factor == 1.0 else part.scale_(factor) for part in results)


def _sum_of_losses(chunk: _Chunk, place: slice, gradients: _Gradients | None, denominator: float, z: float) -> Tensor:
    """Of the rows of a chunk; adds the gradients of this sum / denominator."""
    if gradients is not None:
        softmax = (1.0 + 2.0 * z * chunk.normalizers) / denominator
        chunk.add_gradients(gradients, place, softmax, paddle.full_like(softmax, -1.0 / denominator))
    return (z * chunk.normalizers**2 - chunk.log_probs).sum()


class _LogProbs(PyLayer):
    """Log-probability of the label of every row."""

    @staticmethod
    def forward(ctx: PyLayer, rows: Tensor, weight: Tensor | PackedWeight, task: _Task) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.task = task
        parts = [task.chunk(rows, place).log_probs for place in task.places()]
        return paddle.concat(parts) if parts else paddle.zeros([0], dtype="float32")

    @staticmethod
    def backward(ctx: PyLayer, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensor()
        gradients = _Gradients(rows, ctx.task)
        for place in ctx.task.places():
            ctx.task.chunk(rows, place).add_gradients(gradients, place, -gradient[place], gradient[place])
        return gradients.results()


def _learned(hidden: Tensor, labels: Tensor, head: _Head, chunk_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, hidden_size] that have a label, the labels [n], and their places [n] among all tokens."""
    hidden_size, vocab_size = head.shape
    expected = [*labels.shape, hidden_size]
    if list(hidden.shape) != expected:
        raise ErnieError(f"hidden: expected {expected} for these labels and this head, found {list(hidden.shape)}")
    if chunk_tokens < 1:
        raise ErnieError(f"chunk_tokens: expected a positive number of tokens, found {chunk_tokens}")
    flat = labels.flatten()
    places = paddle.nonzero(flat != IGNORED_LABEL).flatten()
    targets = paddle.gather(flat, places)
    if targets.shape[0] and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise ErnieError(
            f"labels: expected {IGNORED_LABEL} or ids 0..{vocab_size - 1}, "
            f"found {int(targets.min())}..{int(targets.max())}"
        )
    return paddle.gather(hidden.flatten(0, -2), places), targets, places
