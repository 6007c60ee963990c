"""What one step of verl computed, in our words: metrics that verl does not show, and the group log.

`read_step` takes the step's rows out of verl's TransferQueue (before verl clears it) and drops verl's padding rows; the
rest are functions of what it read. Dimension letters: B replies, R response tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ups_rm.distributed.prompts import messages_of
from ups_rm.errors import RunError
from ups_rm.evaluation.text import text_metrics
from ups_rm.grpo import Combined, kl_penalty, model_metrics, place_on_last_token, rollout_metrics
from ups_rm.reward.transforms import score_range
from ups_rm.tracking.group_log import GroupRecord, group_records
from ups_rm.tracking.token_text import token_ends
from ups_rm.types import Conversation, Score

OF_REPLY = {
    "length": "val-aux/response_length/mean",
    "repetition": "val-aux/repetition",
    "prompt_overlap": "val-aux/prompt_overlap",
}
"""What our reward manager says of a held-out reply, and the metric that is its mean."""
MODEL_PREFIX = "model_logit/"
"""Of the names under which each of several reward models' logits stands in `reward_extra_info`."""
FIELDS = (
    "uid", "prompts", "responses", "response_mask", "rm_scores", "token_level_rewards", "advantages", "old_log_probs",
    "ref_log_prob", "rollout_log_probs", "raw_prompt", "extra_info", "extra_fields",
)  # fmt: skip


@dataclass(frozen=True)
class StepRecord:
    """The B replies of one step, in the order in which verl trained on them.

    Attributes:
        keys: verl's names of the replies, as in its dumps.
        group_ids: which prompt each reply answers (B,).
        response_mask, token_level_scores, token_level_rewards, advantages: Shape (B, R).
        kl: estimate per token; None where there is no reference. Shape (B, R).
        sampled_logprobs: log pi at sampling; as recomputed where verl does not keep those; None where neither is there.
            Shape (B, R).
        logprob_gap: |log pi at sampling - log pi recomputed| per token; None where not sampled with. Shape (B, R).
        extras: what our reward manager said of each reply, by name.
        response_ids: the tokens that response_mask lets through, of each reply.
        categories: harm categories of each reply's prompt; empty where the rows do not carry them.
    """

    keys: list[str]
    group_ids: Tensor
    prompt_ids: list[int]
    kinds: list[str]
    messages: list[Conversation]
    texts: list[str]
    truncated: list[bool]
    prompt_lengths: Tensor
    response_mask: Tensor
    token_level_scores: Tensor
    token_level_rewards: Tensor
    advantages: Tensor
    kl: Tensor | None
    sampled_logprobs: Tensor | None
    logprob_gap: Tensor | None
    extras: list[dict[str, float]]
    response_ids: list[list[int]] = field(default_factory=list)
    categories: list[list[str]] = field(default_factory=list)

    @property
    def scores(self) -> list[Score]:
        return [score_of(extra) for extra in self.extras]


def score_of(extra: Mapping[str, float]) -> Score:
    """What the RM said of a reply, from what our reward manager noted of it."""
    return Score(
        logit=extra["logit"],
        safe_score=extra["safe_score"],
        tokens=int(extra["rm_tokens"]),
        truncated=bool(extra["rm_truncated"]),
        model_logits={
            name.removeprefix(MODEL_PREFIX): logit for name, logit in extra.items() if name.startswith(MODEL_PREFIX)
        },
        helpfulness=extra.get("helpfulness"),
    )


def read_step(
    rows: Any, keys: Sequence[str], tags: Sequence[Mapping[str, Any]], tokenizer: Any, *, limit: int, kl_estimator: str
) -> StepRecord:
    """The step's record from what `transfer_queue.kv_batch_get(..., select_fields=FIELDS)` gave.

    Args:
        rows: a TensorDict of B rows: ragged tensors, and objects.
        keys, tags: verl's, one per row.
        limit: `data.max_response_length`.
        kl_estimator: `algorithm.kl_penalty`.
    """
    keep = [i for i, tag in enumerate(tags) if not tag.get("is_padding", False)]
    objects = {
        name: [list(rows[name])[i] for i in keep] for name in ("uid", "raw_prompt", "extra_info", "extra_fields")
    }
    ragged = {name: rows[name].unbind() for name in FIELDS if name in rows.keys() and name not in objects}  # noqa: SIM118
    padded = {name: _padded([parts[i] for i in keep]) for name, parts in ragged.items()}
    responses = [ragged["responses"][i] for i in keep]
    ends = {tokenizer.eos_token_id}
    uids = {uid: number for number, uid in enumerate(dict.fromkeys(map(str, objects["uid"])))}
    mask = padded["response_mask"]
    kl = gap = None
    if "ref_log_prob" in padded and "old_log_probs" in padded:
        kl = kl_penalty(padded["old_log_probs"], padded["ref_log_prob"], kl_estimator) * mask
    if "rollout_log_probs" in padded and "old_log_probs" in padded:
        gap = (padded["old_log_probs"] - padded["rollout_log_probs"]).abs() * mask
    infos = [dict(info) for info in objects["extra_info"]]
    extras = [dict(fields["reward_extra_info"]) for fields in objects["extra_fields"]]
    return StepRecord(
        keys=[str(keys[i]) for i in keep],
        group_ids=torch.tensor([uids[str(uid)] for uid in objects["uid"]]),
        prompt_ids=[int(info.get("index", 0)) for info in infos],
        kinds=["benign" if extra["benign"] else "unsafe" for extra in extras],
        messages=[messages_of(turns, info) for turns, info in zip(objects["raw_prompt"], infos, strict=True)],
        texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in responses],
        truncated=[len(ids) >= limit and int(ids[-1]) not in ends for ids in responses],
        prompt_lengths=torch.tensor([len(ragged["prompts"][i]) for i in keep]),
        response_mask=mask,
        token_level_scores=padded["rm_scores"],
        token_level_rewards=padded.get("token_level_rewards", padded["rm_scores"]),
        advantages=padded["advantages"],
        kl=kl,
        sampled_logprobs=padded.get("rollout_log_probs", padded.get("old_log_probs")),
        logprob_gap=gap,
        extras=extras,
        categories=[_categories(info) for info in infos],
        response_ids=[ids[ragged["response_mask"][i].bool()].tolist() for i, ids in zip(keep, responses, strict=True)],
    )


def check_scores(record: StepRecord) -> None:
    """Whether verl put each reply's safe score on its last token, and 0 on all others (to 1e-6).

    Raises:
        RunError: it did not, so rewards are not what they are said to be.
    """
    safe_scores = torch.tensor([extra["safe_score"] for extra in record.extras])  # (B,)
    placed = place_on_last_token(safe_scores.to(record.token_level_scores.dtype), record.response_mask)
    wrong = ((placed - record.token_level_scores).abs() > 1e-6).any(1)
    if wrong.any():
        reply = int(wrong.nonzero()[0])
        raise RunError(
            f"{int(wrong.sum())} of {len(wrong)} replies do not carry their safe score on the last token alone: "
            f"{record.keys[reply]} has {record.token_level_scores[reply].tolist()}, expected {placed[reply].tolist()}\n"
            "  fix: no reward setting of verl's own beside reward_model (verl.overrides)"
        )


def step_metrics(
    record: StepRecord, *, max_prompt_length: int, max_response_length: int, transform: str = "sigmoid"
) -> dict[str, float]:
    """The metrics of docs/metrics.md that replies, scores and advantages give; verl logs its own ones over them."""
    benign = torch.tensor([kind == "benign" for kind in record.kinds])
    logits = torch.tensor([extra["logit"] for extra in record.extras])
    metrics = rollout_metrics(
        token_level_scores=record.token_level_scores,
        token_level_rewards=record.token_level_rewards,
        advantages=record.advantages,
        response_mask=record.response_mask,
        prompt_lengths=record.prompt_lengths,
        group_ids=record.group_ids,
        safe_score=torch.tensor([extra["safe_score"] for extra in record.extras]),
        logits=logits,
        score_range=score_range(transform),
        kl=record.kl,
        truncated=torch.tensor(record.truncated),
        rm_truncated=torch.tensor([extra["rm_truncated"] for extra in record.extras]),
        benign=benign,
        max_prompt_length=max_prompt_length,
        max_response_length=max_response_length,
    )
    metrics |= {"score/logit_mean": float(logits.mean()), "score/logit_std": float(logits.std(correction=0))}
    metrics |= model_metrics([score.model_logits for score in record.scores], record.group_ids)
    prompts = [messages[-1]["content"] for messages in record.messages]
    metrics |= text_metrics(record.texts, record.kinds, prompts)
    metrics["response/aborted_ratio"] = sum(not text.strip() for text in record.texts) / len(record.texts)
    if record.sampled_logprobs is not None:
        mask = record.response_mask
        metrics["rollout/entropy"] = -float((record.sampled_logprobs * mask).sum() / mask.sum().clamp(min=1))
    if record.logprob_gap is not None:
        metrics["rollout/logprob_gap_mean"] = float(record.logprob_gap.sum() / record.response_mask.sum().clamp(min=1))
        metrics["rollout/logprob_gap_max"] = float(record.logprob_gap.max())
    return metrics


def step_groups(record: StepRecord, tokenizer: Any = None, combined: Combined | None = None) -> list[GroupRecord]:
    """The step's groups for the group log, by prompt; replies stay in verl's order, so that sums round alike.

    `tokenizer` is the policy's: it says where each token's KL belongs in the text; without one that KL is not kept.
    `combined`: of the record's replies, in their order, where the objective has several components.
    """
    groups = group_records(
        group_ids=record.group_ids,
        prompt_ids=record.prompt_ids,
        messages=record.messages,
        responses=record.texts,
        scores=record.scores,
        token_level_rewards=record.token_level_rewards,
        advantages=record.advantages,
        response_mask=record.response_mask,
        kl=record.kl,
        truncated=record.truncated,
        kinds=record.kinds,
        categories=record.categories or None,
        token_ends=None if tokenizer is None else token_ends(tokenizer, record.response_ids, record.texts),
        combined=combined,
        flat=None if combined is None else combined.flat,
    )
    return sorted(groups, key=lambda group: group.prompt_id)


def validation_metrics(rewards: Sequence[float], extras: Mapping[str, Sequence[float]], n: int) -> dict[str, float]:
    """Held-out scores and refusals by kind of prompt, length and copied text, under the local engine's names."""
    score, benign = torch.tensor(rewards), torch.tensor(extras["benign"]).bool()
    refused = torch.tensor(extras["refusal"])
    metrics = {}
    for kind, rows in (("unsafe", ~benign), ("benign", benign)):
        if bool(rows.any()):
            metrics[f"val-aux/{kind}/reward/mean@{n}"] = float(score[rows].mean())
            metrics[f"val-aux/{kind}/refusal_rate"] = float(refused[rows].mean())
    metrics["val-aux/benign/prompts"] = float(benign.sum()) / n
    metrics["val-aux/refusal_rate"] = float(refused.mean())
    for name, metric in OF_REPLY.items():
        metrics[metric] = float(torch.tensor(extras[name]).mean())
    return metrics


def _categories(info: Mapping[str, Any]) -> list[str]:
    """Harm categories out of what `lay_out_prompts` kept of the prompt's row."""
    row = json.loads(info.get("row") or "{}")
    return [str(name) for name in row.get("categories") or ()]


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
