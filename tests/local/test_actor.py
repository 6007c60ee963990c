"""The update: what a step computes does not depend on how it is cut, and equals a loop written without our code."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_training import causal_lm, policy_of, random_sequences, recipe_yaml, slow_logprobs
from ups_rm.errors import NumberError
from ups_rm.grpo.losses import batch_totals
from ups_rm.local.actor import Actor, lr_factor, on_policy, response_logprobs
from ups_rm.local.policy import Policy
from ups_rm.local.sequences import Sequences
from ups_rm.recipe import Optim, Recipe, load_recipe
from ups_rm.recipe_checks import LOSS_AGG_MODES

LENGTHS = [5, 3, 0, 7, 1, 4, 6, 2, 3, 3, 8, 1]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
ACTOR = "actor_rollout_ref.actor."


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe for 3 prompts x 4 replies, mini batches of all of them."""
    file = recipe_yaml(tmp_path)

    def make(*overrides: str) -> Recipe:
        batch = ["data.train_batch_size=3", f"{ACTOR}ppo_mini_batch_size=3", "actor_rollout_ref.rollout.n=4"]
        return load_recipe(file, [*batch, *overrides])

    return make


def batch(seed: int = 0) -> tuple[Sequences, Tensor, Tensor, Tensor]:
    """(sequences, advantages, old_logprobs, ref_logprobs) of random numbers, near the model of `causal_lm()`."""
    sequences = random_sequences(LENGTHS, GROUPS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    policy = policy_of(causal_lm(), trainable=False)
    now = response_logprobs(policy, sequences, micro_batch_size=4, temperature=1.0)
    mask = sequences.response_mask

    def near(spread: float) -> Tensor:
        return (now + spread * torch.randn(now.shape, generator=generator)) * mask

    return sequences, torch.randn(len(mask), 1, generator=generator) * mask, near(0.3), near(0.5)


def actor_on(recipe: Recipe, model: Any = None, total_steps: int = 10) -> Actor:
    return Actor(policy_of(causal_lm() if model is None else model), recipe, total_steps)


def weights(actor: Actor) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in actor.policy.model.named_parameters()}


def gradients_of_step(actor: Actor, *arguments: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients that the optimizer would see (after clipping) and the metrics; the weights stay."""
    seen: dict[str, Tensor] = {}

    def record() -> None:
        for name, parameter in actor.policy.model.named_parameters():
            assert parameter.grad is not None
            seen[name] = parameter.grad.clone()

    actor.optimizer.step = record  # type: ignore[method-assign, assignment]
    return seen, actor.update(*arguments, step=1)


EXTRAS = {
    "policy loss": [],
    "kl loss": [f"{ACTOR}use_kl_loss=true", f"{ACTOR}kl_loss_coef=0.3"],
    "entropy": [f"{ACTOR}entropy_coeff=0.2"],
    "all": [f"{ACTOR}use_kl_loss=true", f"{ACTOR}kl_loss_type=k2", f"{ACTOR}entropy_coeff=0.1"],
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_the_step_does_not_depend_on_the_micro_batch_size(
    recipe_of: Callable[..., Recipe], mode: str, extras: list[str]
) -> None:
    found = {}
    for size in (1, 5, 12):
        recipe = recipe_of(f"{ACTOR}loss_agg_mode={mode}", f"{ACTOR}ppo_micro_batch_size_per_gpu={size}", *extras)
        found[size] = gradients_of_step(actor_on(recipe), *batch())
    expected, metrics = found[12]
    assert metrics["actor/grad_norm"] > 0
    assert len(metrics) == 7 + ("use_kl_loss" in str(extras)) + ("entropy" in str(extras))
    for size in (1, 5):
        for name, gradient in expected.items():
            difference = (found[size][0][name] - gradient).norm()
            assert float(difference) <= 1e-5 * float(gradient.norm()), (size, name)
        assert found[size][1] == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_the_test_above_would_notice_missing_totals(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each micro batch averaged by itself the gradients differ."""
    monkeypatch.setattr(Actor, "_micro_loss", _with_its_own_totals(Actor._micro_loss))
    found = [
        gradients_of_step(actor_on(recipe_of(f"{ACTOR}ppo_micro_batch_size_per_gpu={size}")), *batch())[0]
        for size in (5, 12)
    ]
    worst = max(float((found[0][n] - g).norm() / g.norm()) for n, g in found[1].items())
    assert worst > 1e-2


def _with_its_own_totals(original: Any) -> Any:
    def micro_loss(self: Actor, sequences: Sequences, *rest: Any) -> Any:
        *tensors, rows, _, forward = rest
        return original(self, sequences, *tensors, rows, dict(batch_totals(sequences.response_mask[rows])), forward)

    return micro_loss


# ---- a loop without our code


def brute_force(
    model: Any, recipe: Recipe, sequences: Sequences, advantages: Tensor, old: Tensor, ref: Tensor
) -> list[float]:
    """Two epochs over mini batches of one prompt (4 rows): torch's AdamW, one forward per row, sums written out."""
    actor = recipe.actor_rollout_ref.actor
    optim = actor.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay
    )
    losses = []
    for _ in range(actor.ppo_epochs):
        for start in range(0, len(sequences), 4):
            rows = range(start, start + 4)
            tokens = int(sequences.response_mask[start : start + 4].sum())
            loss = torch.zeros(())
            for i in rows:
                prompt = sequences.prompts[i][sequences.prompt_mask[i].bool()].tolist()
                reply = sequences.responses[i][sequences.response_mask[i].bool()].tolist()
                if not reply:
                    continue
                logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
                distribution = torch.distributions.Categorical(logits=logits)
                now = distribution.log_prob(torch.tensor(reply))
                a, o, r = (x[i, : len(reply)] for x in (advantages, old, ref))
                ratio = (now - o).exp()
                clipped = ratio.clamp(1 - actor.clip_ratio_low, 1 + actor.clip_ratio_high)
                pg = torch.maximum(-a * ratio, -a * clipped)
                pg = torch.where(a < 0, torch.minimum(pg, -a * actor.clip_ratio_c), pg)
                kl = ((r - now).exp() - (r - now) - 1).clamp(-10, 10)  # k3, "low_var_kl", held as verl does
                per_token = pg + actor.kl_loss_coef * kl - actor.entropy_coeff * distribution.entropy()
                loss = loss + per_token.sum() / tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), actor.grad_clip)
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_two_epochs_of_three_mini_batches_equal_a_brute_force_loop(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(
        f"{ACTOR}ppo_mini_batch_size=1", f"{ACTOR}ppo_epochs=2", f"{ACTOR}ppo_micro_batch_size_per_gpu=3",
        f"{ACTOR}use_kl_loss=true", f"{ACTOR}kl_loss_coef=0.2", f"{ACTOR}entropy_coeff=0.05", f"{ACTOR}grad_clip=0.5",
        f"{ACTOR}optim.lr=2e-3", f"{ACTOR}optim.weight_decay=0.1", f"{ACTOR}optim.betas=[0.8,0.95]",
        f"{ACTOR}clip_ratio_high=0.3", f"{ACTOR}clip_ratio_c=1.5",
    )  # fmt: skip
    data = batch(seed=5)
    actor, plain = actor_on(recipe), causal_lm()
    start = weights(actor)
    metrics = actor.update(*data, step=1)
    losses = brute_force(plain, recipe, *data)
    assert metrics["actor/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert metrics["actor/pg_clipfrac"] > 0.1
    assert metrics["actor/pg_clipfrac_lower"] > 0
    assert metrics["actor/grad_norm"] > 0.5, "the gradient must be clipped for the test to see it"
    for name, expected in plain.named_parameters():
        moved = float((expected - start[name]).norm())
        assert moved > 0
        assert float((weights(actor)[name] - expected).norm()) <= 1e-3 * moved, name


def test_shuffling_is_a_function_of_seed_and_step(recipe_of: Callable[..., Recipe]) -> None:
    def after(step: int, *overrides: str) -> Tensor:
        actor = actor_on(recipe_of(f"{ACTOR}ppo_mini_batch_size=1", *overrides))
        actor.update(*batch(), step=step)
        return torch.cat([w.flatten() for w in weights(actor).values()])

    shuffled = [f"{ACTOR}shuffle=true"]
    assert torch.equal(after(1, *shuffled), after(1, *shuffled))
    assert not torch.equal(after(1, *shuffled), after(2, *shuffled))
    assert not torch.equal(after(1, *shuffled), after(1))
    assert not torch.equal(after(1, *shuffled), after(1, *shuffled, f"{ACTOR}data_loader_seed=7"))


# ---- number formats


def test_bf16_compute_keeps_updates_that_bf16_would_lose(recipe_of: Callable[..., Recipe]) -> None:
    """An update of 1e-6 to weights of size 0.2 is below bf16's resolution (8e-4); the masters add it up."""
    steps = 40
    actor = actor_on(recipe_of(f"{ACTOR}optim.lr=1e-6", f"{ACTOR}optim.weight_decay=0"), causal_lm().to(torch.bfloat16))
    before = [master.detach().clone() for _, master in actor.policy.masters]
    low = [parameter.detach().clone() for parameter, _ in actor.policy.masters]
    sequences, advantages, _, _ = batch()
    for step in range(1, steps + 1):
        actor.update(sequences, advantages, None, None, step=step)
        if step == 1:
            moved = torch.cat([(m - b).flatten() for (_, m), b in zip(actor.policy.masters, before, strict=True)])
            assert float(moved.abs().max()) == pytest.approx(1e-6, rel=0.2)  # Adam's first step has size lr
            assert float((moved != 0).float().mean()) > 0.5
            same = torch.cat([(p == q).flatten() for (p, _), q in zip(actor.policy.masters, low, strict=True)])
            assert float(same.float().mean()) > 0.99, "bf16 can't see so small a step; else the test shows nothing"
    total = torch.cat([(m - b).flatten() for (_, m), b in zip(actor.policy.masters, before, strict=True)])
    assert float(total.abs().max()) > 0.6 * steps * 1e-6
    for parameter, master in actor.policy.masters:
        assert master.dtype == torch.float32
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, master.to(torch.bfloat16))


def test_fp32_parameters_are_their_own_masters() -> None:
    assert all(parameter is master for parameter, master in policy_of(causal_lm()).masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 12])
def test_on_policy_the_ratio_is_exactly_one(recipe_of: Callable[..., Recipe], dtype: torch.dtype, size: int) -> None:
    """Whatever the number format and the micro batches: nothing clipped, no KL to the old policy."""
    actor = actor_on(recipe_of(f"{ACTOR}ppo_micro_batch_size_per_gpu={size}"), causal_lm().to(dtype))
    sequences, advantages, _, _ = batch()
    assert on_policy(actor.recipe, 3)
    metrics = actor.update(sequences, advantages, None, None, step=1)
    assert metrics["actor/ppo_kl"] == 0.0
    assert metrics["actor/pg_clipfrac"] == 0.0
    mean = float((advantages * sequences.response_mask).sum() / sequences.response_mask.sum())
    assert metrics["actor/pg_loss"] == pytest.approx(-mean, abs=1e-6)


def test_several_uses_of_a_rollout_are_off_policy(recipe_of: Callable[..., Recipe]) -> None:
    assert on_policy(recipe_of(), 3)
    assert not on_policy(recipe_of(f"{ACTOR}ppo_epochs=2"), 3)
    assert not on_policy(recipe_of(f"{ACTOR}ppo_mini_batch_size=1"), 3)


# ---- the learning rate


@pytest.mark.parametrize("warmup", [-1, 0, 1, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_learning_rates_equal_verls(warmup: int, ratio: float, floor: float) -> None:
    schedules = pytest.importorskip("verl.utils.torch_functional", reason="verl is an extra")
    total = 21
    steps = warmup if warmup > 0 else int(ratio * total)

    def theirs(make: Callable[..., Any], **options: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, rates = make(optimizer, num_warmup_steps=steps, **options), []
        for _ in range(total):
            rates.append(float(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
        return rates

    def ours(**options: Any) -> list[float]:
        optim = Optim(lr_warmup_steps=warmup, lr_warmup_steps_ratio=ratio, min_lr_ratio=floor, **options)
        return [lr_factor(step, optim, total) for step in range(total)]

    constant = theirs(schedules.get_constant_schedule_with_warmup)
    assert ours(lr_scheduler_type="constant") == pytest.approx(constant)
    for zero_indexed in (True, False):
        cosine = theirs(
            schedules.get_cosine_schedule_with_warmup,
            num_training_steps=total, min_lr_ratio=floor, num_cycles=0.5, zero_indexed_step=zero_indexed,
        )  # fmt: skip
        assert ours(lr_scheduler_type="cosine", zero_indexed_step=zero_indexed) == pytest.approx(cosine)


def test_learning_rate_closed_form() -> None:
    """Written out: warm-up over 4 of 12 steps, then half a cosine down to a tenth."""
    optim = Optim(lr_warmup_steps=4, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    expected = [0, 0.25, 0.5, 0.75] + [0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert [lr_factor(step, optim, 12) for step in range(12)] == pytest.approx(expected)
    shifted = Optim(lr_warmup_steps=4, zero_indexed_step=False)
    assert [lr_factor(step, shifted, 12) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_the_rate_moves_once_per_rollout_and_is_the_one_used(recipe_of: Callable[..., Recipe]) -> None:
    """Two epochs of three mini batches are one step of the schedule, as in verl."""
    warm = [f"{ACTOR}optim.lr_warmup_steps=4", f"{ACTOR}optim.lr=0.01", f"{ACTOR}optim.weight_decay=0"]
    actor = actor_on(recipe_of(f"{ACTOR}ppo_mini_batch_size=1", f"{ACTOR}ppo_epochs=2", *warm))
    start = weights(actor)
    rates = [actor.update(*batch(), step=step)["actor/lr"] for step in (1, 2, 3)]
    assert rates == pytest.approx([0.0, 0.0025, 0.005])
    actor = actor_on(recipe_of(*warm))
    actor.update(*batch(), step=1)
    assert all(torch.equal(weights(actor)[name], value) for name, value in start.items()), "rate 0: nothing moves"


# ---- what must not happen


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_skips_the_step(
    recipe_of: Callable[..., Recipe], bad: float, dtype: torch.dtype
) -> None:
    actor, twin = (actor_on(recipe_of(), causal_lm().to(dtype)) for _ in range(2))
    sequences, advantages, _, _ = batch()
    broken = advantages.clone()
    broken[3, 0] = bad
    start = weights(actor)
    with pytest.raises(NumberError, match=r"the loss is not finite in replies .*3"):
        actor.update(sequences, broken, None, None, step=1)
    assert all(torch.equal(weights(actor)[name], value) for name, value in start.items())
    actor.update(sequences, advantages, None, None, step=2)
    twin.update(sequences, advantages, None, None, step=2)
    assert all(torch.equal(weights(actor)[name], value) for name, value in weights(twin).items())


def test_a_batch_of_empty_replies_changes_nothing(recipe_of: Callable[..., Recipe]) -> None:
    actor = actor_on(recipe_of(f"{ACTOR}optim.weight_decay=0"))
    start = weights(actor)
    sequences = random_sequences([0] * 12, GROUPS)
    zeros = torch.zeros(sequences.responses.shape)
    metrics = actor.update(sequences, zeros, None, None, step=1)
    assert metrics["actor/loss"] == 0
    assert all(torch.equal(weights(actor)[name], value) for name, value in start.items())


@pytest.mark.parametrize("architecture", ["gpt2", "gpt neox", "qwen2 tied"])
def test_any_architecture_learns_what_is_rewarded(recipe_of: Callable[..., Recipe], architecture: str) -> None:
    """Replies with positive advantage become likelier and those with negative ones less so."""
    actor = actor_on(recipe_of(f"{ACTOR}optim.lr=3e-3"), causal_lm(architecture))
    sequences = random_sequences(LENGTHS, GROUPS)
    signs = torch.tensor([1.0, -1.0] * 6)[:, None] * sequences.response_mask

    def likelihood() -> Tensor:
        return response_logprobs(actor.policy, sequences, micro_batch_size=4, temperature=1.0).sum(1)

    before = likelihood()
    for step in range(1, 6):
        actor.update(sequences, signs, None, None, step=step)
    change = (likelihood() - before) * signs[:, 0]
    assert bool((change[sequences.response_mask.sum(1) > 0] > 0).all())


def test_lora_trains_the_adapters_alone(recipe_of: Callable[..., Recipe]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    actor = actor_on(recipe_of(), get_peft_model(causal_lm("qwen2 untied"), config).eval())
    assert len(actor.policy.masters) == 2 * 2 * 7
    start = weights(actor)
    sequences, advantages, _, _ = batch()
    for step in (1, 2):
        actor.update(sequences, advantages, None, None, step=step)
    for name, value in weights(actor).items():
        assert torch.equal(value, start[name]) == ("lora_" not in name), name


def test_response_logprobs_do_not_depend_on_the_micro_batches() -> None:
    policy: Policy = policy_of(causal_lm("qwen3 wide heads"), trainable=False)
    sequences = random_sequences(LENGTHS, GROUPS)
    found = [response_logprobs(policy, sequences, micro_batch_size=size, temperature=0.7) for size in (1, 5, 12)]
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], found[2], atol=1e-5, rtol=0)
    assert bool((found[0][sequences.response_mask == 0] == 0).all())
    prompt = sequences.prompts[3][sequences.prompt_mask[3].bool()].tolist()
    with torch.no_grad():
        expected = slow_logprobs(policy.model, prompt, sequences.responses[3, :7].tolist(), 0.7)
    torch.testing.assert_close(found[2][3, :7], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("extras", [EXTRAS["policy loss"], EXTRAS["kl loss"]], ids=["policy loss", "kl loss"])
def test_an_update_that_goes_on_from_the_forward_of_the_old_logprobs_is_the_same(
    recipe_of: Callable[..., Recipe], extras: list[str]
) -> None:
    """One forward of the policy instead of two: the weights end bit for bit where they would have ended."""
    sequences, advantages, _, ref = batch()
    recipe = recipe_of(f"{ACTOR}ppo_micro_batch_size_per_gpu=12", *extras)
    apart, together = actor_on(recipe), actor_on(recipe)
    now = response_logprobs(apart.policy, sequences, micro_batch_size=3, temperature=1.0)
    calls: list[int] = []
    together.policy.model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    expected = apart.update(sequences, advantages, None, ref, step=1)
    old, forward = together.old_logprobs(sequences)
    assert not old.requires_grad
    assert forward is not None
    torch.testing.assert_close(old, now, atol=1e-5, rtol=0)
    assert together.update(sequences, advantages, None, ref, step=1, forward=forward) == expected
    assert calls == [1]
    for name, weight in weights(apart).items():
        assert torch.equal(weights(together)[name], weight), name


@pytest.mark.parametrize("override", ["ppo_micro_batch_size_per_gpu=11", "ppo_epochs=2", "entropy_coeff=0.1"])
def test_the_forward_is_kept_only_where_one_update_takes_all_of_it(
    recipe_of: Callable[..., Recipe], override: str
) -> None:
    actor = actor_on(recipe_of(f"{ACTOR}ppo_micro_batch_size_per_gpu=12", f"{ACTOR}{override}"))
    old, forward = actor.old_logprobs(batch()[0])
    assert forward is None
    assert not old.requires_grad
