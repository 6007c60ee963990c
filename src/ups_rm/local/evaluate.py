"""Before/after: both policies answer the same held-out prompts with the same draws, the RM scores, `compare` counts."""

from __future__ import annotations

from pathlib import Path

from ups_rm.console import progress_bar
from ups_rm.data.prompts import PromptRow
from ups_rm.errors import DataError
from ups_rm.evaluation.compare import Comparison, compare
from ups_rm.local.actor import response_logprobs
from ups_rm.local.batches import distinct_prompts
from ups_rm.local.decode import Sampling
from ups_rm.local.policy import Policy
from ups_rm.local.rollout import Rollout, RolloutEngine
from ups_rm.local.trainer import Scorer
from ups_rm.recipe import Recipe


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
    with progress_bar("evaluating", 3 * len(prompts), unit="prompts") as advance:
        base = Policy.load(recipe, trainable=False, path=str(before))
        rollout_before = _answer(base, recipe, prompts)
        advance(len(prompts), "before")
        trained = Policy.load(recipe, trainable=False, path=str(after))
        rollout_after = _answer(trained, recipe, prompts)
        advance(len(prompts), "after")
        kl = _kl(trained, base, rollout_after, recipe)
        advance(len(prompts), "KL")
    return compare(
        [row for row in prompts for _ in range(settings.n)],
        rollout_before.texts,
        rollout_after.texts,
        scorer.score(rollout_before.conversations),
        scorer.score(rollout_after.conversations),
        kl=kl,
        lengths_before=rollout_before.sequences.response_mask.sum(1).tolist(),
        lengths_after=rollout_after.sequences.response_mask.sum(1).tolist(),
        n_resamples=settings.n_resamples,
    )


def _answer(policy: Policy, recipe: Recipe, prompts: list[PromptRow]) -> Rollout:
    settings = recipe.evaluation
    engine = RolloutEngine(policy, max_num_seqs=recipe.actor_rollout_ref.rollout.max_num_seqs)
    sampling = Sampling(temperature=settings.temperature, seed=settings.seed)
    messages = [row.messages for row in prompts]
    return engine.generate(messages, n=settings.n, max_new_tokens=settings.max_new_tokens, sampling=sampling)


def _kl(trained: Policy, base: Policy, rollout: Rollout, recipe: Recipe) -> float:
    size = recipe.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
    logprobs, base_logprobs = (
        response_logprobs(policy, rollout.sequences, micro_batch_size=size, temperature=1.0)
        for policy in (trained, base)
    )
    mask = rollout.sequences.response_mask
    return float(((logprobs - base_logprobs) * mask).sum() / mask.sum().clamp(min=1))
