"""The group log: what the policy said, group by group, with every number that led to its advantage.

One file per logged step, `step_000010.jsonl`, written to a temporary name and renamed. Line 1 is a header, every
further line one group (the replies to one prompt). `docs/metrics.md` has the schema. All numbers are the float32 values
that the training used, written exactly, so that `GroupLogFile.recompute_advantages` gives the logged advantages bit for
bit; for grpo and rloo also where the file keeps only some of a group's replies: mean and std over *all* its replies
stand beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ups_rm.console import finite
from ups_rm.durable import check_file, remove_file, sweep, write_text
from ups_rm.errors import DataError
from ups_rm.types import Message, Score

if TYPE_CHECKING:
    from torch import Tensor

    from ups_rm.grpo import Combined

SCHEMA = "ups-rm group log 1"


@dataclass(frozen=True)
class SampleRecord:
    """One reply. `kl` is summed over its tokens (nats), so reward = safe_score - kl_coef * kl when KL is in the reward;
    an empty reply has no token to be rewarded on: reward 0, advantage 0. `truncated`: cut by the length limit.
    `dropped`: left out of the group, for want of a score of its own or of others; its numbers are nan, advantage 0.
    `model_logits`: unsafety logit of each reward model by name, where there are several or one is normalised.
    `helpfulness`: helpfulness logit, higher = more helpful; None where no model judged it, and in older logs.
    `token_kl`: KL of each token (nats, three digits), and `token_ends` where it ends in `response` (characters); empty
    where they were not logged. For an objective of several components: `components` and `component_advantages` by name,
    before `charge` (KL, length) is taken off, and `reward` is their weighted mean after that."""

    response: str
    logit: float
    safe_score: float
    reward: float
    advantage: float
    kl: float
    length: int
    truncated: bool
    model_logits: Mapping[str, float] = field(default_factory=dict)
    helpfulness: float | None = None
    token_kl: list[float] = field(default_factory=list)
    token_ends: list[int] = field(default_factory=list)
    dropped: bool = False
    components: Mapping[str, float] = field(default_factory=dict)
    component_advantages: Mapping[str, float] = field(default_factory=dict)
    charge: float = 0.0


@dataclass(frozen=True)
class GroupRecord:
    """All replies to one prompt. `n`, `reward_mean` and `reward_std` describe the whole group, also after cutting;
    `GroupLog.write` fills them in. For a group of one they are 0 and 1, the values that GRPO uses then. Dropped replies
    are not counted. `flat`: its scores are equal, so all its advantages are 0 (`algorithm.zero_std_groups`). `weights`:
    of the components, by name. `categories`: the prompt's harm categories, as far as its file names them."""

    prompt_id: str | int
    messages: list[Message]
    samples: list[SampleRecord]
    kind: str | None = None
    n: int = 0
    reward_mean: float = math.nan
    reward_std: float = math.nan
    flat: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    categories: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GroupLogFile:
    """What `read_group_log` gives: the header's fields and the groups."""

    step: int
    groups: list[GroupRecord]
    groups_total: int
    adv_estimator: str = "grpo"
    scale_by_std: bool = True
    eps: float = 1e-6
    kl_coef: float = 0.0
    normalize_components: str = "before"
    tolerance: float = 0.0

    def recompute_advantages(self) -> list[list[float]]:
        """Advantages of every group's logged replies from their rewards: equal to the log, bit for bit.

        grpo and rloo need the group's mean and std alone, which stand in the file; opo and grpo_passk every reply, and
        so do several components.

        Raises:
            DataError: a group is cut (`group_log_max_samples_per_group`) or the estimator looks beyond the group.
        """
        if any(group.weights for group in self.groups):
            return [self._from_components(group) for group in self.groups]
        if self.adv_estimator in ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized"):
            return [self._from_statistics(group) for group in self.groups]
        if self.adv_estimator in ("opo", "grpo_passk"):
            return [self._from_replies(group) for group in self.groups]
        raise DataError(
            f'step {self.step}: advantages of "{self.adv_estimator}" can\'t be recomputed: '
            "they depend on the whole batch"
        )

    def _from_statistics(self, group: GroupRecord) -> list[float]:
        import torch

        dropped = [sample.dropped or group.flat for sample in group.samples]
        rewards = torch.tensor([0.0 if s.dropped else s.reward for s in group.samples], dtype=torch.float32)
        filled = torch.tensor([s.length > 0 and not out for s, out in zip(group.samples, dropped, strict=True)])
        advantages = rewards - torch.tensor(group.reward_mean, dtype=torch.float32)
        if self.adv_estimator.startswith("grpo") and self.scale_by_std:
            advantages = advantages / (torch.tensor(group.reward_std, dtype=torch.float32) + self.eps)
        elif self.adv_estimator.startswith("rloo") and group.n > 1:
            advantages = advantages * group.n / (group.n - 1)
        elif self.adv_estimator == "rloo_vectorized":
            advantages = torch.zeros_like(advantages)
        return (advantages * filled).tolist()

    def _from_replies(self, group: GroupRecord) -> list[float]:
        import torch

        from ups_rm.grpo import estimate_advantages

        kept = self._all_replies(group, self.adv_estimator)
        advantages = [0.0] * len(group.samples)
        if group.flat or not kept:
            return advantages
        lengths = torch.tensor([group.samples[i].length for i in kept])
        mask = (torch.arange(max(1, int(lengths.max()))) < lengths[:, None]).float()  # (n, R)
        rewards = torch.zeros_like(mask)
        rewards[:, 0] = torch.tensor([group.samples[i].reward for i in kept])
        ids = torch.zeros_like(lengths)
        found = estimate_advantages(self.adv_estimator, rewards, mask, ids, scale_by_std=self.scale_by_std)
        for i, advantage in zip(kept, found[:, 0].tolist(), strict=True):
            advantages[i] = advantage
        return advantages

    def _from_components(self, group: GroupRecord) -> list[float]:
        import torch

        from ups_rm.grpo import Component, combine

        kept = self._all_replies(group, "an objective of several components")
        advantages = [0.0] * len(group.samples)
        if group.flat or not kept:
            return advantages
        samples = [group.samples[i] for i in kept]
        lengths = torch.tensor([sample.length for sample in samples])
        mask = (torch.arange(max(1, int(lengths.max()))) < lengths[:, None]).float()  # (n, R)
        combined = combine(
            {
                name: Component(
                    torch.tensor([sample.components[name] for sample in samples]), torch.full((len(kept),), weight)
                )
                for name, weight in group.weights.items()
            },
            torch.tensor([sample.charge for sample in samples]),
            mask,
            torch.zeros_like(lengths),
            order=self.normalize_components,
            estimator=self.adv_estimator,
            scale_by_std=self.scale_by_std,
            tolerance=self.tolerance,
        )
        for i, advantage in zip(kept, combined.advantages[:, 0].tolist(), strict=True):
            advantages[i] = advantage
        return advantages

    def _all_replies(self, group: GroupRecord, why: str) -> list[int]:
        """Numbers of the replies that count; all of them must be in the file."""
        kept = [i for i, sample in enumerate(group.samples) if not sample.dropped]
        if len(kept) < group.n:
            raise DataError(
                f"step {self.step}: {why} needs all {group.n} replies of a group, {len(group.samples)} "
                f"of {group.prompt_id} are in the file\n  fix: trainer.group_log_max_samples_per_group=-1"
            )
        return kept


@dataclass
class GroupLog:
    """Writes the group log of a run.

    Args:
        folder: `trainer.group_log_dir`.
        freq: log every so many steps; 0 or less: never.
        max_groups: groups per file, the first ones of the batch; None, 0 or less: all.
        max_samples_per_group: replies per group, the first ones; None, 0 or less: all.
        adv_estimator, scale_by_std, eps, kl_coef: how the advantages were made; stand in the header.
        normalize_components, tolerance: the same, for an objective of several components.
    """

    folder: Path
    freq: int = 1
    max_groups: int | None = None
    max_samples_per_group: int | None = None
    adv_estimator: str = "grpo"
    scale_by_std: bool = True
    eps: float = 1e-6
    kl_coef: float = 0.0
    normalize_components: str = "before"
    tolerance: float = 0.0
    _pattern: str = field(default="step_*.jsonl", init=False, repr=False)

    def wants(self, step: int) -> bool:
        """Whether `write` would write this step, so that the records need not be built for nothing."""
        return self.freq > 0 and step % self.freq == 0

    def write(self, step: int, groups: Sequence[GroupRecord], *, kl_coef: float | None = None) -> Path | None:
        """Write the step's file and return its path, or None where the step is not to be logged.

        `groups` are whole: cutting them down is done here, after their mean and std are known. `kl_coef` overrides the
        header's where the coefficient changes from step to step.
        """
        if not self.wants(step):
            return None
        kept = [
            _cut(_with_statistics(group), self.max_samples_per_group) for group in groups[: _limit(self.max_groups)]
        ]
        header = {
            "schema": SCHEMA,
            "step": step,
            "groups_total": len(groups),
            "adv_estimator": self.adv_estimator,
            "scale_by_std": self.scale_by_std,
            "eps": self.eps,
            "kl_coef": self.kl_coef if kl_coef is None else kl_coef,
            "normalize_components": self.normalize_components,
            "tolerance": self.tolerance,
        }
        file = Path(self.folder) / f"step_{step:06d}.jsonl"
        lines = [json.dumps(finite(row), ensure_ascii=False) for row in (header, *map(asdict, kept))]
        write_text(file, "\n".join(lines) + "\n", manifest=True)
        return file

    def drop_after(self, step: int) -> None:
        """Remove the files of later steps and what a kill left half: training goes on from `step`, writes them anew."""
        sweep(Path(self.folder))
        for file in sorted(Path(self.folder).glob(self._pattern)):
            if int(file.stem.removeprefix("step_")) > step:
                remove_file(file)


def read_group_log(file: Path) -> GroupLogFile:
    """Read one step's file.

    Raises:
        DataError: other bytes than were written, not a group log, another schema, or a field that is missing, with
            file and line.
    """
    check_file(Path(file), DataError, "remove it to read the others: it can't be made again")
    lines = Path(file).read_text(encoding="utf-8").split("\n")[:-1]
    line_number = 1
    try:
        header = json.loads(lines[0])
        if header.pop("schema") != SCHEMA:
            raise DataError(f'{file}:1: field "schema" is not "{SCHEMA}": written by another version')
        groups = []
        for line in lines[1:]:
            line_number += 1
            row = _with_nan(json.loads(line))
            samples = [SampleRecord(**_with_nan(sample)) for sample in row.pop("samples")]
            groups.append(GroupRecord(samples=samples, **row))
        return GroupLogFile(groups=groups, **header)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{file}:{line_number}: not a group log ({error})") from error


def group_records(
    *,
    group_ids: Tensor,
    prompt_ids: Sequence[str | int],
    messages: Sequence[list[Message]],
    responses: Sequence[str],
    scores: Sequence[Score],
    token_level_rewards: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    kl: Tensor | None = None,
    truncated: Sequence[bool] | Tensor | None = None,
    kinds: Sequence[str] | None = None,
    categories: Sequence[Sequence[str]] | None = None,
    token_ends: Sequence[list[int]] | None = None,
    dropped: Tensor | None = None,
    flat: Tensor | None = None,
    combined: Combined | None = None,
) -> list[GroupRecord]:
    """Collect the batch's replies into groups, in the order in which the groups first appear.

    Args:
        group_ids: Shape (B,).
        prompt_ids, messages, responses, scores, truncated, kinds, categories: one per sequence, B long.
        token_ends: of each sequence (`token_text.token_ends`); with them and a `kl` the KL of every token is kept.
        token_level_rewards, advantages, response_mask, kl: Shape (B, R).
        dropped: the reply is not counted in its group. flat: its group's scores are equal. Shape (B,), bool.
        combined: of the replies that are not dropped, in their order, where the reward has several components.
    """
    lengths = response_mask.bool().sum(-1)
    rewards = token_level_rewards.detach().float().sum(-1)
    # one value per sequence, repeated over its tokens: the first token's (an empty row is all 0)
    first = response_mask.bool().long().argmax(-1, keepdim=True)
    per_sequence = advantages.detach().float().gather(-1, first).squeeze(-1)
    kls = rewards.new_zeros(len(rewards)) if kl is None else (kl.detach().float() * response_mask).sum(-1)
    token_kl: list[list[float]] = []
    if kl is not None and token_ends is not None and bool(kl.any()):  # all 0: there is no reference
        by_token = kl.detach().float().cpu()
        masks = response_mask.bool().cpu()
        token_kl = [[float(f"{k:.3g}") for k in row[mask].tolist()] for row, mask in zip(by_token, masks, strict=True)]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(group_ids.tolist()):
        members.setdefault(int(group), []).append(i)

    out = [False] * len(lengths) if dropped is None else dropped.tolist()
    several = _component_fields(combined, out)
    if combined is not None:  # a reply without a token has a reward too: the others are compared with it
        for i, row in several.items():
            rewards[i] = row["reward"]

    def sample(i: int) -> SampleRecord:
        return SampleRecord(
            response=responses[i],
            logit=float(scores[i].logit),
            safe_score=float(scores[i].safe_score),
            reward=math.nan if out[i] else float(rewards[i]),
            advantage=float(per_sequence[i]),
            kl=float(kls[i]),
            length=int(lengths[i]),
            truncated=bool(truncated[i]) if truncated is not None else False,
            dropped=bool(out[i]),
            model_logits=dict(scores[i].model_logits),
            helpfulness=scores[i].helpfulness,
            token_kl=token_kl[i] if token_kl else [],
            token_ends=token_ends[i] if token_kl and token_ends else [],
            components=several[i]["components"] if i in several else {},
            component_advantages=several[i]["component_advantages"] if i in several else {},
            charge=several[i]["charge"] if i in several else 0.0,
        )

    return [
        GroupRecord(
            prompt_id=prompt_ids[rows[0]],
            messages=list(messages[rows[0]]),
            samples=[sample(i) for i in rows],
            kind=kinds[rows[0]] if kinds is not None else None,
            flat=bool(flat[rows[0]]) if flat is not None else False,
            weights=next((several[i]["weights"] for i in rows if i in several), {}),
            categories=list(categories[rows[0]]) if categories is not None else [],
        )
        for rows in members.values()
    ]


def _component_fields(combined: Combined | None, dropped: Sequence[bool]) -> dict[int, dict[str, Any]]:
    """By number of the reply: its components, their advantages and weights, its charge and its reward."""
    if combined is None:
        return {}
    rewards, charge = combined.rewards.tolist(), combined.charge.tolist()
    of_name = {name: (one.reward.tolist(), one.weight.tolist()) for name, one in combined.components.items()}
    parts = {name: values.tolist() for name, values in combined.parts.items()}
    rows = [i for i, out in enumerate(dropped) if not out]
    return {
        i: {
            "components": {name: values[k] for name, (values, _) in of_name.items()},
            "weights": {name: weights[k] for name, (_, weights) in of_name.items()},
            "component_advantages": {name: values[k] for name, values in parts.items()},
            "charge": charge[k],
            "reward": rewards[k],
        }
        for k, i in enumerate(rows)
    }


def _with_statistics(group: GroupRecord) -> GroupRecord:
    """Mean and unbiased std of the group's rewards in float32, computed as `grpo.group_advantages` does."""
    import torch

    rewards = torch.tensor([sample.reward for sample in group.samples if not sample.dropped], dtype=torch.float32)
    several = len(rewards) > 1
    return replace(
        group,
        n=len(rewards),
        reward_mean=float(rewards.mean()) if several else 0.0,
        reward_std=float(rewards.std()) if several else 1.0,
    )


def _cut(group: GroupRecord, max_samples: int | None) -> GroupRecord:
    return GroupRecord(**{**vars(group), "samples": group.samples[: _limit(max_samples)]})


def _limit(maximum: int | None) -> int | None:
    return None if maximum is None or maximum <= 0 else maximum


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: math.nan if inner is None and key not in ("kind", "helpfulness") else inner for key, inner in row.items()
    }
