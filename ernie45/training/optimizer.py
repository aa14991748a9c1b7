"""AdamW with float32 masters, parameter groups, and clipping.

`paddle.optimizer.AdamW` refuses bfloat16 parameters on a CPU, with `multi_precision` too (Paddle 3.3.1: its kernel is
registered for float32 and float64 only). Here such a parameter has a float32 master, which `ops.adamw_update` moves,
and from which the parameter is rounded after every step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernie45 import ops
from ernie45.errors import ErnieError

_ROUTER = re.compile(r".*\.mlp\.gate\.weight(_\d+)?")
_EXPERT = re.compile(r".*\.mlp\.experts\..*")
_VISION_BLOCK = re.compile(r"vision_model\.blocks\.(\d+)\..*")
_PATCH_EMBED = "vision_model.patch_embed."


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike.

    Attributes:
        parameters: by name.
        rate: what the learning rate is multiplied with.
        weight_decay: the coefficient of the decoupled weight decay.
    """

    parameters: Mapping[str, Tensor]
    rate: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What the learning rate of some parameters is multiplied with.

    Attributes:
        router: of the router weights, `moe_gate_lr_ratio` upstream.
        vision: of the vision tower, to the power of how many blocks stand above: `vit_lr_ratio` upstream. The last
            block learns at the full rate, and the patch embedding as the first block.
        lora_plus: of the matrices B of LoRA (LoRA+, arXiv 2402.12354), `lora_plus_scale` upstream.
    """

    router: float = 1.0
    vision: float = 1.0
    lora_plus: float = 1.0

    def of(self, name: str, vision_depth: int) -> float:
        """The factor for one parameter of a model whose vision tower has so many blocks."""
        rate = self.lora_plus if name.endswith("lora_B") else 1.0
        if _ROUTER.fullmatch(name):
            return rate * self.router
        block = _VISION_BLOCK.fullmatch(name)
        if block or name.startswith(_PATCH_EMBED):
            return float(rate * self.vision ** (vision_depth - 1 - (int(block[1]) if block else 0)))
        return rate


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to norms and biases.

    Upstream goes by "norm" or "bias" in the name, which misses the norms called `ln` and those in the adapter; all of
    them are vectors.
    """
    return parameter.ndim > 1 and "norm" not in name and "bias" not in name


def parameter_groups(
    parameters: Iterable[tuple[str, Tensor]], weight_decay: float, rates: Rates | None = None, vision_depth: int = 0
) -> list[Group]:
    """The trainable ones among named parameters, grouped by rate and decay.

    Args:
        parameters: `model.named_parameters()`; those with `stop_gradient` are left out.
        weight_decay: for those that `decays` names.
        rates: by default 1 for all.
        vision_depth: blocks of the vision tower.
    """
    rates = rates or Rates()
    groups: dict[tuple[float, float], dict[str, Tensor]] = {}
    for name, parameter in parameters:
        if not parameter.stop_gradient:
            key = (rates.of(name, vision_depth), weight_decay if decays(name, parameter) else 0.0)
            groups.setdefault(key, {})[name] = parameter
    return [Group(members, rate, decay) for (rate, decay), members in groups.items()]


@dataclass(frozen=True)
class _Slot:
    """One parameter and what the optimizer holds for it; the master is the parameter itself if that is float32."""

    parameter: Tensor
    master: Tensor
    moment1: Tensor
    moment2: Tensor
    rate: float
    weight_decay: float


class AdamW:
    """AdamW (arXiv 1711.05101), algorithm 2 with the decay scaled by the learning rate.

    Args:
        groups: of `parameter_groups`; no parameter in two of them.
        beta1, beta2, epsilon: as in the paper.

    Raises:
        ErnieError: there is nothing to train, or a name stands in two groups.
    """

    def __init__(self, groups: Iterable[Group], beta1: float = 0.9, beta2: float = 0.95, epsilon: float = 1e-8):
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self._slots: dict[str, _Slot] = {}
        for group in groups:
            for name, parameter in group.parameters.items():
                if name in self._slots:
                    raise ErnieError(f"groups: the parameter {name} stands in two groups")
                self._slots[name] = _slot(parameter, group)
        if not self._slots:
            raise ErnieError("groups: no parameter is to be trained; was everything frozen?")
        self._done = paddle.zeros([1], dtype="int64")  # steps so far; a tensor, as the rest of the state
        self._sums: dict[str, Tensor] = {}

    @paddle.no_grad()
    def accumulate(self) -> None:
        """To be called between micro batches: moves gradients narrower than float32 into float32 sums.

        Paddle itself adds up the gradients of one parameter in that parameter's dtype, which loses small ones.
        """
        for name, slot in self._slots.items():
            gradient = slot.parameter.grad
            if gradient is None or gradient.dtype == paddle.float32:
                continue
            wide = gradient.astype("float32")
            self._sums[name] = self._sums[name].add_(wide) if name in self._sums else wide
            slot.parameter.grad = None

    @paddle.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every parameter that has one: the sum over the micro batches, in the widest dtype of it."""
        found = {}
        for name, slot in self._slots.items():
            gradient, accumulated = slot.parameter.grad, self._sums.get(name)
            if accumulated is not None and gradient is not None:
                gradient = accumulated + gradient.astype("float32")
            gradient = accumulated if gradient is None else gradient
            if gradient is not None:
                found[name] = gradient
        return found

    @paddle.no_grad()
    def step(self, learning_rate: float, gradients: dict[str, Tensor], scale: float = 1.0) -> None:
        """One update of every parameter that has a gradient.

        Args:
            learning_rate: before the factors of the groups.
            gradients: of `gradients`; they are used up, each dropped at once, so that memory falls as the step goes on.
            scale: what the gradients are multiplied with, of `clip_scale`.
        """
        self._done += 1
        number = self._done.item()
        for name in list(gradients):
            slot, gradient = self._slots[name], gradients.pop(name)
            rate = learning_rate * slot.rate
            step = ops.AdamWStep(number, rate, self.beta1, self.beta2, self.epsilon, slot.weight_decay, scale)
            ops.adamw_update(slot.parameter, gradient, slot.master, slot.moment1, slot.moment2, step)
            slot.parameter.grad = None
            self._sums.pop(name, None)

    def clear_gradients(self) -> None:
        """Drops gradients and sums of them, as after a step that is not to be done."""
        self._sums.clear()
        for slot in self._slots.values():
            slot.parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by `moment1.NAME`, `moment2.NAME`, `master.NAME`, and the steps so far.

        The tensors themselves, not copies. Masters are there for parameters that are not float32.
        """
        state = {"steps": self._done}
        for name, slot in self._slots.items():
            state |= {f"moment1.{name}": slot.moment1, f"moment2.{name}": slot.moment2}
            if slot.master is not slot.parameter:
                state[f"master.{name}"] = slot.master
        return state

    @paddle.no_grad()
    def set_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies in what `state_dict` gave, bit by bit. Parameters are not touched.

        Raises:
            ErnieError: a tensor is missing, unknown, or of another shape or dtype; nothing is copied then.
        """
        own = self.state_dict()
        problems = [f"{name}: missing" for name in own.keys() - state.keys()]
        problems += [f"{name}: belongs to no trained parameter" for name in state.keys() - own.keys()]
        problems += [
            f"{name}: {state[name].dtype} {list(state[name].shape)}, expected {own[name].dtype} {list(own[name].shape)}"
            for name in own.keys() & state.keys()
            if (state[name].dtype, state[name].shape) != (own[name].dtype, own[name].shape)
        ]
        if problems:
            raise ErnieError(
                "optimizer state: was made for other parameters; train the same parts as before, or start anew\n  "
                + "\n  ".join(sorted(problems)[:8])
            )
        for name, tensor in own.items():
            tensor.copy_(state[name], True)


@paddle.no_grad()
def _slot(parameter: Tensor, group: Group) -> _Slot:
    master = parameter if parameter.dtype == paddle.float32 else parameter.astype("float32")
    moment1, moment2 = (paddle.zeros(parameter.shape, dtype="float32") for _ in range(2))
    return _Slot(parameter, master, moment1, moment2, group.rate, group.weight_decay)


def global_norm(
    gradients: Mapping[str, Tensor], reduce_experts: Callable[[float], float] = lambda squares: squares
) -> float:
    """The L2 norm of all gradients as one vector, each expert counted once.

    With expert parallelism a rank holds some experts only while all else is the same on all ranks: what has to be
    summed over the ranks is the experts' share alone.

    Args:
        gradients: by name of the parameter.
        reduce_experts: sums a number over the ranks that hold other experts.
    """
    shares = {True: 0.0, False: 0.0}
    for name, gradient in gradients.items():
        shares[_EXPERT.fullmatch(name) is not None] += ops.sum_of_squares(gradient)
    return math.sqrt(shares[False] + reduce_experts(shares[True]))


def clip_scale(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied with so that the norm does not exceed the limit; 0: no limit."""
    return limit / norm if limit and norm > limit else 1.0
