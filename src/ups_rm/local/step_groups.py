"""The group log of the loop: which replies of a step are kept, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ups_rm.console import console
from ups_rm.data.prompts import categories_of
from ups_rm.local.step_metrics import StepRecord
from ups_rm.recipe import Recipe
from ups_rm.tracking.group_log import GroupLog, group_records
from ups_rm.tracking.token_text import token_ends
from ups_rm.types import Score

OWN, JUDGE = "reward_model", "monitor.judge"
"""Names in `model_logits` of the one reward model and of the second judge."""


def open_group_log(recipe: Recipe) -> GroupLog:
    """The log that `trainer.group_log_*` asks for."""
    trainer = recipe.trainer
    return GroupLog(
        Path(trainer.group_log_dir),
        freq=trainer.group_log_freq,
        max_groups=trainer.group_log_max_groups,
        max_samples_per_group=trainer.group_log_max_samples_per_group,
        adv_estimator=recipe.algorithm.adv_estimator,
        scale_by_std=recipe.algorithm.norm_adv_by_std_in_grpo,
        normalize_components=recipe.algorithm.normalize_components,
        tolerance=recipe.algorithm.zero_std_tolerance,
        kl_coef=recipe.algorithm.kl_ctrl.kl_coef if recipe.algorithm.use_kl_in_reward else 0.0,
    )


def log_groups(log: GroupLog, record: StepRecord, *, number: int, n: int, kl_coef: float, tokenizer: Any) -> None:
    """Write the groups of a step, n replies each. A log that can't be written warns and costs no training.

    `tokenizer` is the policy's: it says where each token's KL belongs in the text.
    """
    sequences = record.rollout.sequences
    ids = [row[mask.bool()].tolist() for row, mask in zip(sequences.responses, sequences.response_mask, strict=True)]
    groups = group_records(
        group_ids=sequences.group_ids,
        prompt_ids=[row.index for row in record.prompts for _ in range(n)],
        messages=[row.messages for row in record.prompts for _ in range(n)],
        responses=record.rollout.texts,
        scores=_with_judge(record),
        token_level_rewards=record.token_level_rewards,
        advantages=record.advantages,
        response_mask=sequences.response_mask,
        kl=record.kl,
        truncated=[not ended for ended in record.rollout.finished],
        kinds=[row.kind for row in record.prompts for _ in range(n)],
        categories=[categories_of(row) for row in record.prompts for _ in range(n)],
        token_ends=token_ends(tokenizer, ids, record.rollout.texts),
        dropped=~record.usable,
        flat=record.flat,
        combined=record.combined,
    )
    try:
        log.write(number, groups, kl_coef=kl_coef)
    except OSError as error:
        console.print(f"step {number}: the group log can't be written, training goes on: {error}", markup=False)


def _with_judge(record: StepRecord) -> list[Score]:
    """The scores; where a second judge read the replies its logit stands beside the reward models'."""
    if record.judged is None:
        return record.scores
    return [
        replace(score, model_logits={**(score.model_logits or {OWN: score.logit}), JUDGE: judged.logit})
        for score, judged in zip(record.scores, record.judged, strict=True)
    ]
