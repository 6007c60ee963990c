"""The actor: log-probabilities of a rollout and the GRPO update.

Sequences are cut into micro batches of whole groups where they fit, each trimmed to its longest prompt and reply; a
micro batch's loss is scaled by the totals of its mini batch, so gradients (and with them the step) do not depend on how
it was cut. Gradients add up in fp32. Where a rollout is used for exactly one optimizer step, the old log-probabilities
are the training forward's own, detached: the ratio is exactly 1, whatever the compute dtype. If one micro batch holds
the batch too, `old_logprobs` keeps the graph and `update` goes on from it: the policy runs forward once per step, and
where the rollout has kept what it computed (`kept_forward`), only what is cheap of that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ups_rm.errors import NumberError
from ups_rm.grpo.kl import kl_penalty
from ups_rm.grpo.losses import aggregate, batch_totals, policy_loss
from ups_rm.local.kept_forward import KeptForward
from ups_rm.local.policy import Policy
from ups_rm.local.sequences import Sequences
from ups_rm.recipe import Actor as ActorSettings
from ups_rm.recipe import Optim, Recipe

WHOLE_FORWARD = 50


@torch.no_grad()
def response_logprobs(policy: Policy, sequences: Sequences, *, micro_batch_size: int, temperature: float) -> Tensor:
    """Log-probabilities of every response token under the policy's present weights, 0 at padding. Shape (B, R)."""
    out = torch.zeros(sequences.responses.shape, dtype=torch.float32, device=policy.device)
    everything = torch.arange(len(out), device=policy.device)
    for rows in sequences.micro_batches(everything, micro_batch_size):
        part = sequences.trimmed(rows)
        logprobs, _ = policy.response_logprobs(part, temperature)
        out[rows, : part.responses.shape[1]] = logprobs * part.response_mask
    return out


def on_policy(recipe: Recipe, batch_prompts: int) -> bool:
    """The rollout serves exactly one optimizer step, so its old log-probabilities are the training forward's."""
    actor = recipe.actor_rollout_ref.actor
    return actor.ppo_epochs == 1 and batch_prompts <= actor.ppo_mini_batch_size


def runs_once(recipe: Recipe, batch_prompts: int) -> bool:
    """One micro batch of one optimizer step takes the whole rollout: the policy runs forward once."""
    actor, replies = recipe.actor_rollout_ref.actor, batch_prompts * recipe.actor_rollout_ref.rollout.n
    whole = replies <= actor.ppo_micro_batch_size_per_gpu
    return on_policy(recipe, batch_prompts) and whole and actor.entropy_coeff == 0


def goes_on_from_rollout(recipe: Recipe, batch_prompts: int, step: int) -> bool:
    """The training forward of this step takes over what decoding computed, where that can be kept.

    The first of `WHOLE_FORWARD` steps computes it whole: there `rollout/logprob_gap_*` says how far decoding is off,
    and policy and reference, computed alike, are seen to begin as one.
    """
    return runs_once(recipe, batch_prompts) and step % WHOLE_FORWARD != 1


class Actor:
    """The policy with its optimizer and schedule."""

    def __init__(self, policy: Policy, recipe: Recipe, total_steps: int) -> None:
        self.policy, self.recipe = policy, recipe
        names = {id(parameter): name for name, parameter in policy.model.named_parameters()}
        self.names = [names[id(parameter)] for parameter, _ in policy.masters]
        self.settings: ActorSettings = recipe.actor_rollout_ref.actor
        self.temperature = recipe.actor_rollout_ref.rollout.temperature
        self.n = recipe.actor_rollout_ref.rollout.n
        self.max_response_length = recipe.data.max_response_length
        optim = self.settings.optim
        self.optimizer = torch.optim.AdamW(
            [master for _, master in policy.masters],
            lr=optim.lr,
            fused=True,
            betas=(optim.betas[0], optim.betas[1]),
            weight_decay=optim.weight_decay,
        )
        self._hold_moments()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, optim, total_steps)
        )

    def _hold_moments(self) -> None:
        """Take the memory of AdamW's moments now. At the first step it would come out of the middle of what the first
        forward has just freed, and the second would no longer fit there: a fifth more at the peak."""
        groups = self.optimizer.state_dict()["param_groups"]
        masters = [master for _, master in self.policy.masters]
        state = {
            i: {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }
            for i, master in enumerate(masters)
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def old_logprobs(self, sequences: Sequences, kept: KeptForward | None = None) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities before the update (B, R); the second time with their graph, where `update` can use it.

        Args:
            kept: of the rollout of these sequences; only where the policy `runs_once`.
        """
        if not runs_once(self.recipe, len(sequences) // self.n):
            size = self.settings.ppo_micro_batch_size_per_gpu
            return response_logprobs(self.policy, sequences, micro_batch_size=size, temperature=self.temperature), None
        rows = torch.arange(len(sequences), device=self.policy.device)
        if kept is None:  # as `_step` orders them: no bit differs from a forward of the update's own
            (rows,) = sequences.micro_batches(rows, len(rows))
        part = sequences.trimmed(rows)
        logprobs, _ = self.policy.response_logprobs(part, self.temperature, kept=kept)
        out = torch.zeros(sequences.responses.shape, dtype=torch.float32, device=self.policy.device)
        out[rows, : part.responses.shape[1]] = logprobs * part.response_mask
        return out.detach(), out

    def update(
        self,
        sequences: Sequences,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        *,
        step: int,
        forward: Tensor | None = None,
    ) -> dict[str, float]:
        """`ppo_epochs` passes over the batch, one optimizer step per mini batch.

        Args:
            sequences: B rows, rows of one prompt side by side.
            advantages: Shape (B, R).
            old_logprobs: at sampling time (B, R); None where the batch is `on_policy`.
            ref_logprobs: frozen reference (B, R); needed for the KL loss only.
            forward: the second result of `old_logprobs` (B, R): the backward starts there, no forward runs.

        Returns:
            verl's `actor/*` metrics, means over the optimizer steps.

        Raises:
            NumberError: the loss or a gradient is not finite; that optimizer step and the rest are left out.
        """
        settings, device = self.settings, self.policy.device
        rows_per_mini = settings.ppo_mini_batch_size * self.n
        totals: dict[str, float] = {}
        count = 0
        for epoch in range(settings.ppo_epochs):
            order = torch.arange(len(advantages), device=device)
            if settings.shuffle:
                seed = settings.data_loader_seed + 1000 * step + epoch
                order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).to(device)]
            for mini in order.split(rows_per_mini):
                for name, value in self._step(sequences, advantages, old_logprobs, ref_logprobs, mini, forward).items():
                    totals[name] = totals.get(name, 0.0) + value
                count += 1
        self.scheduler.step()  # once per rollout, as in verl: warm-up counts steps of the trainer
        return {name: value / count for name, value in totals.items()}

    def left_out(self, step: int) -> dict[str, float]:
        """No update in this step: the schedule goes on, nothing else moves. The metrics of an update that is not."""
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.zero_grad(set_to_none=True)
        while self.scheduler.last_epoch < step:
            self.scheduler.step()
        return {"actor/loss": 0.0, "actor/pg_loss": 0.0, "actor/grad_norm": 0.0, "actor/lr": lr}

    def _step(
        self,
        sequences: Sequences,
        advantages: Tensor,
        old: Tensor | None,
        ref: Tensor | None,
        mini: Tensor,
        forward: Tensor | None,
    ) -> dict[str, float]:
        whole = batch_totals(sequences.response_mask[mini])
        sums: dict[str, float] = {}
        for rows in sequences.micro_batches(mini, self.settings.ppo_micro_batch_size_per_gpu):
            loss, parts = self._micro_loss(sequences, advantages, old, ref, rows, dict(whole), forward)
            if not math.isfinite(parts["actor/loss"]):
                self.optimizer.zero_grad(set_to_none=True)
                raise NumberError("the loss", sorted(rows.tolist()))
            loss.backward()
            self._collect_gradients()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
        masters = [master for _, master in self.policy.masters]
        grad_norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        lr = self.scheduler.get_last_lr()[0]
        if not torch.isfinite(grad_norm):
            named = zip(self.names, masters, strict=True)
            broken = [name for name, m in named if m.grad is not None and not bool(m.grad.isfinite().all())]
            self.optimizer.zero_grad(set_to_none=True)
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise NumberError(f"the gradient of {broken[0]}{more}" if broken else "the gradient's norm")
        torch.nn.utils.clip_grads_with_norm_(masters, self.settings.grad_clip, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._write_back()
        return sums | {"actor/grad_norm": float(grad_norm), "actor/lr": float(lr)}

    def _micro_loss(
        self,
        sequences: Sequences,
        advantages: Tensor,
        old: Tensor | None,
        ref: Tensor | None,
        rows: Tensor,
        whole: Any,
        forward: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        part = sequences.trimmed(rows)
        mask, length = part.response_mask, part.responses.shape[1]
        if forward is None:
            logprobs, entropy = self.policy.response_logprobs(part, self.temperature, settings.entropy_coeff != 0)
        else:
            logprobs, entropy = forward[rows, :length], None
        aggregation: dict[str, Any] = {
            **whole,
            "loss_scale_factor": settings.loss_scale_factor or self.max_response_length,
        }
        result = policy_loss(
            logprobs.detach() if old is None else old[rows, :length],
            logprobs,
            advantages[rows, :length],
            mask,
            loss_mode=settings.policy_loss.loss_mode,
            clip_ratio_low=settings.clip_ratio_low,
            clip_ratio_high=settings.clip_ratio_high,
            clip_ratio_c=settings.clip_ratio_c,
            loss_agg_mode=settings.loss_agg_mode,
            **aggregation,
        )
        weight = float(result.num_tokens) / whole["batch_num_tokens"]
        parts = {
            "actor/pg_loss": float(result.loss.detach()),
            "actor/pg_clipfrac": float(result.clipfrac) * weight,
            "actor/ppo_kl": float(result.ppo_kl) * weight,
            "actor/pg_clipfrac_lower": float(result.clipfrac_lower) * weight,
        }
        loss = result.loss
        if entropy is not None:
            entropy_mean = aggregate(entropy, mask, settings.loss_agg_mode, **aggregation)
            loss = loss - settings.entropy_coeff * entropy_mean
            parts["actor/entropy"] = float(entropy_mean.detach())
        if settings.use_kl_loss:
            assert ref is not None
            divergence = kl_penalty(logprobs, ref[rows, :length], settings.kl_loss_type)
            kl_loss = aggregate(divergence, mask, settings.loss_agg_mode, **aggregation)
            loss = loss + settings.kl_loss_coef * kl_loss
            parts["actor/kl_loss"] = float(kl_loss.detach())
        parts["actor/loss"] = float(loss.detach())
        return loss, parts

    def _collect_gradients(self) -> None:
        """Add this micro batch's gradients to the fp32 masters'."""
        for parameter, master in self.policy.masters:
            if parameter is master or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def _write_back(self) -> None:
        for parameter, master in self.policy.masters:
            if parameter is not master:
                parameter.copy_(master)


def lr_factor(step: int, optim: Optim, total_steps: int) -> float:
    """Share of `optim.lr` at step `step` (0-based) of the trainer: linear warm-up, then constant or cosine.

    With `zero_indexed_step` (verl's default) the first of w warm-up steps has factor 0, otherwise 1 / w; verl heeds it
    for cosine only. Source: checked against verl's schedules.
    """
    warmup = optim.lr_warmup_steps if optim.lr_warmup_steps > 0 else int(optim.lr_warmup_steps_ratio * total_steps)
    step = step if optim.zero_indexed_step else step + 1
    if step < warmup:
        return step / warmup
    if optim.lr_scheduler_type == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * 2.0 * optim.num_cycles * min(1.0, progress)))
    return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * cosine
