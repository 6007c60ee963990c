"""grpo/ against TRL 1.16's GRPOTrainer.

TRL's loss lives in the method `_compute_loss`; it is called here as it stands, on an object that has just the settings
it reads and that answers with our log-probabilities where the trainer would run its model. The advantages are inside
the rollout method: there a real GRPOTrainer with a tiny policy takes a step and what it computed is caught.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_batches import EDGE_CASES, Batch, batches
from tiny import tiny_policy
from ups_rm.grpo import aggregate, group_advantages, kl_penalty, place_on_last_token, policy_loss

pytestmark = pytest.mark.oracle
REASON = 'needs TRL: pip install "ups-rm[trl]"'
trl = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON, exc_type=ImportError)
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

MAX_LENGTH = 32
MODES = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
"""TRL's loss_type -> verl's loss_agg_mode. TRL's means over replies count empty ones too."""


def trl_loss(
    loss_type: str, batch: Batch, *, low: float, high: float, delta: float | None, beta: float
) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
    """Loss, gradient on the log-probabilities, and TRL's own metrics."""
    logprobs = batch.logprobs.clone().requires_grad_()
    entropies = torch.zeros_like(batch.logprobs)
    settings_of_trl = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropies, None),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_low=low,
        epsilon_high=high,
        importance_sampling_level="token",
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros_like(batch.mask)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs,
        "ref_per_token_logps": batch.ref_logprobs,
        "num_items_in_batch": batch.mask.sum(),
    }
    loss = trl.GRPOTrainer._compute_loss(settings_of_trl, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], settings_of_trl._metrics["train"]


def check(batch: Batch, loss_type: str, *, low: float, high: float, delta: float | None, beta: float) -> None:
    loss, gradient, metrics = trl_loss(loss_type, batch, low=low, high=high, delta=delta, beta=beta)
    logprobs = batch.logprobs.clone().requires_grad_()
    totals: dict[str, Any] = {"global_batch_size": len(batch.mask), "loss_scale_factor": MAX_LENGTH}
    mode = MODES[loss_type]
    ours = policy_loss(
        batch.old_logprobs,
        logprobs,
        batch.advantages,
        batch.mask,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e30 if delta is None else delta,
        loss_agg_mode=mode,
        **totals,
    )
    whole = ours.loss
    if beta:
        kl = kl_penalty(logprobs, batch.ref_logprobs, "low_var_kl")
        whole = whole + beta * aggregate(kl, batch.mask, mode, **totals)
    torch.testing.assert_close(whole.detach(), loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(whole, logprobs)[0], gradient, atol=1e-6, rtol=1e-6)
    # with delta TRL counts clipped tokens after capping the ratio, and one column it takes for one value per sequence
    if delta is None and batch.mask.shape[1] > 1:
        assert float(ours.clipfrac) == pytest.approx(metrics["clip_ratio/region_mean"][0], abs=1e-6)


@pytest.mark.parametrize("loss_type", MODES)
@given(
    batch=batches(),
    low=st.sampled_from([0.1, 0.2]),
    high=st.sampled_from([0.2, 0.28]),
    delta=st.sampled_from([None, 1.5, 4.0]),
    beta=st.sampled_from([0.0, 0.04]),
)
@patient
def test_loss_and_gradient_equal_trl(
    loss_type: str, batch: Batch, low: float, high: float, delta: float | None, beta: float
) -> None:
    """TRL's `delta` caps the ratio from above for either sign; above 1 + high that is verl's dual clip."""
    assume(bool((batch.mask.sum(-1) > 0).any()))
    # near the reference, where verl's cap of the k3 estimate at 10, which TRL does not have, is not reached
    batch = replace(batch, ref_logprobs=batch.logprobs + 0.3 * (batch.ref_logprobs - batch.logprobs))
    check(batch, loss_type, low=low, high=high, delta=delta, beta=beta)


@pytest.mark.parametrize("loss_type", MODES)
@pytest.mark.parametrize("name", [name for name in EDGE_CASES if name != "far from the old policy"])
def test_loss_equals_trl_at_the_edges(loss_type: str, name: str) -> None:
    """Not "far from the old policy": verl, and so we, hold the log-ratio in [-20, 20], TRL does not."""
    check(EDGE_CASES[name], loss_type, low=0.2, high=0.28, delta=None, beta=0.04)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_equal_a_real_trainer(tmp_path: Path, scale: str) -> None:
    """One step of a real GRPOTrainer; it divides by std + 1e-4 where verl has 1e-6."""
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    folder = tiny_policy(tmp_path / "policy")
    caught: list[dict[str, Any]] = []
    rewards_seen: list[float] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        rewards_seen.extend(float(len(text) % 7) / 7 for text in completions)
        return rewards_seen[-len(completions) :]

    class Catching(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            caught.append(inputs)
            return super()._compute_loss(model, inputs)

    trainer = Catching(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["How do I bake bread?", "Tell me about the moon."]}),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            max_steps=1,
            scale_rewards=scale,
            beta=0.0,
            report_to=[],
            use_cpu=True,
            bf16=False,
            seed=1,
        ),
    )
    trainer.train()
    (inputs,) = caught
    mask = inputs["completion_mask"]
    theirs = inputs["advantages"]
    # TRL shuffles the batch after its advantages; the rewards were seen in the order before: match them as sets
    rewards = torch.tensor(rewards_seen)
    ours = group_advantages(
        place_on_last_token(rewards, torch.ones(8, 6)),
        torch.ones(8, 6),
        torch.arange(8) // 4,
        scale_by_std=scale == "group",
        eps=1e-4,
    )[:, 0]
    assert len(theirs) == len(mask) == 8
    assert len(set(rewards_seen)) > 1
    torch.testing.assert_close(ours.sort().values, theirs.sort().values, atol=1e-6, rtol=1e-6)
