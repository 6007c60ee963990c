"""How the policy in training does on the held-out prompts."""

from __future__ import annotations

from time import perf_counter

import torch

from ups_rm.data.prompts import PromptRow
from ups_rm.evaluation.refusal import is_refusal
from ups_rm.evaluation.text import text_metrics
from ups_rm.grpo import score_metrics
from ups_rm.local.policy import Policy
from ups_rm.local.rollout import RolloutEngine
from ups_rm.local.sampling import Sampling
from ups_rm.local.scoring import score_replies
from ups_rm.local.sequences import Sequences
from ups_rm.monitor.judge import judge_means
from ups_rm.monitor.limits import JUDGE
from ups_rm.recipe import Recipe
from ups_rm.reward.transforms import score_range
from ups_rm.types import Scorer


def validate(
    engine: RolloutEngine,
    scorer: Scorer,
    rows: list[PromptRow],
    recipe: Recipe,
    *,
    reference: Policy | None = None,
    judge: Scorer | None = None,
) -> dict[str, float]:
    """Scores, refusals, length, variety, entropy and KL of the held-out prompts under `rollout.val_kwargs`.

    Args:
        reference: gives the KL; without one there is none.
        judge: a second reward model, which scores the same replies.

    A reply that the reward model fails on is left out of every mean of scores, and counted.

    Raises:
        RMError: it fails on more of them than `reward_model.max_dropped_share`.
    """
    settings = recipe.actor_rollout_ref.rollout.val_kwargs
    sampling = Sampling(
        settings.temperature if settings.do_sample else 0.0,
        settings.top_p,
        settings.top_k,
        recipe.trainer.seed,
    )
    started, n = perf_counter(), settings.n
    rollout = engine.generate(
        [row.messages for row in rows],
        n=n,
        max_new_tokens=recipe.data.max_response_length,
        sampling=sampling,
    )
    engine.refresh()  # or the copy that decodes would stand beside the logits below
    rm = recipe.reward_model
    scored, usable = score_replies(
        scorer, rollout.conversations, retries=rm.retries, max_dropped_share=rm.max_dropped_share
    )
    scores = torch.tensor([score.safe_score for score in scored])  # (B,), nan where there is none
    refused = torch.tensor([float(is_refusal(text)) for text in rollout.texts])
    benign = torch.tensor([row.kind == "benign" for row in rows]).repeat_interleave(n)
    metrics = {
        f"val-core/PKU-SafeRLHF/reward/mean@{n}": float(scores[usable].mean()),
        "val-aux/dropped_replies": float((~usable).sum()),
    }
    for kind, chosen in (("unsafe", ~benign), ("benign", benign)):
        if bool((chosen & usable).any()):
            metrics[f"val-aux/{kind}/reward/mean@{n}"] = float(scores[chosen & usable].mean())
        if bool(chosen.any()):
            metrics[f"val-aux/{kind}/refusal_rate"] = float(refused[chosen].mean())
    metrics["val-aux/response_length/mean"] = float(rollout.sequences.response_mask.sum(1).float().mean())
    prompts = [row.messages[-1]["content"] for row in rows for _ in range(n)]
    of_text = text_metrics(rollout.texts, [row.kind for row in rows for _ in range(n)], prompts)
    group_ids = rollout.sequences.group_ids.cpu()[usable]
    spread = score_metrics(scores[usable], group_ids, score_range=score_range(rm.transform))
    metrics |= {
        "val-aux/benign/prompts": of_text["text/benign_prompts"],
        "val-aux/refusal_rate": of_text["text/refusal_rate"],
        "val-aux/distinct_2": of_text["text/distinct_2"],
        "val-aux/repetition": of_text["text/repetition"],
        "val-aux/prompt_overlap": of_text["text/prompt_overlap"],
        "val-aux/saturated_share": spread["score/saturated_share"],
    }
    if n > 1 and settings.do_sample:
        metrics["val-aux/zero_std_share"] = spread["group/zero_std_share"]
    metrics |= _entropy_and_kl(engine.policy, reference, rollout.sequences, recipe)
    if judge is not None:
        kept = usable.nonzero().flatten().tolist()
        theirs = judge.score([rollout.conversations[i] for i in kept])
        means = judge_means(theirs, [scored[i] for i in kept])
        metrics |= dict(zip(JUDGE["held-out"], means, strict=True))
    metrics["timing_s/testing"] = perf_counter() - started
    return metrics


@torch.no_grad()
def _entropy_and_kl(policy: Policy, reference: Policy | None, sequences: Sequences, recipe: Recipe) -> dict[str, float]:
    """Entropy of the next-token distribution and log pi - log pi_ref, each as mean over the reply tokens (nats)."""
    temperature = recipe.actor_rollout_ref.rollout.temperature
    size = recipe.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu
    tokens = entropies = gaps = 0.0
    for rows in sequences.micro_batches(torch.arange(len(sequences), device=policy.device), size):
        part = sequences.trimmed(rows)
        mask = part.response_mask
        logprobs, entropy = policy.response_logprobs(part, temperature, with_entropy=True)
        assert entropy is not None  # asked for
        tokens += float(mask.sum())
        entropies += float((entropy * mask).sum())
        if reference is not None:
            with reference.as_reference():
                ref_logprobs, _ = reference.plain_logprobs(part, temperature)
            gaps += float(((logprobs - ref_logprobs) * mask).sum())
    metrics = {"val-aux/entropy": entropies / max(1.0, tokens)}
    return metrics if reference is None else metrics | {"val-aux/kl": gaps / max(1.0, tokens)}
