"""Before/after: both policies answer the same held-out prompts with the same draws, the RM scores, `compare` counts."""

from __future__ import annotations

from pathlib import Path

from ups_rm.console import Advance, progress_bar
from ups_rm.data.batches import distinct_prompts
from ups_rm.data.prompts import PromptRow
from ups_rm.errors import DataError
from ups_rm.evaluation.compare import Comparison, compare
from ups_rm.local.actor import response_logprobs
from ups_rm.local.decode import Sampling
from ups_rm.local.policy import Policy
from ups_rm.local.rollout import Rollout, RolloutEngine
from ups_rm.recipe import Recipe
from ups_rm.types import Conversation, Score, Scorer


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
    recipe: Recipe, before: str | Path, after: str | Path, prompts: list[PromptRow], scorer: Scorer
) -> Comparison:
    """Compare two policies.

    KL is measured on the replies of `after`: mean over tokens of log pi_after - log pi_before, nats.

    Args:
        before, after: policy folders, hub ids, or the default's name.
        prompts: see `held_out_prompts`; each gets `evaluation.n` replies.
    """
    settings = recipe.evaluation
    with progress_bar("evaluating", 2 * len(prompts), unit="prompts") as advance:
        base = Policy.load(recipe, trainable=False, path=str(before))
        rollouts_before = _answer(base, recipe, prompts, advance)
        trained = Policy.load(recipe, trainable=False, path=str(after))
        rollouts_after = _answer(trained, recipe, prompts, advance)
    kl = _kl(trained, base, rollouts_after, recipe)
    texts_before, conversations_before, lengths_before = _joined(rollouts_before)
    texts_after, conversations_after, lengths_after = _joined(rollouts_after)
    # in one call, so that a judge of pairs compares the replies of both policies with each other
    scores = _one_score_per_text(scorer, [*conversations_before, *conversations_after])
    return compare(
        [row for row in prompts for _ in range(settings.n)],
        texts_before,
        texts_after,
        scores[: len(conversations_before)],
        scores[len(conversations_before) :],
        kl=kl,
        lengths_before=lengths_before,
        lengths_after=lengths_after,
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


def _one_score_per_text(scorer: Scorer, conversations: list[Conversation]) -> list[Score]:
    """Scores in order; a text that occurs twice keeps its first score, for in another batch its last bit may differ."""
    first: dict[str, Score] = {}
    scores = scorer.score(conversations)
    return [first.setdefault(repr(text), score) for text, score in zip(conversations, scores, strict=True)]


def _kl(trained: Policy, base: Policy, rollouts: list[Rollout], recipe: Recipe) -> float:
    """Mean over tokens of log pi_trained - log pi_base on the trained policy's replies, at the sampling temperature."""
    size = recipe.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
    temperature = recipe.evaluation.temperature or 1.0
    total = tokens = 0.0
    for rollout in rollouts:
        logprobs, base_logprobs = (
            response_logprobs(policy, rollout.sequences, micro_batch_size=size, temperature=temperature)
            for policy in (trained, base)
        )
        mask = rollout.sequences.response_mask
        total += float(((logprobs - base_logprobs) * mask).sum())
        tokens += float(mask.sum())
    return total / max(1.0, tokens)
