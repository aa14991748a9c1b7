"""Losses of the language model, of the router, and of preferences between answers."""

from ernie45.losses.chunked import chunked_head_loss, chunked_log_probs
from ernie45.losses.kto import KTOOptions, kto_baseline, kto_loss
from ernie45.losses.language import (
    IGNORED_LABEL,
    KINDS,
    language_model_loss,
    losses_by_kind,
    token_balanced_loss,
    token_log_probs,
    token_losses,
)
from ernie45.losses.preference import (
    PAIR_LOSSES,
    Answers,
    Pairs,
    PreferenceLoss,
    PreferenceOptions,
    preference_loss,
    sequence_log_probs,
)
from ernie45.losses.router import (
    BankLosses,
    RouterLosses,
    attach,
    load_balance_loss,
    orthogonalization_loss,
    orthogonalize_step,
    router_losses,
    router_z_loss,
    sum_over_ranks,
    update_correction_bias,
)
from ernie45.losses.upo import Rollout, policy_gradient_loss, upo_loss

__all__ = [
    "IGNORED_LABEL",
    "KINDS",
    "PAIR_LOSSES",
    "Answers",
    "BankLosses",
    "KTOOptions",
    "Pairs",
    "PreferenceLoss",
    "PreferenceOptions",
    "Rollout",
    "RouterLosses",
    "attach",
    "chunked_head_loss",
    "chunked_log_probs",
    "kto_baseline",
    "kto_loss",
    "language_model_loss",
    "load_balance_loss",
    "losses_by_kind",
    "orthogonalization_loss",
    "orthogonalize_step",
    "policy_gradient_loss",
    "preference_loss",
    "router_losses",
    "router_z_loss",
    "sequence_log_probs",
    "sum_over_ranks",
    "token_balanced_loss",
    "token_log_probs",
    "token_losses",
    "update_correction_bias",
    "upo_loss",
]
