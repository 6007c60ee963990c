"""Before/after: both policies answer the same held-out prompts with the same draws, the RM scores, `compare` counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ups_rm.console import Advance, progress_bar
from ups_rm.data.prompts import PromptRow, distinct_prompts
from ups_rm.errors import DataError
from ups_rm.evaluation.compare import Comparison, LogprobSums, compare
from ups_rm.evaluation.judges import Judge
from ups_rm.local.actor import response_logprobs
from ups_rm.local.policy import Policy
from ups_rm.local.rollout import Rollout, RolloutEngine
from ups_rm.local.sampling import Sampling
from ups_rm.recipe import Recipe
from ups_rm.types import Conversation, Scorer

T = TypeVar("T")


def held_out_prompts(rows: list[PromptRow], recipe: Recipe) -> list[PromptRow]:
    """Distinct prompts of each kind, at most `evaluation.max_*_prompts`, in file order.

    Raises:
        DataError: there are none.
    """
    distinct = distinct_prompts(rows)
    limits = {"unsafe": recipe.evaluation.max_unsafe_prompts, "benign": recipe.evaluation.max_benign_prompts}
    chosen = [row for kind, limit in limits.items() for row in [r for r in distinct if r.kind == kind][:limit]]
    if not chosen:
        raise DataError("no held-out prompts to evaluate on; check data.val_files and evaluation.max_*_prompts")
    return chosen


def evaluate(
    recipe: Recipe,
    before: str | Path,
    after: str | Path,
    prompts: list[PromptRow],
    scorer: Scorer,
    *,
    judges: Sequence[Judge] = (),
) -> Comparison:
    """Compare two policies.

    KL is measured on the replies of `after`: mean over tokens of log pi_after - log pi_before, nats, at the sampling
    temperature. Perplexity (`evaluation.perplexity`): that of both policies' replies under `before`, at temperature 1.

    Args:
        before, after: policy folders, hub ids, or the default's name.
        prompts: see `held_out_prompts`; each gets `evaluation.n` replies.
        judges: asked besides `scorer` about every reply.
    """
    settings = recipe.evaluation
    with progress_bar("evaluating", 2 * len(prompts), unit="prompts") as advance:
        base = Policy.load(recipe, trainable=False, path=str(before))
        rollouts_before = _answer(base, recipe, prompts, advance)
        trained = Policy.load(recipe, trainable=False, path=str(after))
        rollouts_after = _answer(trained, recipe, prompts, advance)
    texts_before, conversations_before, lengths_before = _joined(rollouts_before)
    texts_after, conversations_after, lengths_after = _joined(rollouts_after)
    kl, nll_before, nll_after = _logprob_sums(
        trained, base, rollouts_before if settings.perplexity else [], rollouts_after, recipe
    )
    del base, trained  # before a judge needs their memory
    # in one call, so that a judge of pairs compares the replies of both policies with each other
    conversations, first = [*conversations_before, *conversations_after], len(conversations_before)
    scores = _one_per_text(scorer.score(conversations), conversations)
    verdicts = {judge.name: _one_per_text(judge.judge(conversations), conversations) for judge in judges}
    return compare(
        [row for row in prompts for _ in range(settings.n)],
        texts_before,
        texts_after,
        scores[:first],
        scores[first:],
        kl=math.fsum(kl) / max(1, sum(lengths_after)),
        lengths_before=lengths_before,
        lengths_after=lengths_after,
        logprobs=LogprobSums(kl, nll_before or None, nll_after or None),
        judges={name: (given[:first], given[first:]) for name, given in verdicts.items()},
        n_resamples=settings.n_resamples,
    )


def _answer(policy: Policy, recipe: Recipe, prompts: list[PromptRow], advance: Advance) -> list[Rollout]:
    """Replies to all prompts, `max_num_seqs` at a time; the draws of a prompt are the same for every policy."""
    settings, at_once = recipe.evaluation, recipe.actor_rollout_ref.rollout.max_num_seqs
    engine = RolloutEngine(policy, max_num_seqs=at_once)
    per_call = max(1, min(at_once, 32) // settings.n)
    rollouts = []
    for start in range(0, len(prompts), per_call):
        messages = [row.messages for row in prompts[start : start + per_call]]
        sampling = Sampling(temperature=settings.temperature, seed=settings.seed * 1_000_003 + start)
        rollouts.append(
            engine.generate(messages, n=settings.n, max_new_tokens=settings.max_new_tokens, sampling=sampling)
        )
        advance(len(messages))
    return rollouts


def _joined(rollouts: list[Rollout]) -> tuple[list[str], list[Conversation], list[int]]:
    """(texts, conversations, lengths in tokens) of all replies."""
    return (
        [text for rollout in rollouts for text in rollout.texts],
        [conversation for rollout in rollouts for conversation in rollout.conversations],
        [length for rollout in rollouts for length in rollout.sequences.response_mask.sum(1).tolist()],
    )


def _one_per_text(given: list[T], conversations: list[Conversation]) -> list[T]:
    """In order; a text that occurs twice keeps its first score, for in another batch its last bit may differ."""
    first: dict[str, T] = {}
    return [first.setdefault(repr(text), value) for text, value in zip(conversations, given, strict=True)]


def _logprob_sums(
    trained: Policy, base: Policy, before: list[Rollout], after: list[Rollout], recipe: Recipe
) -> tuple[list[float], list[float], list[float]]:
    """KL of every reply of `after`; where `before` has replies, also -log pi_base of its and of after's."""
    temperature = recipe.evaluation.temperature or 1.0
    kl: list[float] = []
    nll_after: list[float] = []
    for rollout in after:
        of_base = _logprobs(base, rollout, recipe, temperature)
        kl += (_logprobs(trained, rollout, recipe, temperature) - of_base).sum(1).tolist()
        if before:
            plain = of_base if temperature == 1.0 else _logprobs(base, rollout, recipe, 1.0)
            nll_after += (-plain).sum(1).tolist()
    nll_before = [nll for rollout in before for nll in (-_logprobs(base, rollout, recipe, 1.0)).sum(1).tolist()]
    return kl, nll_before, nll_after


def _logprobs(policy: Policy, rollout: Rollout, recipe: Recipe, temperature: float) -> Tensor:
    """Log-probability of every reply token, 0 at padding. Shape (B, R), float64: sums of them are then exact enough."""
    size = recipe.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
    return response_logprobs(policy, rollout.sequences, micro_batch_size=size, temperature=temperature).double()
