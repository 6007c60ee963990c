"""GRPO on one machine: the loop.

One step: n replies per prompt, scored by the reward model, KL against the frozen reference, advantages within the
group, one clipped policy-gradient update. What the step computes is in `Trainer.step`; data order, decoding,
log-probabilities, checkpoints, trackers and the group log each live in their own module.

How it departs from DeepSeekMath (arXiv:2402.03300): one update per rollout by default (the ratio is then exactly 1), KL
is by default taken off the reward instead of added to the loss (verl's `algorithm.use_kl_in_reward`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from ups_rm.console import console, progress_bar
from ups_rm.data.prompts import PromptRow, read_prompts
from ups_rm.errors import RecipeError, RMError, RunError
from ups_rm.evaluation.refusal import is_refusal
from ups_rm.evaluation.text import distinct_n
from ups_rm.grpo import (
    AdaptiveKL,
    FixedKL,
    group_advantages,
    kl_penalty,
    penalize,
    place_on_last_token,
    rollout_metrics,
    throughput_metrics,
    timing_metrics,
)
from ups_rm.local.actor import Actor, response_logprobs
from ups_rm.local.batches import prompt_batches, select_prompts, steps_per_epoch
from ups_rm.local.checkpoint import (
    TrainingState,
    drop_checkpoints_after,
    find_checkpoint,
    load_checkpoint,
    recipe_hash,
    save_checkpoint,
)
from ups_rm.local.decode import Sampling
from ups_rm.local.policy import Policy, needs_reference, pick_device
from ups_rm.local.rollout import Rollout, RolloutEngine, encode_prompts
from ups_rm.recipe import Recipe, as_list
from ups_rm.tracking.group_log import GroupLog, group_records
from ups_rm.tracking.trackers import Trackers
from ups_rm.types import Conversation, Score


class Scorer(Protocol):
    """What the loop needs of a reward model; `ups_rm.reward.scorer.RewardScorer` is one."""

    def score(self, conversations: list[Conversation]) -> list[Score]: ...


@dataclass(frozen=True)
class TrainResult:
    """What a finished (or interrupted) training leaves."""

    folder: Path
    policy: Path | None
    steps: int
    interrupted: bool
    metrics: dict[str, float]


@dataclass
class StepRecord:
    """Everything that one step computed, for logs."""

    prompts: list[PromptRow]
    rollout: Rollout
    scores: list[Score]
    token_level_scores: Tensor
    token_level_rewards: Tensor
    advantages: Tensor
    kl: Tensor
    old_logprobs: Tensor | None
    update: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains `recipe.actor_rollout_ref.model` against a scorer.

    Args:
        recipe: see `ups_rm.recipe`.
        scorer: anything with `score(conversations)`; the RM folder of the recipe is loaded if not given.

    Example:
        >>> recipe = load_recipe("quickstart", ["reward_model.model.path=merge/merged_model/Naive-RM-saferlhf"])
        >>> result = Trainer(recipe).fit()
    """

    def __init__(self, recipe: Recipe, scorer: Scorer | None = None) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.trainer.default_local_dir)
        rows = select_prompts(read_prompts(as_list(recipe.data.train_files)), recipe.data)
        self.policy = Policy.load(recipe)
        self.train_rows = self._fitting(rows)
        self.val_rows = self._fitting(read_prompts(as_list(recipe.data.val_files))) if self._validates() else []
        if recipe.data.val_max_samples >= 0:
            self.val_rows = self.val_rows[: recipe.data.val_max_samples]
        per_epoch = steps_per_epoch(len(self.train_rows), recipe.data)
        self.total_steps = per_epoch * recipe.trainer.total_epochs
        if recipe.trainer.total_training_steps is not None:
            self.total_steps = min(self.total_steps, recipe.trainer.total_training_steps)
        self.actor = Actor(self.policy, recipe, self.total_steps)
        self.scorer: Scorer = scorer or load_scorer(recipe)
        self.engine = RolloutEngine(self.policy, max_num_seqs=recipe.actor_rollout_ref.rollout.max_num_seqs)
        self.reference = self._load_reference()
        control = recipe.algorithm.kl_ctrl
        self.kl_control = (
            AdaptiveKL(control.kl_coef, control.target_kl, control.horizon)
            if control.type == "adaptive"
            else FixedKL(control.kl_coef)
        )

    # ---- the step

    def step(self, prompts: list[PromptRow], number: int) -> StepRecord:
        """One GRPO step; B = P * n sequences, R response tokens."""
        recipe, clock = self.recipe, Clock()
        algorithm, temperature = recipe.algorithm, recipe.actor_rollout_ref.rollout.temperature
        with clock("gen"):
            rollout = self._rollout(prompts, number)  # B replies
        with clock("reward"):
            scores = self.scorer.score(rollout.conversations)
            safe_score = self._safe_score(scores)  # (B,)
        sequences, mask = rollout.sequences, rollout.sequences.response_mask
        old_logprobs = ref_logprobs = None
        if algorithm.use_kl_in_reward or not self.actor.on_policy(len(prompts)) or self.reference is not None:
            with clock("old_log_prob"):
                size = recipe.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
                old_logprobs = response_logprobs(self.policy, sequences, micro_batch_size=size, temperature=temperature)
        if self.reference is not None:
            with clock("ref"), self.reference.as_reference():
                size = recipe.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu
                ref_logprobs = response_logprobs(
                    self.reference, sequences, micro_batch_size=size, temperature=temperature
                )
        with clock("adv"):
            token_level_scores = place_on_last_token(safe_score, mask)  # (B, R)
            kl = torch.zeros_like(token_level_scores)
            if old_logprobs is not None and ref_logprobs is not None:
                kl = kl_penalty(old_logprobs, ref_logprobs, algorithm.kl_penalty) * mask
            kl_coef = self.kl_control.value if algorithm.use_kl_in_reward else 0.0
            token_level_rewards = penalize(token_level_scores, kl, mask, kl_coef)
            advantages = group_advantages(
                token_level_rewards, mask, sequences.group_ids, scale_by_std=algorithm.norm_adv_by_std_in_grpo
            )
        with clock("update_actor"):
            old = None if self.actor.on_policy(len(prompts)) else old_logprobs
            update = self.actor.update(sequences, advantages, old, ref_logprobs, step=number)
            self.engine.refresh()
        clock.stop()
        return StepRecord(
            prompts, rollout, scores, token_level_scores, token_level_rewards, advantages, kl, old_logprobs, update,
            clock.seconds,
        )  # fmt: skip

    # ---- the loop

    def fit(self) -> TrainResult:
        """Train to the end (or to Ctrl-C, which leaves a checkpoint), and save the policy.

        Raises:
            RecipeError, CheckpointError, RMError: before anything is written where possible.
        """
        trainer = self.recipe.trainer
        start = self._resume()
        if start == 0 and (self.folder / "policy").exists() and trainer.resume_mode != "disable":
            raise RunError(
                f"{self.folder} holds a finished run: nothing is overwritten\n"
                "  fix: another trainer.default_local_dir (--out, OUTPUT_DIR), or move this one away"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        drop_checkpoints_after(self.folder, start)
        (self.folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        group_log = self._group_log()
        group_log.drop_after(start)
        trackers = Trackers(
            as_list(trainer.logger),
            project_name=trainer.project_name,
            experiment_name=trainer.experiment_name,
            folder=self.folder,
            config=self.recipe.as_dict(),
            resume_step=start or None,
            total_steps=self.total_steps,
        )
        metrics: dict[str, float] = {}
        done = start
        live = console.is_terminal or "console" not in as_list(trainer.logger)
        with (
            trackers,
            interruptible() as stop,
            progress_bar("GRPO", self.total_steps - start, unit="steps", enabled=live) as advance,
        ):
            if start == 0 and trainer.val_before_train and self._validates():
                trackers.log(self.validate(), 0)
            batches = prompt_batches(self.train_rows, self.recipe.data)
            for number, prompts in zip(range(1, self.total_steps + 1), batches, strict=False):
                if number <= start:
                    continue
                if stop.requested:
                    break
                record = self.step(prompts, number)
                metrics = self.metrics(record, number)
                self.kl_control.update(metrics["actor/reward_kl_penalty"], len(record.scores))
                if group_log.wants(number):
                    self._log_groups(group_log, number, record, metrics["actor/reward_kl_penalty_coeff"])
                last = number == self.total_steps
                if self._validates() and trainer.test_freq > 0 and (number % trainer.test_freq == 0 or last):
                    metrics |= self.validate()
                trackers.log(metrics, number)
                advance(note=f"score {metrics['critic/score/mean']:.3f}")
                done = number
                if trainer.save_freq > 0 and (number % trainer.save_freq == 0 or last):
                    self._save(done)
                if 0 < trainer.max_kl < metrics["kl/mean"]:
                    console.print(
                        f"step {number}: kl/mean {metrics['kl/mean']:.4f} > trainer.max_kl={trainer.max_kl}: stopped"
                    )
                    break
            interrupted = stop.requested and done < self.total_steps
            if interrupted:
                where = self._save(done) if done > start else None
                console.print(
                    f"interrupted after step {done}; checkpoint: {where or 'none needed'}. The same command resumes."
                )
        policy = None if interrupted else self.save_policy()
        return TrainResult(self.folder, policy, done, interrupted, metrics)

    def save_policy(self) -> Path:
        """`<folder>/policy`: a Hugging Face folder that plain transformers loads, replaced as a whole.

        Raises:
            RunError: the disk is full or can't be written; a policy that was there before stays.
        """
        import shutil

        from safetensors import SafetensorError

        final, temporary = self.folder / "policy", self.folder / ".policy.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            self.policy.save(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"the trained policy can't be written to {final}: {error}\n  fix: free space") from error
        return final

    def validate(self) -> dict[str, float]:
        """Scores of the held-out prompts under `rollout.val_kwargs`, by kind of prompt."""
        settings = self.recipe.actor_rollout_ref.rollout.val_kwargs
        sampling = Sampling(
            settings.temperature if settings.do_sample else 0.0,
            settings.top_p,
            settings.top_k,
            self.recipe.trainer.seed,
        )
        started, n = perf_counter(), settings.n
        rollout = self.engine.generate(
            [row.messages for row in self.val_rows],
            n=n,
            max_new_tokens=self.recipe.data.max_response_length,
            sampling=sampling,
        )
        scores = self._safe_score(self.scorer.score(rollout.conversations))
        refused = torch.tensor([float(is_refusal(text)) for text in rollout.texts])
        benign = torch.tensor([row.kind == "benign" for row in self.val_rows]).repeat_interleave(n)
        metrics = {f"val-core/PKU-SafeRLHF/reward/mean@{n}": float(scores.mean())}
        for kind, rows in (("unsafe", ~benign), ("benign", benign)):
            if bool(rows.any()):
                metrics[f"val-aux/{kind}/reward/mean@{n}"] = float(scores.cpu()[rows].mean())
                metrics[f"val-aux/{kind}/refusal_rate"] = float(refused[rows].mean())
        metrics["val-aux/response_length/mean"] = float(rollout.sequences.response_mask.sum(1).float().mean())
        metrics["timing_s/testing"] = perf_counter() - started
        return metrics

    def metrics(self, record: StepRecord, number: int) -> dict[str, float]:
        """All metrics of contract 8 for one step (docs/metrics.md)."""
        rollout, sequences, recipe = record.rollout, record.rollout.sequences, self.recipe
        device, mask = self.policy.device, sequences.response_mask
        n = recipe.actor_rollout_ref.rollout.n
        benign = torch.tensor([row.kind == "benign" for row in record.prompts]).repeat_interleave(n)
        refused = torch.tensor([float(is_refusal(text)) for text in rollout.texts])
        prompt_lengths = sequences.prompt_mask.sum(1)
        metrics = rollout_metrics(
            token_level_scores=record.token_level_scores,
            token_level_rewards=record.token_level_rewards,
            advantages=record.advantages,
            response_mask=mask,
            prompt_lengths=prompt_lengths,
            group_ids=sequences.group_ids,
            safe_score=torch.tensor([score.safe_score for score in record.scores], device=device),
            kl=record.kl,
            truncated=torch.tensor([not ended for ended in rollout.finished], device=device),
            rm_truncated=torch.tensor([score.truncated for score in record.scores], device=device),
            benign=benign.to(device),
            max_prompt_length=recipe.data.max_prompt_length,
            max_response_length=recipe.data.max_response_length,
        )
        logits = torch.tensor([score.logit for score in record.scores])
        metrics |= {"score/logit_mean": float(logits.mean()), "score/logit_std": float(logits.std(correction=0))}
        metrics |= {"text/refusal_rate": float(refused.mean()), "text/distinct_2": distinct_n(rollout.texts, 2)}
        for kind, rows in (("unsafe", ~benign), ("benign", benign)):
            if bool(rows.any()):
                metrics[f"text/refusal_rate_{kind}_prompts"] = float(refused[rows].mean())
        coefficient = self.kl_control.value if recipe.algorithm.use_kl_in_reward else 0.0
        # an end token alone is no reply either
        metrics["response/aborted_ratio"] = sum(not text.strip() for text in rollout.texts) / len(rollout.texts)
        metrics |= {"actor/reward_kl_penalty_coeff": coefficient}
        if record.old_logprobs is not None:
            gap = (record.old_logprobs - rollout.rollout_logprobs).abs() * mask
            metrics["rollout/logprob_gap_mean"] = float(gap.sum() / mask.sum().clamp(min=1))
            metrics["rollout/logprob_gap_max"] = float(gap.max())
        metrics |= record.update
        replies, whole = int(mask.sum()), int(prompt_lengths.sum())
        metrics |= timing_metrics(record.seconds, num_prompt_tokens=whole, num_response_tokens=replies)
        metrics |= throughput_metrics(total_num_tokens=whole + replies, seconds=record.seconds["step"])
        return metrics | {"training/global_step": float(number), "training/epoch": self._epoch(number)}

    # ---- parts

    def _rollout(self, prompts: list[PromptRow], number: int) -> Rollout:
        settings = self.recipe.actor_rollout_ref.rollout
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.seed * 1_000_003 + number)
        return self.engine.generate(
            [row.messages for row in prompts],
            n=settings.n,
            max_new_tokens=self.recipe.data.max_response_length,
            sampling=sampling,
        )

    def _safe_score(self, scores: list[Score]) -> Tensor:
        safe_score = torch.tensor([score.safe_score for score in scores], device=self.policy.device)
        if not bool(torch.isfinite(safe_score).all()):
            bad = int((~torch.isfinite(safe_score)).sum())
            raise RMError(
                f"the RM gave {bad} of {len(scores)} replies a score that is not a number (logit {scores[0].logit})\n"
                "  fix: reward_model.model.dtype=float32, then ups-rm rm check FOLDER"
            )
        return safe_score

    def _groups(self, record: StepRecord) -> list[Any]:
        n = self.recipe.actor_rollout_ref.rollout.n
        return group_records(
            group_ids=record.rollout.sequences.group_ids,
            prompt_ids=[row.index for row in record.prompts for _ in range(n)],
            messages=[row.messages for row in record.prompts for _ in range(n)],
            responses=record.rollout.texts,
            scores=record.scores,
            token_level_rewards=record.token_level_rewards,
            advantages=record.advantages,
            response_mask=record.rollout.sequences.response_mask,
            kl=record.kl,
            truncated=[not ended for ended in record.rollout.finished],
            kinds=[row.kind for row in record.prompts for _ in range(n)],
        )

    def _log_groups(self, log: GroupLog, number: int, record: StepRecord, kl_coef: float) -> None:
        """A log that can't be written (a full disk) warns and costs no training."""
        try:
            log.write(number, self._groups(record), kl_coef=kl_coef)
        except OSError as error:
            console.print(f"step {number}: the group log can't be written, training goes on: {error}", markup=False)

    def _group_log(self) -> GroupLog:
        trainer = self.recipe.trainer
        return GroupLog(
            Path(trainer.group_log_dir),
            freq=trainer.group_log_freq,
            max_groups=trainer.group_log_max_groups,
            max_samples_per_group=trainer.group_log_max_samples_per_group,
            scale_by_std=self.recipe.algorithm.norm_adv_by_std_in_grpo,
            kl_coef=self.recipe.algorithm.kl_ctrl.kl_coef if self.recipe.algorithm.use_kl_in_reward else 0.0,
        )

    def _load_reference(self) -> Policy | None:
        """The frozen policy; the policy itself without adapters for LoRA; None where no KL is asked for."""
        if not needs_reference(self.recipe):
            return None
        return self.policy if self.policy.is_lora else Policy.load(self.recipe, trainable=False)

    def _fitting(self, rows: list[PromptRow]) -> list[PromptRow]:
        """Rows whose prompt is within `data.max_prompt_length` tokens; longer ones are dropped or an error."""
        limit = self.recipe.data.max_prompt_length
        lengths = [len(ids) for ids in encode_prompts(self.policy.tokenizer, [row.messages for row in rows])]
        fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
        if len(fitting) < len(rows):
            longest = max(lengths)
            if not self.recipe.data.filter_overlong_prompts:
                raise RecipeError(
                    f"{len(rows) - len(fitting)} prompts are longer than data.max_prompt_length={limit} tokens "
                    f"(longest {longest})\n  fix: raise it, or set data.filter_overlong_prompts=true"
                )
            console.print(f"{len(rows) - len(fitting)} prompts over {limit} tokens are left out (longest {longest})")
        return fitting

    def _validates(self) -> bool:
        return self.recipe.trainer.test_freq > 0

    def _epoch(self, number: int) -> float:
        return float((number - 1) * self.recipe.data.train_batch_size // max(1, len(self.train_rows)))

    def _save(self, step: int) -> Path:
        state = TrainingState(step, self.kl_control.value, recipe_hash(self.recipe))
        return save_checkpoint(self.folder, self.actor, state, keep=self.recipe.trainer.max_actor_ckpt_to_keep)

    def _resume(self) -> int:
        path = find_checkpoint(self.recipe)
        if path is None:
            return 0
        state = load_checkpoint(path, self.actor, self.recipe)
        self.kl_control.value = state.kl_coef
        self.engine.refresh()
        console.print(f"resumed from {path} after step {state.step}", soft_wrap=True)
        return state.step


def load_scorer(recipe: Recipe) -> Scorer:
    """The RM folder of the recipe as a scorer.

    Raises:
        RecipeError: the recipe names no RM.
    """
    from ups_rm.reward.scorer import RewardScorer

    settings = recipe.reward_model
    if not settings.model.path:
        raise RecipeError(
            "reward_model.model.path is empty\n"
            "  fix: give an RM folder (REWARD_MODEL_PATH=FOLDER), or use `ups-rm run`, which makes one"
        )
    return RewardScorer.load(
        settings.model.path,
        device=str(pick_device(recipe.trainer.device)),
        dtype=settings.model.dtype,
        trust_remote_code=settings.model.trust_remote_code,
        max_batch_tokens=settings.max_batch_tokens,
    )


def check_before_training(recipe: Recipe, *, skip: bool = False, fresh: bool = False) -> None:
    """Before the policy is even loaded: an RM that fails its check, or a run folder of another run, stops it.

    Raises:
        RMError: the RM fails its check and `skip` is not set.
        RunError: `fresh` is asked for, but the run folder holds a run.
    """
    from ups_rm.reward.check import check_rm

    folder, model = Path(recipe.trainer.default_local_dir), recipe.reward_model.model
    if (folder / "policy").exists() and (fresh or find_checkpoint(recipe) is None):
        raise RunError(
            f"{folder} holds a finished run: nothing is overwritten\n  fix: --out another/folder, or move this one away"
        )
    if skip:
        console.print("[bold red]the RM is not checked (--skip-rm-check)[/]")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rm_check_skipped.txt").write_text(f"{model.path}: not checked (--skip-rm-check)\n", encoding="utf-8")
        return
    if not model.path:
        return  # `load_scorer` says what is missing
    device = str(pick_device(recipe.trainer.device))
    report = check_rm(model.path, device=device, dtype=model.dtype, trust_remote_code=model.trust_remote_code)
    failed = [check for check in report.checks if check.verdict == "fail"]
    if failed:
        reasons = "\n".join(f"  {check.name}: {check.finding}" for check in failed)
        raise RMError(
            f"{model.path} fails its check; nothing was trained\n{reasons}\n"
            f"  fix: ups-rm rm check {model.path}, or --skip-rm-check"
        )


class Clock:
    """Seconds per phase of one step, under verl's names; `stop` adds the whole as "step"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - started

    def stop(self) -> None:
        self.seconds["step"] = perf_counter() - self._start


@dataclass
class StopRequest:
    requested: bool = False


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Within: the first Ctrl-C (or SIGTERM) asks the loop to stop after its step, the second one stops at once."""
    stop = StopRequest()
    previous: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        console.print("\nstopping after this step, with a checkpoint (once more: stop at once)")

    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            previous[which] = signal.signal(which, ask)
    except ValueError:  # not in the main thread, for example in a notebook's executor: Ctrl-C stays as it was
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
