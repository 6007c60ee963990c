"""GRPO on one machine: the loop.

One step: n replies per prompt, scored by the reward model, KL against the frozen reference, advantages within the
group, one clipped policy-gradient update. What the step computes is in `Trainer.step`, what happens around it in
`Trainer.fit`; data order, decoding, log-probabilities, metrics, validation, checkpoints, trackers and the group log
each live in their own module.

How it departs from DeepSeekMath (arXiv:2402.03300): one update per rollout by default (the ratio is then exactly 1), KL
is by default taken off the reward instead of added to the loss (verl's `algorithm.use_kl_in_reward`).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ups_rm.checkpoints import drop_checkpoints_after
from ups_rm.console import console, progress_bar
from ups_rm.data.batches import fitting_prompts, prompt_batches, select_prompts, steps_per_epoch
from ups_rm.data.prompts import PromptRow, read_prompts
from ups_rm.device import keep_freed_memory
from ups_rm.errors import RunError
from ups_rm.grpo import AdaptiveKL, FixedKL, estimate_advantages, kl_penalty, penalize, place_on_last_token
from ups_rm.interrupt import interruptible
from ups_rm.local.actor import Actor, response_logprobs
from ups_rm.local.checkpoint import TrainingState, find_checkpoint, load_checkpoint, save_checkpoint
from ups_rm.local.policy import Policy, needs_reference
from ups_rm.local.rollout import Rollout, RolloutEngine
from ups_rm.local.sampling import Sampling
from ups_rm.local.scoring import load_scorer, safe_scores
from ups_rm.local.step_groups import log_groups, open_group_log
from ups_rm.local.step_metrics import Clock, StepRecord, step_metrics
from ups_rm.local.validation import validate
from ups_rm.monitor.judge import judge_means, open_judge
from ups_rm.monitor.limits import JUDGE
from ups_rm.monitor.watch import Monitor, stop_message
from ups_rm.recipe import Recipe, as_list
from ups_rm.recipe_hash import MadeWith
from ups_rm.tracking.console_line import live_note
from ups_rm.tracking.made_with import write_made_with
from ups_rm.tracking.trackers import Trackers
from ups_rm.types import Scorer, TrainResult


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
        keep_freed_memory()
        self.recipe = recipe
        self.folder = Path(recipe.trainer.default_local_dir)
        rows = select_prompts(read_prompts(as_list(recipe.data.train_files)), recipe.data)
        self.made_with = MadeWith.of(recipe)
        self.policy = Policy.load(recipe)
        self.train_rows = fitting_prompts(rows, self.policy.tokenizer, recipe.data)
        held_out = read_prompts(as_list(recipe.data.val_files)) if self._validates() else []
        self.val_rows = fitting_prompts(held_out, self.policy.tokenizer, recipe.data)
        if recipe.data.val_max_samples >= 0:
            self.val_rows = self.val_rows[: recipe.data.val_max_samples]
        self.steps_per_epoch = steps_per_epoch(len(self.train_rows), recipe.data)
        self.total_steps = self.steps_per_epoch * recipe.trainer.total_epochs
        if recipe.trainer.total_training_steps is not None:
            self.total_steps = min(self.total_steps, recipe.trainer.total_training_steps)
        self.actor = Actor(self.policy, recipe, self.total_steps)
        self.scorer: Scorer = scorer or load_scorer(recipe)
        self.engine = RolloutEngine(self.policy, max_num_seqs=recipe.actor_rollout_ref.rollout.max_num_seqs)
        self.judge = open_judge(recipe)
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
            safe_score = safe_scores(scores, self.policy.device)  # (B,)
        sequences, mask = rollout.sequences, rollout.sequences.response_mask
        old_logprobs = ref_logprobs = forward = None
        if algorithm.use_kl_in_reward or not self.actor.on_policy(len(prompts)) or self.reference is not None:
            with clock("old_log_prob"):
                old_logprobs, forward = self.actor.old_logprobs(sequences)
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
            advantages = estimate_advantages(
                algorithm.adv_estimator,
                token_level_rewards,
                mask,
                sequences.group_ids,
                scale_by_std=algorithm.norm_adv_by_std_in_grpo,
            )
        with clock("update_actor"):
            old = None if self.actor.on_policy(len(prompts)) else old_logprobs
            update = self.actor.update(sequences, advantages, old, ref_logprobs, step=number, forward=forward)
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
        done = start = self._start()
        group_log = open_group_log(self.recipe)
        group_log.drop_after(start)
        metrics: dict[str, float] = {}
        live = console.is_terminal or "console" not in as_list(trainer.logger)
        with (
            self._trackers(start) as trackers,
            interruptible() as stop,
            progress_bar("GRPO", self.total_steps, unit="steps", enabled=live, done=start) as advance,
        ):
            monitor = Monitor(trackers, self.recipe.monitor, start)
            if start == 0 and trainer.val_before_train and self._validates():
                monitor.log(self.validate(), 0)
            batches = prompt_batches(self.train_rows, self.recipe.data)
            for number, prompts in zip(range(1, self.total_steps + 1), batches, strict=False):
                if number <= start:
                    continue
                if stop.requested:
                    break
                record = self.step(prompts, number)
                metrics = self.metrics(record, number)
                if not math.isfinite(metrics["actor/grad_norm"]):
                    console.print(f"step {number}: the gradient is not finite, the update is left out (as in verl)")
                self.kl_control.update(metrics["actor/reward_kl_penalty"], len(record.scores))
                if group_log.wants(number):
                    kl_coef = metrics["actor/reward_kl_penalty_coeff"]
                    n = self.recipe.actor_rollout_ref.rollout.n
                    tokenizer = self.policy.tokenizer
                    log_groups(group_log, record, number=number, n=n, kl_coef=kl_coef, tokenizer=tokenizer)
                last = number == self.total_steps
                if self._validates() and (number % trainer.test_freq == 0 or last):
                    metrics |= self.validate()
                monitor.log(metrics, number)
                advance(note=live_note(metrics))
                done = number
                if trainer.save_freq > 0 and (number % trainer.save_freq == 0 or last):
                    self._save(done)
                if monitor.stopped_by is not None:
                    console.print(
                        stop_message(monitor.stopped_by, done, self._save(done)), markup=False, soft_wrap=True
                    )
                    break
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
        stopped_by = "" if monitor.stopped_by is None else monitor.stopped_by.name
        return TrainResult(self.folder, policy, done, interrupted, metrics, stopped_by)

    def metrics(self, record: StepRecord, number: int) -> dict[str, float]:
        """See `step_metrics`; where nothing is held out, the second judge reads the step's own replies."""
        epoch = float((number - 1) // self.steps_per_epoch)
        kl_coef = self.kl_control.value if self.recipe.algorithm.use_kl_in_reward else 0.0
        metrics = step_metrics(record, self.recipe, number=number, epoch=epoch, kl_coef=kl_coef)
        if self.judge is not None and not self._validates():
            means = judge_means(self.judge, record.rollout.conversations, record.scores)
            metrics |= dict(zip(JUDGE["training"], means, strict=True))
        return metrics

    def validate(self) -> dict[str, float]:
        """See `ups_rm.local.validation`."""
        return validate(
            self.engine, self.scorer, self.val_rows, self.recipe, reference=self.reference, judge=self.judge
        )

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

    def _load_reference(self) -> Policy | None:
        """The frozen policy; the policy itself without adapters for LoRA; None where no KL is asked for."""
        if not needs_reference(self.recipe):
            return None
        return self.policy if self.policy.is_lora else Policy.load(self.recipe, trainable=False)

    def _validates(self) -> bool:
        return self.recipe.trainer.test_freq > 0

    def _save(self, step: int) -> Path:
        state = TrainingState(step, self.kl_control.value, self.made_with.recipe_hash, self.made_with.inputs)
        return save_checkpoint(self.folder, self.actor, state, keep=self.recipe.trainer.max_actor_ckpt_to_keep)

    def _resume(self) -> int:
        path = find_checkpoint(self.recipe)
        if path is None:
            return 0
        state = load_checkpoint(path, self.actor, self.made_with)
        self.kl_control.value = state.kl_coef
        self.engine.refresh()
        console.print(f"resumed from {path} after step {state.step}", soft_wrap=True)
        return state.step

    def _start(self) -> int:
        """The step that the run goes on after (0: a new one), with the run folder ready for it."""
        start = self._resume()
        if start == 0 and (self.folder / "policy").exists() and self.recipe.trainer.resume_mode != "disable":
            raise RunError(
                f"{self.folder} holds a finished run: nothing is overwritten\n"
                "  fix: another trainer.default_local_dir (--out, OUTPUT_DIR), or move this one away"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        drop_checkpoints_after(self.folder, start)
        (self.folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        write_made_with(self.folder, engine="local", device=str(self.policy.device))
        return start

    def _trackers(self, start: int) -> Trackers:
        trainer = self.recipe.trainer
        return Trackers(
            as_list(trainer.logger),
            project_name=trainer.project_name,
            experiment_name=trainer.experiment_name,
            folder=self.folder,
            config=self.recipe.as_dict(),
            resume_step=start or None,
            total_steps=self.total_steps,
        )
