"""The mixture-of-experts layer: a router and banks of experts.

A bank is (router weight, correction bias, experts), and every token belongs to exactly one bank. Text models have
one bank, vision-language models two; nothing here depends on the number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import paddle
from paddle import Tensor, nn

from ernie45 import ops
from ernie45.checkpoint.names import router_weight_name
from ernie45.config import BankConfig, ErnieConfig
from ernie45.models.layers import MLP, ZEROS
from ernie45.ops.packed import PackedWeight
from ernie45.ops.weight_only import WeightOnly, WeightOnlyStack


@dataclass(frozen=True)
class Routing:
    """What one bank's router decided for T tokens, for losses, bias updates and pictures.

    Attributes:
        layer: index of the decoder layer.
        bank: index of the bank.
        logits: [T, E] float32.
        probabilities: [T, E] float32, softmax (or sigmoid) of the logits, without the bias.
        indices: [T, K] int64, the chosen experts.
        weights: [T, K] float32, the weights with which their outputs are summed.
    """

    layer: int
    bank: int
    logits: Tensor
    probabilities: Tensor
    indices: Tensor
    weights: Tensor

    @property
    def counts(self) -> Tensor:
        """[E] int64: assignments per expert."""
        return paddle.bincount(self.indices.flatten(), minlength=self.logits.shape[-1])


class Router(nn.Layer):
    """Router weights [hidden_size, experts] in float32, one per bank: `weight`, `weight_1`, ..."""

    def __init__(self, config: ErnieConfig):
        super().__init__()
        for number, bank in enumerate(config.banks):
            parameter = self.create_parameter(
                [config.hidden_size, bank.num_experts], dtype="float32", default_initializer=ZEROS
            )
            self.add_parameter(router_weight_name(number), parameter)

    def forward(self, x: Tensor, bank: int) -> Tensor:
        """x [tokens, hidden_size] of any dtype -> logits [tokens, experts] float32."""
        return ops.linear(x.astype("float32"), getattr(self, router_weight_name(bank)))


class MoEStatics(nn.Layer):
    """Correction bias [banks, experts] in float32. It is not trained by gradient but moved after each step."""

    def __init__(self, banks: tuple[BankConfig, ...]):
        super().__init__()
        self.e_score_correction_bias = self.create_parameter(
            [len(banks), banks[0].num_experts], dtype="float32", default_initializer=ZEROS
        )
        self.e_score_correction_bias.stop_gradient = True


class ExpertBank(nn.Layer):
    """SwiGLU experts of one bank, stacked: up_gate_proj [E, hidden, 2 * width], down_proj [E, width, hidden]."""

    def __init__(self, config: ErnieConfig, bank: BankConfig, dtype: str):
        super().__init__()
        experts, width = bank.num_experts, bank.intermediate_size
        self.up_gate_proj = self.create_parameter(
            [experts, config.hidden_size, 2 * width], dtype=dtype, default_initializer=ZEROS
        )
        self.down_proj = self.create_parameter(
            [experts, width, config.hidden_size], dtype=dtype, default_initializer=ZEROS
        )

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts; experts that nobody chose are not computed.

        Args:
            x: [tokens, hidden_size]
            indices: [tokens, k] int64
            weights: [tokens, k] in the dtype of x

        Returns:
            [tokens, hidden_size]
        """
        rows, counts, _, slots = ops.moe_permute(x, indices, self.up_gate_proj.shape[0])
        inner = ops.swiglu(ops.expert_linear(rows, counts, self.up_gate_proj))
        return ops.moe_combine(ops.expert_linear(inner, counts, self.down_proj), slots, weights)


class MoE(nn.Layer):
    """Routed experts of the token's bank plus shared experts for every token.

    A bank that this layer does not have, though its router is there, passes its tokens on as they are.
    """

    def __init__(self, config: ErnieConfig, layer: int, dtype: str):
        super().__init__()
        self.layer = layer
        self.config = config
        self.gate = Router(config)
        self.moe_statics = MoEStatics(config.banks) if config.moe_use_aux_free else None
        self.experts = nn.LayerDict(
            {str(i): ExpertBank(config, bank, dtype) for i, bank in enumerate(config.banks) if bank.covers(layer)}
        )
        shared = config.shared_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared, dtype) if shared else None

    def forward(self, x: Tensor, banks: Tensor | None = None, routing: list[Routing] | None = None) -> Tensor:
        """x [batch, sequence, hidden_size] -> the same shape.

        Args:
            banks: [batch, sequence] int, the bank of each token; None: all tokens belong to the first bank.
            routing: a list to which this layer appends what its routers decided.
        """
        rows = x.flatten(0, -2)
        routed = self.route(rows, 0, routing) if banks is None else self.route_by_bank(rows, banks.flatten(), routing)
        routed = routed.reshape(x.shape)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def route(self, rows: Tensor, bank: int, routing: list[Routing] | None) -> Tensor:
        """Sends rows [tokens, hidden_size] through the experts that the bank's router chooses."""
        config = self.config
        logits = self.gate(rows, bank)
        bias = None if self.moe_statics is None else self.moe_statics.e_score_correction_bias[bank]
        probabilities, indices, weights = ops.moe_gate(
            logits, bias, config.moe_k, config.moe_gate_act, config.moe_norm_gate_logits, config.moe_norm_min
        )
        if routing is not None:
            routing.append(Routing(self.layer, bank, logits, probabilities, indices, weights))
        if str(bank) not in self.experts:  # upstream puts identities in the place of experts that a layer does not have
            return rows * weights.sum(axis=-1, keepdim=True).astype(rows.dtype)
        return self.experts[str(bank)](rows, indices, weights.astype(rows.dtype))

    def route_by_bank(self, rows: Tensor, banks: Tensor, routing: list[Routing] | None) -> Tensor:
        """Routes each group of rows inside its own bank and puts the results back in order."""
        routed = paddle.zeros_like(rows)
        for bank in range(len(self.config.banks)):
            members = paddle.nonzero(banks == bank).flatten()
            if members.shape[0]:
                part = self.route(paddle.gather(rows, members), bank, routing)
                routed = paddle.scatter_nd_add(routed, members.unsqueeze(-1), part)
        return routed


_STACKED = re.compile(r"^(.*\.mlp\.experts\.)(\d+)\.(up_gate_proj|down_proj)(?:_(\w+))?$")


def published_tensors(
    name: str, weight: Tensor | PackedWeight | WeightOnly | WeightOnlyStack, banks: tuple[BankConfig, ...]
) -> Iterator[tuple[str, Tensor | PackedWeight | WeightOnly]]:
    """Presents one weight under its published names: stacked experts one by one, as views; all else as it is.

    So is what stands beside them in a bank: matrix 3 of `up_gate_proj_x` is `experts.3.up_gate_proj.x`.
    """
    match = _STACKED.match(name)
    if match is None or isinstance(weight, WeightOnly):  # of which a stack is another class
        yield name, weight
        return
    prefix, bank, projection, what = match[1], int(match[2]), match[3], match[4] or "weight"
    first = sum(b.num_experts for b in banks[:bank])
    for expert in range(weight.shape[0]):
        view = weight.detach()[expert] if isinstance(weight, Tensor) else weight[expert]
        yield f"{prefix}{first + expert}.{projection}.{what}", view
