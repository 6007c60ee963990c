"""grpo/ against verl 0.9.1's own functions, on drawn batches and on the edge cases."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_batches import EDGE_CASES, Batch, batches
from ups_rm.grpo import (
    ADVANTAGES,
    KL_ESTIMATORS,
    LOSS_AGG_MODES,
    TOKEN_LOSSES,
    AdaptiveKL,
    Component,
    aggregate,
    batch_totals,
    combine,
    group_advantages,
    kl_penalty,
    overlong_penalty,
    penalize,
    policy_loss,
    rollout_metrics,
    throughput_metrics,
    timing_metrics,
)

pytestmark = pytest.mark.oracle
REASON = 'needs verl 0.9.1: pip install "ups-rm[verl]"'
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=REASON, exc_type=ImportError)
metric_utils = pytest.importorskip("verl.trainer.ppo.metric_utils", reason=REASON, exc_type=ImportError)

edge_cases = pytest.mark.parametrize("batch", EDGE_CASES.values(), ids=EDGE_CASES.keys())
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def close(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, check_dtype=False)


# ---- advantages


def verl_advantages(name: str, batch: Batch, scale_by_std: bool = True) -> Tensor:
    function = core_algos.get_adv_estimator_fn(name)
    arguments: dict[str, Any] = {
        "token_level_rewards": batch.token_level_rewards.clone(),
        "response_mask": batch.mask,
        "index": batch.group_ids.numpy(),
        "config": SimpleNamespace(gamma=1.0, get=lambda key, default=None: scale_by_std),
    }
    if name in ("grpo", "grpo_vectorized"):
        arguments["norm_adv_by_std_in_grpo"] = scale_by_std
    return function(**arguments)[0]


@given(batches(), st.booleans())
@patient
def test_group_advantages_equal_verl(batch: Batch, scale_by_std: bool) -> None:
    ours = group_advantages(batch.token_level_rewards, batch.mask, batch.group_ids, scale_by_std=scale_by_std)
    close(ours, verl_advantages("grpo", batch, scale_by_std))


@given(batches(), st.booleans())
@patient
def test_group_advantages_equal_verl_in_float32(batch: Batch, scale_by_std: bool) -> None:
    """In the training's own precision, where groups of near-equal rewards amplify rounding: same operations."""
    batch = batch.to(torch.float32)
    ours = group_advantages(batch.token_level_rewards, batch.mask, batch.group_ids, scale_by_std=scale_by_std)
    close(ours, verl_advantages("grpo", batch, scale_by_std))


@edge_cases
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_group_advantages_equal_verl_at_the_edges(batch: Batch, scale_by_std: bool) -> None:
    ours = group_advantages(batch.token_level_rewards, batch.mask, batch.group_ids, scale_by_std=scale_by_std)
    close(ours, verl_advantages("grpo", batch, scale_by_std))


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name not in ("grpo", "grpo_vectorized")])
@given(data=st.data())
@patient
def test_other_estimators_equal_verl(name: str, data: st.DataObject) -> None:
    batch = data.draw(batches(min_group=2 if name == "grpo_passk" else 1))
    if name == "opo":  # verl divides 0 by 0 for a group of empty replies; ours is 0, see the next test
        for group in batch.group_ids.unique():
            assume(int(batch.mask[batch.group_ids == group].sum()) > 0)
    if name.startswith("reinforce"):  # verl divides by 0 without tokens and raises with just one
        assume(int(batch.mask.sum()) > 1)
    ours = ADVANTAGES[name](batch.token_level_rewards, batch.mask, batch.group_ids)
    close(ours, verl_advantages(name, batch) * batch.mask)


def test_where_verl_has_nan_ours_is_zero() -> None:
    batch = EDGE_CASES["padded rows"]
    assert verl_advantages("opo", batch).isnan().any()
    ours = ADVANTAGES["opo"](batch.token_level_rewards, batch.mask, batch.group_ids)
    assert ours[:2].eq(0).all()
    assert ours.isfinite().all()


@given(batches(), st.booleans())
@patient
def test_the_vectorized_name_is_the_same_estimator(batch: Batch, scale_by_std: bool) -> None:
    """verl's vectorised form is float32: rounding of 6e-8 over a std that is kept above 0.01 here is under 1e-5."""
    rewards = batch.token_level_rewards.sum(-1)
    for group in batch.group_ids.unique():
        members = rewards[batch.group_ids == group]
        assume(len(members) == 1 or float(members.std()) > 0.01)
    ours = ADVANTAGES["grpo_vectorized"](
        batch.token_level_rewards, batch.mask, batch.group_ids, scale_by_std=scale_by_std
    )
    close(ours, verl_advantages("grpo_vectorized", batch, scale_by_std).double(), tolerance=1e-5)


# ---- KL


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@given(batch=batches(), spread=st.sampled_from([0.0, 1.0, 50.0]))
@patient
def test_kl_and_its_gradient_equal_verl(estimator: str, batch: Batch, spread: float) -> None:
    def run(function: Any) -> tuple[Tensor, Tensor]:
        logprobs = (batch.ref_logprobs + spread * (batch.logprobs - batch.ref_logprobs)).requires_grad_()
        value = function(logprobs, batch.ref_logprobs, estimator)
        return value.detach(), torch.autograd.grad(value.sum(), logprobs)[0]

    for ours, theirs in zip(run(kl_penalty), run(core_algos.kl_penalty), strict=True):
        close(ours, theirs)


def test_full_kl_is_refused_as_in_verl() -> None:
    zeros = torch.zeros(1, 1)
    for function, error in ((kl_penalty, ValueError), (core_algos.kl_penalty, NotImplementedError)):
        with pytest.raises(error):
            function(zeros, zeros, "full")


@edge_cases
@pytest.mark.parametrize("estimator", ["kl", "low_var_kl"])
def test_penalized_rewards_equal_verl(batch: Batch, estimator: str) -> None:
    ray_trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer", reason=REASON, exc_type=ImportError)
    control = core_algos.FixedKLController(0.05)
    theirs, metrics = ray_trainer.apply_kl_penalty(data_proto(batch), kl_ctrl=control, kl_penalty=estimator)
    kl = kl_penalty(batch.old_logprobs, batch.ref_logprobs, estimator)
    close(penalize(batch.token_level_scores, kl, batch.mask, 0.05), theirs.batch["token_level_rewards"])
    assert our_metrics(batch, kl=kl)["actor/reward_kl_penalty"] == pytest.approx(
        metrics["actor/reward_kl_penalty"], abs=1e-6
    )


@given(st.lists(st.floats(-0.5, 5.0), min_size=1, max_size=20), st.floats(0.01, 1.0), st.integers(1, 512))
def test_adaptive_kl_equals_verl(kls: list[float], target: float, n: int) -> None:
    ours = AdaptiveKL(value=0.1, target=target, horizon=10_000)
    theirs = core_algos.AdaptiveKLController(0.1, target, 10_000)
    for kl in kls:
        ours.update(kl, n)
        theirs.update(kl, n)
        assert ours.value == pytest.approx(theirs.value, rel=1e-9)


# ---- loss

clips = st.fixed_dictionaries(
    {
        "clip_ratio_low": st.sampled_from([0.0, 0.1, 0.2, 0.9]),
        "clip_ratio_high": st.sampled_from([0.0, 0.2, 0.28, 2.0]),
        "clip_ratio_c": st.sampled_from([1.01, 1.5, 3.0, 20.0]),
    }
)


def verl_config(mode: str, clip: dict[str, float], **totals: Any) -> Any:
    config = pytest.importorskip("verl.workers.config", reason=REASON, exc_type=ImportError).FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, **clip
    )
    config.global_batch_info.update(totals)
    return config


def check_policy_loss(batch: Batch, mode: str, clip: dict[str, float], **totals: Any) -> None:
    ours_logprobs = batch.logprobs.clone().requires_grad_()
    ours = policy_loss(
        batch.old_logprobs, ours_logprobs, batch.advantages, batch.mask, loss_agg_mode=mode, **clip, **totals
    )
    theirs_logprobs = batch.logprobs.clone().requires_grad_()
    loss, metrics = core_algos.compute_policy_loss_vanilla(
        batch.old_logprobs,
        theirs_logprobs,
        batch.advantages,
        batch.mask,
        loss_agg_mode=mode,
        config=verl_config(mode, clip, **totals),
    )
    close(ours.loss, loss)
    close(torch.autograd.grad(ours.loss, ours_logprobs)[0], torch.autograd.grad(loss, theirs_logprobs)[0])
    for value, name in (
        (ours.clipfrac, "pg_clipfrac"),
        (ours.ppo_kl, "ppo_kl"),
        (ours.clipfrac_lower, "pg_clipfrac_lower"),
    ):
        assert float(value) == pytest.approx(metrics[f"actor/{name}"], abs=1e-6)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@given(batch=batches(), clip=clips)
@patient
def test_policy_loss_equals_verl(mode: str, batch: Batch, clip: dict[str, float]) -> None:
    assume(int(batch.mask.sum()) > 0)  # verl divides by 0 without tokens
    check_policy_loss(batch, mode, clip)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@edge_cases
def test_policy_loss_equals_verl_at_the_edges(mode: str, batch: Batch) -> None:
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
    check_policy_loss(batch, mode, clip)
    check_policy_loss(batch, mode, clip, batch_num_tokens=50, global_batch_size=12, loss_scale_factor=32)


def test_both_refuse_a_dual_clip_below_one() -> None:
    batch = EDGE_CASES["one reply in all"]
    tensors = (batch.old_logprobs, batch.logprobs, batch.advantages, batch.mask)
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 1.0}
    with pytest.raises(ValueError, match="clip_ratio_c"):
        policy_loss(*tensors, **clip)
    with pytest.raises(AssertionError, match="clip_ratio_c"):
        core_algos.compute_policy_loss_vanilla(*tensors, config=verl_config("token-mean", clip))


@pytest.mark.parametrize("loss", ["gspo", "cispo"])
@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@given(batch=batches(), clip=clips)
@patient
def test_the_other_losses_and_their_gradients_equal_verl(
    loss: str, mode: str, batch: Batch, clip: dict[str, float]
) -> None:
    assume(int(batch.mask.sum()) > 0)  # verl divides by 0 without tokens

    def run(function: Any, **arguments: Any) -> tuple[Any, Tensor, Tensor]:
        logprobs = batch.logprobs.clone().requires_grad_()
        result = function(batch.old_logprobs, logprobs, batch.advantages, batch.mask, loss_agg_mode=mode, **arguments)
        value = result[0] if isinstance(result, tuple) else result.loss
        return result, value.detach(), torch.autograd.grad(value, logprobs)[0]

    ours, value, gradient = run(policy_loss, loss_mode=loss, **clip)
    theirs, their_value, their_gradient = run(core_algos.get_policy_loss_fn(loss), config=verl_config(mode, clip))
    close(value, their_value)
    close(gradient, their_gradient)
    assert float(ours.clipfrac) == pytest.approx(theirs[1]["actor/pg_clipfrac"], abs=1e-6)
    assert float(ours.ppo_kl) == pytest.approx(theirs[1]["actor/ppo_kl"], abs=1e-6)


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
@given(batch=batches(), mode=st.sampled_from(LOSS_AGG_MODES))
@patient
def test_micro_batches_add_up_to_the_mini_batch(loss: str, batch: Batch, mode: str) -> None:
    totals = batch_totals(batch.mask)
    tensors = (batch.old_logprobs, batch.logprobs, batch.advantages, batch.mask)
    more: dict[str, Any] = {**totals, "loss_agg_mode": mode, "loss_scale_factor": 8.0, "loss_mode": loss}
    whole = policy_loss(*tensors, **more).loss
    parts = [policy_loss(*(t[i : i + 1] for t in tensors), **more).loss for i in range(len(batch.mask))]
    close(torch.stack(parts).sum(), whole)


@given(batches(), st.integers(0, 1000), st.lists(st.floats(0.1, 2.0), min_size=2, max_size=2), st.booleans())
@patient
def test_components_equal_verls_gdpo_before_its_whitening(
    batch: Batch, seed: int, weights: list[float], scale_by_std: bool
) -> None:
    """verl's GDPO is the weighted *sum*, whitened over the batch; ours is the weighted mean, and not whitened."""
    assume(int(batch.mask.sum()) > 1)
    assume(bool((batch.mask.sum(1) > 0).all()))  # verl places a score on the last token: there must be one
    generator = torch.Generator().manual_seed(seed)
    rewards = [torch.randn(len(batch.group_ids), generator=generator) for _ in weights]
    config = {"gdpo_reward_keys": ["safety", "helpfulness"], "gdpo_reward_weights": weights}
    theirs, _ = core_algos.get_adv_estimator_fn("gdpo")(
        token_level_rewards=batch.token_level_rewards,
        response_mask=batch.mask,
        index=batch.group_ids.numpy(),
        norm_adv_by_std_in_grpo=scale_by_std,
        config=config,
        non_tensor_batch={"safety": rewards[0].numpy(), "helpfulness": rewards[1].numpy()},
        batch={"prompts": torch.zeros(len(batch.mask), 0), "attention_mask": batch.mask},
    )
    components = {
        name: Component(reward, torch.full_like(reward, weight))
        for name, reward, weight in zip(("safety", "helpfulness"), rewards, weights, strict=True)
    }
    nothing = torch.zeros(len(batch.mask))
    ours = combine(components, nothing, batch.mask, batch.group_ids, order="before", scale_by_std=scale_by_std)
    # whitening divides by the batch's deviation: where that is rounding alone, it is rounding that is compared
    assume(float(ours.advantages[batch.mask.bool()].std()) > 1e-3)
    whitened = core_algos.verl_F.masked_whiten(ours.advantages * sum(weights), batch.mask) * batch.mask
    close(whitened, theirs, tolerance=1e-4)


@given(st.lists(st.integers(0, 64), min_size=1, max_size=8), st.integers(1, 64), st.floats(0, 3))
@patient
def test_the_overlong_penalty_equals_verls_dapo_manager(lengths: list[int], buffer: int, factor: float) -> None:
    ours = overlong_penalty(torch.tensor(lengths), max_length=64, buffer=buffer, factor=factor)
    for length, penalty in zip(lengths, ours.tolist(), strict=True):
        assert penalty == pytest.approx(verl_overlong(length, buffer, factor), abs=1e-5)


def verl_overlong(length: int, buffer: int, factor: float) -> float:
    """What verl's DAPO manager adds to a reward of 0: its own method, on an object that has what it reads."""
    import asyncio

    manager_module = pytest.importorskip(
        "verl.experimental.reward_loop.reward_manager.dapo", reason=REASON, exc_type=ImportError
    )

    async def no_score(**_: Any) -> float:
        return 0.0

    item = SimpleNamespace(
        batch={"responses": torch.zeros(64), "attention_mask": torch.tensor([1] * length + [0] * (64 - length))},
        non_tensor_batch={"data_source": "", "reward_model": {"ground_truth": None}, "extra_info": {}},
    )
    manager = SimpleNamespace(
        overlong_buffer_cfg=SimpleNamespace(enable=True, len=buffer, penalty_factor=factor, log=False),
        max_resp_len=64, loop=None, is_async_reward_score=True, compute_score=no_score,
        tokenizer=SimpleNamespace(decode=lambda *_, **__: ""), reward_router_address=None,
        reward_model_tokenizer=None,
    )  # fmt: skip

    async def run() -> dict[str, Any]:
        manager.loop = asyncio.get_running_loop()
        return await manager_module.DAPORewardManager.run_single(manager, [item])

    return float(asyncio.run(run())["reward_score"])


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@given(batch=batches())
@patient
def test_aggregate_equals_verl(mode: str, batch: Batch) -> None:
    assume(int(batch.mask.sum()) > 0)
    close(aggregate(batch.logprobs, batch.mask, mode), core_algos.agg_loss(batch.logprobs, batch.mask, mode))


# ---- metrics


def data_proto(batch: Batch, returns: Tensor | None = None) -> Any:
    """verl's batch: prompts padded on the left to the longest, replies on the right to R."""
    verl = pytest.importorskip("verl", reason=REASON, exc_type=ImportError)
    width = int(batch.prompt_lengths.max())
    prompt_mask = (torch.arange(width) >= width - batch.prompt_lengths.unsqueeze(-1)).long()
    return verl.DataProto.from_dict(
        tensors={
            "token_level_scores": batch.token_level_scores,
            "token_level_rewards": batch.token_level_rewards,
            "advantages": batch.advantages,
            "returns": batch.advantages if returns is None else returns,
            "prompts": torch.zeros_like(prompt_mask),
            "responses": torch.zeros_like(batch.mask),
            "attention_mask": torch.cat([prompt_mask, batch.mask], dim=-1),
            "response_mask": batch.mask,
            "old_log_probs": batch.old_logprobs,
            "ref_log_prob": batch.ref_logprobs,
        }
    )


def our_metrics(batch: Batch, **more: Any) -> dict[str, float]:
    return rollout_metrics(
        token_level_scores=batch.token_level_scores,
        token_level_rewards=batch.token_level_rewards,
        advantages=batch.advantages,
        response_mask=batch.mask,
        prompt_lengths=batch.prompt_lengths,
        group_ids=batch.group_ids,
        **more,
    )


def check_metrics(batch: Batch, returns: Tensor | None = None) -> None:
    theirs = metric_utils.compute_data_metrics(data_proto(batch, returns), use_critic=False)
    ours = our_metrics(batch, returns=returns)
    assert theirs.keys() <= ours.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6, rel=1e-6, nan_ok=True), name


@given(batches())
@patient
def test_every_metric_of_verl_has_its_name_and_value(batch: Batch) -> None:
    check_metrics(batch)
    check_metrics(batch, returns=batch.logprobs)


@edge_cases
def test_metrics_equal_verl_at_the_edges(batch: Batch) -> None:
    if batch is not EDGE_CASES["hole in the mask"]:  # verl takes lengths from the attention mask, which has no hole
        check_metrics(batch)


def test_nothing_but_empty_replies_gives_nan_as_in_verl() -> None:
    batch = EDGE_CASES["padded rows"]
    rows = torch.tensor([0, 1, 4, 5])
    empty = Batch(**{name: value[rows] for name, value in vars(batch).items()})
    check_metrics(empty)
    assert math.isnan(our_metrics(empty)["critic/score/mean"])


@given(
    st.dictionaries(
        st.sampled_from(["gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "step", "testing"]),
        st.floats(0, 1e4),
    ),
    batches(),
)
@patient
def test_timing_equals_verl(seconds: dict[str, float], batch: Batch) -> None:
    theirs = metric_utils.compute_timing_metrics(data_proto(batch), seconds)
    ours = timing_metrics(
        seconds, num_prompt_tokens=int(batch.prompt_lengths.sum()), num_response_tokens=int(batch.mask.sum())
    )
    assert ours == pytest.approx(theirs)


def test_throughput_equals_verl() -> None:
    batch = SimpleNamespace(meta_info={"global_token_num": [100, 50, 7]})
    theirs = metric_utils.compute_throughout_metrics(batch, {"step": 2.5}, n_gpus=4)
    assert throughput_metrics(total_num_tokens=157, seconds=2.5, n_devices=4) == pytest.approx(theirs)
