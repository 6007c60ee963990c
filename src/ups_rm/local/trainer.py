"""GRPO on one machine: the loop.

One step: n replies per prompt, scored by the reward model, KL against the frozen reference, advantages within the
group, one clipped policy-gradient update. What the step computes is in `Trainer.step`, what happens around it in
`Trainer.fit`; data order, decoding, log-probabilities, metrics, validation, checkpoints, trackers and the group log
each live in their own module.

How it departs from DeepSeekMath (arXiv:2402.03300): one update per rollout by default (the ratio is then exactly 1), KL
is by default taken off the reward instead of added to the loss (verl's `algorithm.use_kl_in_reward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from ups_rm.checkpoints import checkpoints
from ups_rm.console import console, progress_bar
from ups_rm.data.batches import fitting_prompts, prompt_batches, select_prompts, steps_per_epoch
from ups_rm.data.prompts import PromptRow, read_prompts
from ups_rm.device import keep_freed_memory
from ups_rm.errors import CheckpointError, NumberError, RunError
from ups_rm.grpo import AdaptiveKL, FixedKL
from ups_rm.interrupt import interruptible
from ups_rm.local.actor import Actor, goes_on_from_rollout, on_policy, response_logprobs
from ups_rm.local.checkpoint import CheckpointWriter, Provenance, TrainingState
from ups_rm.local.judged import Judged, judge, judge_again
from ups_rm.local.policy import Policy, needs_reference
from ups_rm.local.provenance import git_commit, machine
from ups_rm.local.random_state import seed_all
from ups_rm.local.replay import save_replay
from ups_rm.local.rewarded import rewarded
from ups_rm.local.rollout import Rollout, RolloutEngine
from ups_rm.local.run_folder import begin, finished_run, resume, save_policy
from ups_rm.local.sampling import Sampling
from ups_rm.local.scoring import load_scorer
from ups_rm.local.scoring_ahead import ScoringAhead
from ups_rm.local.step_groups import log_groups, open_group_log
from ups_rm.local.step_metrics import Clock, StepRecord, check_finite, step_metrics
from ups_rm.local.validation import validate
from ups_rm.locks import only_one
from ups_rm.monitor.judge import judge_means, open_judge
from ups_rm.monitor.limits import JUDGE
from ups_rm.monitor.watch import Monitor, stop_message
from ups_rm.objective import Objective
from ups_rm.recipe import Recipe, as_list
from ups_rm.recipe_hash import MadeWith
from ups_rm.tracking.console_line import live_note
from ups_rm.tracking.made_with import versions, write_made_with
from ups_rm.tracking.trackers import BEFORE_ANY, Trackers
from ups_rm.types import Conversation, Scorer, TrainResult


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
        made_with = MadeWith.of(recipe)  # before anything is loaded: what stands there now
        self.policy = Policy.load(recipe)
        here = machine(self.policy.device, next(self.policy.model.parameters()).dtype)
        self.provenance = Provenance(made_with, recipe.as_dict(), versions(), git_commit(), here)
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
        if self.engine.decoder is None:
            console.print(
                f"{self.policy.source} is not of a kind that the fast path knows (docs/guides/own-policy.md): "
                "transformers' own generate and forward are used, slower",
                markup=False, soft_wrap=True,
            )  # fmt: skip
        self.judge = open_judge(recipe)
        self.reference = self._load_reference()
        self._at_work: Rollout | None = None  # of the step that is under way
        self.objective = Objective(
            recipe.algorithm, recipe.reward_model.overlong_buffer, recipe.data.max_response_length
        )
        control = recipe.algorithm.kl_ctrl
        self.kl_control = (
            AdaptiveKL(control.kl_coef, control.target_kl, control.horizon)
            if control.type == "adaptive"
            else FixedKL(control.kl_coef)
        )

    # ---- the step

    def step(self, prompts: list[PromptRow], number: int) -> StepRecord:
        """One GRPO step; B = P * n sequences, R response tokens.

        Raises:
            NumberError: NaN or infinity in logits, rewards, loss or gradient; the policy is as it was before that.
            RMError: the reward model fails on too many replies.
        """
        recipe, clock = self.recipe, Clock()
        algorithm, temperature = recipe.algorithm, recipe.actor_rollout_ref.rollout.temperature
        judged = self._judged_rollout(prompts, number, clock)  # B replies with their scores
        sequences, mask = judged.rollout.sequences, judged.rollout.sequences.response_mask
        old_logprobs = ref_logprobs = forward = None
        kept, strictly_on_policy = judged.rollout.kept, on_policy(recipe, len(prompts))
        if kept is not None or algorithm.use_kl_in_reward or not strictly_on_policy or self.reference is not None:
            with clock("old_log_prob"):
                old_logprobs, forward = self.actor.old_logprobs(sequences, kept)
                check_finite("the policy's log-probabilities", old_logprobs, mask)
        if self.reference is not None:
            with clock("ref"), self.reference.as_reference():
                size = recipe.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu
                ref_logprobs = response_logprobs(
                    self.reference, sequences, micro_batch_size=size, temperature=temperature
                )
                check_finite("the reference's log-probabilities", ref_logprobs, mask)
        with clock("adv"):
            benign = torch.tensor([row.kind == "benign" for row in prompts], device=mask.device)
            worth = rewarded(
                judged,
                old_logprobs,
                ref_logprobs,
                benign.repeat_interleave(len(mask) // len(prompts)),
                objective=self.objective,
                kl_coef=self.kl_control.value if algorithm.use_kl_in_reward else 0.0,
                recipe=recipe,
            )
        with clock("update_actor"):
            old = None if strictly_on_policy else old_logprobs
            if not bool(worth.learns.all()):
                sequences = replace(sequences, response_mask=mask * worth.learns[:, None])
            if bool(worth.learns.any()):
                update = self.actor.update(sequences, worth.advantages, old, ref_logprobs, step=number, forward=forward)
                self.engine.refresh()
            else:
                update = self.actor.left_out(number)
        clock.stop()
        return StepRecord(
            prompts, judged.rollout, judged.scores, worth.token_level_scores, worth.token_level_rewards,
            worth.advantages, worth.kl, old_logprobs, update, clock.seconds, judged.usable, worth.flat, worth.learns,
            judged.resampled, worth.combined, worth.metrics,
        )  # fmt: skip

    # ---- the loop

    def fit(self) -> TrainResult:
        """Train to the end (or to Ctrl-C, which leaves a checkpoint), and save the policy.

        Raises:
            RecipeError, CheckpointError, RMError: before anything is written where possible.
            RunError: another process trains in the run folder, it holds a run, or its disk is full.
        """
        fix = "name another run folder (OUTPUT_DIR, --out)"
        with only_one(self.folder / "writer.lock", what=str(self.folder), fix=fix):
            return self._fit()

    def _fit(self) -> TrainResult:
        trainer = self.recipe.trainer
        if done := finished_run(self.recipe, self.provenance.made_with):
            console.print(f"nothing left to do: {done.steps} steps are done, {done.policy} is whole", soft_wrap=True)
            return done
        seed_all(trainer.seed)
        state = resume(self.recipe, self.actor, self.provenance)
        start = state.step
        batches = self._batches(state)
        begun = begin(self.recipe, state)
        write_made_with(self.folder, engine="local", device=str(self.policy.device))
        if start > 0:
            self.kl_control.value = state.kl_coef
            self.objective.resume(state.lagrange)
            self.engine.refresh()
        group_log = open_group_log(self.recipe)
        group_log.drop_after(start)
        metrics: dict[str, float] = {}
        live = console.is_terminal or "console" not in as_list(trainer.logger)
        with self._trackers(state, begun) as trackers:
            with (
                self._checkpoint_writer() as writer,
                interruptible() as stop,
                progress_bar("GRPO", self.total_steps, unit="steps", enabled=live, done=start) as advance,
            ):
                monitor = Monitor(trackers, self.recipe.monitor, start)
                if start == 0 and trainer.val_before_train and self._validates():
                    monitor.log(self.validate(state), 0)
                for number, prompts in batches:
                    if stop.requested:
                        break
                    state.step, state.epoch = number, (number - 1) // self.steps_per_epoch
                    state.prompts, state.score = [row.index for row in prompts], None
                    try:
                        record = self.step(prompts, number)
                    except NumberError as problem:
                        monitor.log(self._skip(problem, prompts, state), number)
                        continue
                    metrics = self.metrics(record, number) | self._count(record, state)
                    self.kl_control.update(metrics["actor/reward_kl_penalty"], len(record.scores))
                    self.objective.after_step(metrics)
                    if group_log.wants(number):
                        kl_coef = metrics["actor/reward_kl_penalty_coeff"]
                        n = self.recipe.actor_rollout_ref.rollout.n
                        tokenizer = self.policy.tokenizer
                        log_groups(group_log, record, number=number, n=n, kl_coef=kl_coef, tokenizer=tokenizer)
                        state.group_log = number
                    state.kl_coef, state.lagrange = self.kl_control.value, self.objective.state
                    last = number == self.total_steps
                    if self._validates() and (number % trainer.test_freq == 0 or last):
                        metrics |= self.validate(state)
                    monitor.log(metrics, number)
                    advance(note=live_note(metrics))
                    writer.raise_failure()
                    if self._wants_checkpoint(state, last):
                        self._save(writer, trackers, state)
                    if monitor.stopped_by is not None:
                        saved = self._save(writer, trackers, state)
                        console.print(stop_message(monitor.stopped_by, number, saved), markup=False, soft_wrap=True)
                        break
                    if why := self._stops_early(metrics):
                        best = f"; best validation: step {state.best['step']:.0f}" if state.best else ""
                        console.print(f"step {number}: {why}: stopped{best}", markup=False)
                        break
                interrupted = stop.requested and state.step < self.total_steps
                if interrupted:
                    where = self._save(writer, trackers, state) if state.step > start else None
                    writer.wait()
                    console.print(
                        f"interrupted after step {state.step}; checkpoint: {where or 'none needed'}. The same command "
                        "resumes.",
                        soft_wrap=True,
                    )
                    trackers.finish(patient=False)
                    return TrainResult(self.folder, None, state.step, True, metrics)
            policy = self.save_policy(state.step, metrics)  # before trackers are waited for, which may never answer
            trackers.finish(patient=not stop.requested)
        stopped_by = "" if monitor.stopped_by is None else monitor.stopped_by.name
        return TrainResult(self.folder, policy, state.step, False, metrics, stopped_by)

    def metrics(self, record: StepRecord, number: int) -> dict[str, float]:
        """See `step_metrics`; where nothing is held out, the second judge reads the step's own replies."""
        epoch = float((number - 1) // self.steps_per_epoch)
        kl_coef = self.kl_control.value if self.recipe.algorithm.use_kl_in_reward else 0.0
        metrics = step_metrics(record, self.recipe, number=number, epoch=epoch, kl_coef=kl_coef)
        if self.judge is not None and not self._validates():
            record.judged = self.judge.score(record.rollout.conversations)
            metrics |= dict(zip(JUDGE["training"], judge_means(record.judged, record.scores), strict=True))
        return metrics

    def validate(self, state: TrainingState) -> dict[str, float]:
        """See `ups_rm.local.validation`; the state takes the mean score and whether it is the best so far."""
        metrics = validate(
            self.engine, self.scorer, self.val_rows, self.recipe, reference=self.reference, judge=self.judge
        )
        n = self.recipe.actor_rollout_ref.rollout.val_kwargs.n
        state.score = metrics[f"val-core/PKU-SafeRLHF/reward/mean@{n}"]
        if state.best is None or state.score > state.best["score"]:
            state.best = {"step": state.step, "score": state.score}
        return metrics

    def save_policy(self, steps: int, metrics: dict[str, float]) -> Path:
        """See `ups_rm.local.run_folder`."""
        complete = steps >= self.total_steps  # one that was stopped early may be gone on with
        made_with = self.provenance.made_with
        return save_policy(self.recipe, self.policy, made_with, steps=steps, metrics=metrics, complete=complete)

    # ---- parts

    def _judged_rollout(self, prompts: list[PromptRow], number: int, clock: Clock) -> Judged:
        """n replies to each prompt, scored; those of flat groups drawn again where the recipe says so."""
        with ScoringAhead(self.scorer, self.recipe.reward_model) as scorer:
            with clock("gen"):
                rollout = self._rollout(prompts, number, on_group=scorer.on_group)
            with clock("reward"):
                judged = judge(rollout, scorer, self.recipe)
        algorithm = self.recipe.algorithm
        for again in range(1, algorithm.resamples + 1 if algorithm.zero_std_groups == "resample" else 1):
            if not (groups := judged.flat_prompts()):
                break
            if rollout.kept is not None:
                rollout.kept.drop()
            with clock("gen"):
                new = self._rollout([prompts[group] for group in groups], number, again)
            with clock("reward"):
                judged = judge_again(judged, groups, new, self.scorer, self.recipe)
        self._at_work = judged.rollout
        return judged

    def _rollout(
        self,
        prompts: list[PromptRow],
        number: int,
        again: int = 0,
        on_group: Callable[[list[Conversation]], None] | None = None,
    ) -> Rollout:
        settings = self.recipe.actor_rollout_ref.rollout
        seed = settings.seed * 1_000_003 + number + again * 1_000_000_007  # torch takes 64 bits
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, seed)
        self._at_work = rollout = self.engine.generate(
            [row.messages for row in prompts],
            n=settings.n,
            max_new_tokens=self.recipe.data.max_response_length,
            sampling=sampling,
            on_group=on_group,
            keep=again == 0 and goes_on_from_rollout(self.recipe, len(prompts), number),
        )
        self.engine.refresh()  # or the copy that decodes would stand beside the activations
        check_finite("the policy's logits in the rollout", rollout.rollout_logprobs, rollout.sequences.response_mask)
        return rollout

    def _skip(self, problem: NumberError, prompts: list[PromptRow], state: TrainingState) -> dict[str, float]:
        """Leave the step out, keep its batch, and count it.

        Raises:
            RunError: `trainer.nonfinite=stop`, or too many steps in a row.
        """
        trainer, number, counters = self.recipe.trainer, state.step, state.counters
        kept = save_replay(self, problem, prompts, number, self._at_work)
        self._at_work = None  # with what its rollout keeps
        told = f"step {number}: {problem}" + (f"; its batch: ups-rm replay {kept}" if kept else "")
        counters["skipped_steps"] = counters.get("skipped_steps", 0) + 1
        counters["skipped_in_a_row"] = counters.get("skipped_in_a_row", 0) + 1
        if trainer.nonfinite == "stop":
            raise RunError(f"{told}\n  fix: a lower learning rate; trainer.nonfinite=skip leaves such steps out")
        if counters["skipped_in_a_row"] > trainer.max_skipped_steps:
            raise RunError(
                f"{told}\n  {counters['skipped_in_a_row']} steps in a row, more than trainer.max_skipped_steps="
                f"{trainer.max_skipped_steps}\n  fix: a lower learning rate, then the same command "
                "goes on from the last checkpoint"
            )
        console.print(f"{told}; the step is left out", markup=False, soft_wrap=True)
        self.actor.left_out(number)
        self.engine.refresh()
        state.kl_coef, state.lagrange = self.kl_control.value, self.objective.state
        return {"numbers/skipped_steps": float(counters["skipped_steps"]), "training/global_step": float(number)}

    def _count(self, record: StepRecord, state: TrainingState) -> dict[str, float]:
        """What went wrong so far in this run, this step included."""
        counters = state.counters
        counters["skipped_in_a_row"] = 0
        counters["dropped_replies"] = counters.get("dropped_replies", 0) + int((~record.usable).sum())
        return {
            "numbers/skipped_steps": float(counters.get("skipped_steps", 0)),
            "numbers/dropped_replies": float(counters["dropped_replies"]),
        }

    def _stops_early(self, metrics: dict[str, float]) -> str:
        """Why the training ends with this step; empty if it does not."""
        for name, key in (("kl/mean", "max_kl"), ("actor/grad_norm", "max_grad_norm")):
            limit = getattr(self.recipe.trainer, key)
            if 0 < limit < metrics[name]:
                return f"{name} {metrics[name]:.4f} > trainer.{key}={limit}"
        return ""

    def _load_reference(self) -> Policy | None:
        """The frozen policy; the policy itself without adapters for LoRA; None where no KL is asked for."""
        if not needs_reference(self.recipe):
            return None
        return self.policy if self.policy.is_lora else Policy.load(self.recipe, trainable=False)

    def _validates(self) -> bool:
        return self.recipe.trainer.test_freq > 0

    def _batches(self, state: TrainingState) -> Iterator[tuple[int, list[PromptRow]]]:
        """(step, its prompts) for the steps after `state`.

        Raises:
            CheckpointError: the prompts of the state's own step are others than the checkpoint names.
            RunError: there is no step left, but this folder has no run that is done.
        """
        batches = zip(range(1, self.total_steps + 1), prompt_batches(self.train_rows, self.recipe.data), strict=False)
        for number, prompts in islice(batches, state.step):
            found = [row.index for row in prompts]
            if number == state.step and found != state.prompts and not self.recipe.trainer.allow_changes:
                raise CheckpointError(
                    f"step {number} had the prompts {state.prompts}, the same seed now gives {found}: the order of the "
                    "data is another one (another version of torch?)\n  fix: the versions in the checkpoint's "
                    "state.json; or --allow-changes"
                )
        if state.step >= self.total_steps:
            if self.recipe.trainer.resume_mode == "resume_path" and not checkpoints(self.folder):
                raise RunError(
                    f"this run would train no step: {self.recipe.trainer.resume_from_path} is of step {state.step}, "
                    f"the recipe has {self.total_steps}\n  fix: trainer.total_training_steps above {state.step}"
                )
            console.print(f"nothing left to train: step {state.step} of {self.total_steps} is done")
        return batches

    def _checkpoint_writer(self) -> CheckpointWriter:
        trainer = self.recipe.trainer
        return CheckpointWriter(
            self.folder,
            self.actor,
            self.provenance,
            keep=trainer.ckpt_to_keep,
            keep_best=trainer.best_ckpt_to_keep,
            background=trainer.async_save,
        )

    def _wants_checkpoint(self, state: TrainingState, last: bool) -> bool:
        trainer = self.recipe.trainer
        is_best = trainer.best_ckpt_to_keep > 0 and state.best is not None and state.best["step"] == state.step
        return is_best or (trainer.save_freq > 0 and (state.step % trainer.save_freq == 0 or last))

    def _save(self, writer: CheckpointWriter, trackers: Trackers, state: TrainingState) -> Path:
        """Metrics are on the disk before the checkpoint that has seen their steps."""
        saved = self.folder / f"global_step_{state.step}"
        if writer.last == saved:  # Ctrl-C in a step that is saved anyway
            return saved
        trackers.sync()
        state.run_ids = trackers.run_ids
        return writer.save(state)

    def _trackers(self, state: TrainingState, begun: bool) -> Trackers:
        """A run that went on from a checkpoint, or was killed before its first one, keeps its curves."""
        trainer = self.recipe.trainer
        return Trackers(
            as_list(trainer.logger),
            project_name=trainer.project_name,
            experiment_name=trainer.experiment_name,
            folder=self.folder,
            config=self.recipe.as_dict(),
            resume_step=state.step if state.step > 0 else BEFORE_ANY if begun else None,
            run_ids=state.run_ids,
            total_steps=self.total_steps,
        )
