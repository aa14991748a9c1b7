"""Beam search: keep the most likely beginnings, return the best replies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ernie45.generation.request import Request
from ernie45.generation.sampling import Context, log_softmax, process
from ernie45.generation.steps import next_logits, prefill

if TYPE_CHECKING:
    from ernie45.models.pretrained import PretrainedModel


@dataclass(frozen=True)
class Hypothesis:
    """A reply, or the beginning of one.

    Attributes:
        ids: its tokens.
        log_probs: of each token.
        row: of the cache, which holds all tokens but the last.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    row: int

    def score(self, length_penalty: float) -> float:
        """Log-probability of the whole, divided by length ** length_penalty (-inf without a token)."""
        return sum(self.log_probs) / len(self.ids) ** length_penalty if self.ids else -np.inf


@dataclass
class Search:
    """The search for replies to one prompt."""

    prompt: np.ndarray
    running: list[Hypothesis]
    finished: list[Hypothesis] = field(default_factory=list)

    def advance(self, log_probs: np.ndarray, first_row: int, request: Request) -> None:
        """Lengthens the running hypotheses by one token.

        A candidate that ends counts only among the best num_beams. The search is over once num_beams have ended and
        the best running one scores no higher at its present length than the worst of them: the rule of transformers
        and PaddleNLP, which for length_penalty > 0 may miss a better long reply.

        Args:
            log_probs: [running, vocab] of the next token.
            first_row: row of the batch in which the running hypotheses begin.
            request: what to generate.
        """
        width, penalty = request.config.num_beams, request.config.length_penalty
        # Each running hypothesis has as many ends as there are eos ids: this many leave num_beams to go on with.
        best = self._best_candidates(log_probs, first_row, width * max(2, 1 + len(request.config.eos_token_id)))
        ended = [request.ends(candidate.ids) for candidate in best]
        self.finished += [candidate for candidate, end in zip(best[:width], ended, strict=False) if end]
        self.finished = sorted(self.finished, key=lambda h: -h.score(penalty))[:width]
        self.running = [candidate for candidate, end in zip(best, ended, strict=True) if not end][:width]
        best_score = self.running[0].score(penalty) if self.running else -np.inf
        if len(self.finished) == width and best_score <= self.finished[-1].score(penalty):
            self.running = []

    def _best_candidates(self, log_probs: np.ndarray, first_row: int, count: int) -> list[Hypothesis]:
        totals = np.array([sum(h.log_probs) for h in self.running])[:, None] + log_probs
        count = min(count, totals.size)
        best = np.argpartition(totals, -count, axis=None)[-count:]
        best = best[np.argsort(-totals.ravel()[best], kind="stable")]
        beams, ids = np.unravel_index(best, totals.shape)
        return [
            Hypothesis(
                (*self.running[beam].ids, int(i)),
                (*self.running[beam].log_probs, float(log_probs[beam, i])),
                first_row + int(beam),
            )
            for beam, i in zip(beams, ids, strict=True)
            if np.isfinite(log_probs[beam, i])
        ]

    def results(self, request: Request) -> list[Hypothesis]:
        """The num_return_sequences best; empty ones where the processors leave fewer possible replies."""
        config = request.config
        replies = sorted(self.finished + self.running, key=lambda h: -h.score(config.length_penalty))
        empty = [Hypothesis((), (), 0)] * config.num_return_sequences
        return (replies + empty)[: config.num_return_sequences]


def beam_search(model: PretrainedModel, request: Request) -> list[Hypothesis]:
    """The best replies to each prompt: num_return_sequences for the first, then for the next one, and so on.

    The batch has a row per running hypothesis; a search that is over has none. The request's own cache is left
    holding the prompts.
    """
    logits, cache = prefill(model, request), request.cache
    searches = [Search(prompt, [Hypothesis((), (), row)]) for row, prompt in enumerate(request.prompts)]
    for position in range(request.config.max_new_tokens):
        running = [(search, hypothesis) for search in searches for hypothesis in search.running]
        if not running:
            break
        replies = np.array([h.ids for _, h in running], dtype="int64").reshape(len(running), position)
        if position:
            cache = cache.with_rows(np.array([h.row for _, h in running]))
            logits = next_logits(model, cache, replies[:, -1:])
        context = Context([search.prompt for search, _ in running], replies)
        log_probs = log_softmax(process(request.processors, context, logits))
        first_row = 0
        for search in searches:
            count = len(search.running)
            if count:
                search.advance(log_probs[first_row : first_row + count], first_row, request)
            first_row += count
    return [reply for search in searches for reply in search.results(request)]
