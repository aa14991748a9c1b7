"""What training does for the routers of a mixture of experts: their losses, their load, their correction bias."""

from __future__ import annotations

from collections.abc import Sequence

from paddle import Tensor

from ernie45.losses.router import RouterLosses, orthogonalize_step, router_losses, update_correction_bias
from ernie45.models.moe import MoE, Routing
from ernie45.models.parts import router_weights
from ernie45.models.pretrained import PretrainedModel
from ernie45.training.recipe import Recipe

COLUMNS = ("balance_loss", "orthogonality_loss", "z_loss", "expert_load")


class Routers:
    """The routers of a model, while it is trained by a recipe. A dense model has none, and nothing happens."""

    def __init__(self, model: PretrainedModel, recipe: Recipe):
        self._layers = {i: layer.mlp for i, layer in enumerate(model.ernie.layers) if isinstance(layer.mlp, MoE)}
        self._weights, self._k = router_weights(model), model.config.moe_k
        self._bias_rate = recipe.moe_use_aux_free_update_coef
        self._ortho_rate = recipe.moe_orthogonal_loss_lambda if recipe.use_ortho_loss_callback else 0.0
        self._coefficients = {
            "balance": recipe.moe_aux_loss_lambda,
            "orthogonality": 0.0 if recipe.use_ortho_loss_callback else recipe.moe_orthogonal_loss_lambda,
            "z": recipe.moe_z_loss_lambda,
        }
        self._counts: dict[tuple[int, int], Tensor] = {}
        self._terms: list[RouterLosses] = []

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of what `report` gives."""
        return COLUMNS if self._layers else ()

    def notes(self) -> list[Routing] | None:
        """What to give a forward pass as `routing`."""
        return [] if self._layers else None

    def take(self, routing: Sequence[Routing] | None) -> Tensor | None:
        """Counts what the routers decided for a micro batch, and gives the term of the loss, if there is one."""
        if not routing:
            return None
        for step in routing:
            place = (step.layer, step.bank)
            self._counts[place] = self._counts[place] + step.counts if place in self._counts else step.counts
        losses = router_losses(routing, self._weights, self._k, **self._coefficients)
        self._terms.append(losses)
        return losses.total if any(self._coefficients.values()) else None

    def update(self, learning_rate: float) -> None:
        """What follows the step of the optimizer: correction biases move, and the decoupled orthogonalization.

        Both leave routers that are frozen alone, as all of them are beside adapters.
        """
        if self._ortho_rate:
            weights = [weight for bank in self._weights.values() for weight in bank]
            orthogonalize_step(weights, self._ortho_rate * learning_rate)
        if self._bias_rate:
            for (layer, bank), counts in self._counts.items():
                statics = self._layers[layer].moe_statics
                if statics is not None and not self._weights[layer][bank].stop_gradient:
                    bias = statics.e_score_correction_bias.detach()[bank]
                    moved = bias.clone()
                    update_correction_bias(moved, counts, self._bias_rate)
                    bias.copy_(moved, True)

    def report(self) -> dict[str, float]:
        """Means over the micro batches since the last report; `expert_load`: the busiest expert's, 1 where even."""
        if not self._terms:
            return {}
        banks = [bank for terms in self._terms for bank in terms.banks]
        means = [sum(float(getattr(bank, name)) for bank in banks) / len(self._terms) for name in self._coefficients]
        load = max(float(counts.max() * counts.shape[0] / counts.sum()) for counts in self._counts.values())
        self._counts.clear()
        self._terms.clear()
        return dict(zip(COLUMNS, [*means, load], strict=True))
