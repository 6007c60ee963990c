"""How the policy in training does on the held-out prompts."""

from __future__ import annotations

from time import perf_counter

import torch

from ups_rm.data.prompts import PromptRow
from ups_rm.evaluation.refusal import is_refusal
from ups_rm.local.decode import Sampling
from ups_rm.local.rollout import RolloutEngine
from ups_rm.local.scoring import safe_scores
from ups_rm.recipe import Recipe
from ups_rm.types import Scorer


def validate(engine: RolloutEngine, scorer: Scorer, rows: list[PromptRow], recipe: Recipe) -> dict[str, float]:
    """Scores of the held-out prompts under `rollout.val_kwargs`, by kind of prompt."""
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
    scores = safe_scores(scorer.score(rollout.conversations), rollout.sequences.response_mask.device)
    refused = torch.tensor([float(is_refusal(text)) for text in rollout.texts])
    benign = torch.tensor([row.kind == "benign" for row in rows]).repeat_interleave(n)
    metrics = {f"val-core/PKU-SafeRLHF/reward/mean@{n}": float(scores.mean())}
    for kind, chosen in (("unsafe", ~benign), ("benign", benign)):
        if bool(chosen.any()):
            metrics[f"val-aux/{kind}/reward/mean@{n}"] = float(scores.cpu()[chosen].mean())
            metrics[f"val-aux/{kind}/refusal_rate"] = float(refused[chosen].mean())
    metrics["val-aux/response_length/mean"] = float(rollout.sequences.response_mask.sum(1).float().mean())
    metrics["timing_s/testing"] = perf_counter() - started
    return metrics
