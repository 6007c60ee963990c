"""verl's synchronous trainer with our eyes: registered in verl's own registry, chosen by `trainer.v1.trainer_mode`.

It is imported right after verl's own trainers (process.py), and `register_trainer` is verl's public way to add one.
Of what verl computes only advantages are changed, where rewards have components (verl_objective.py). What is added:

- after each step the metrics that verl does not show go into the dict that verl logs, and the group log is written;
- raw logit and the rest of `reward_extra_info` go into verl's rollout dumps, which otherwise hold the score alone;
- a failure of the reward model, which verl would catch prompt by prompt, ends the run with its own message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from ups_rm.distributed.failures import BOARD_LIMIT_S, as_error, failure_board, write_failure
from ups_rm.distributed.rm_workers import PoolSettings, RMPool, check_capacity
from ups_rm.distributed.step_record import (
    FIELDS,
    StepRecord,
    check_scores,
    read_step,
    score_of,
    step_groups,
    step_metrics,
    validation_metrics,
)
from ups_rm.distributed.verl_objective import ESTIMATOR, Replies, StepObjective, in_order
from ups_rm.errors import RunError
from ups_rm.grpo import Combined
from ups_rm.objective import Objective
from ups_rm.recipe import Algorithm
from ups_rm.tracking.group_log import GroupLog

TRAINER_MODE = "ups_rm"
BY_THE_LIMITS = (
    "prompt_length/clip_ratio", "response_length/clip_ratio", "response_length_non_aborted/clip_ratio",
    "response/aborted_ratio",
)  # fmt: skip
"""Metrics where docs/metrics.md holds: verl compares lengths with the longest of a batch, not with the recipe's limit,
and counts as aborted only what has no token at all."""


OF_THE_REWARD = tuple(f"critic/rewards/{part}" for part in ("mean", "max", "min"))
"""Of what the advantages were made of; verl's are of safe score less KL whatever `algorithm.objective` says."""


@register_trainer(TRAINER_MODE)
class SafetyTrainer(PPOTrainerSync):
    """`PPOTrainerSync` that shows what the reward model does."""

    def __init__(self, config: Any) -> None:
        config.trainer.v1.trainer_mode = "sync"  # verl asks for the mode by name in several places
        super().__init__(config)
        self.folder = Path(config.trainer.default_local_dir)
        trainer = config.trainer
        algorithm = algorithm_of(config)
        overlong = PoolSettings.from_verl(config).reward_model.overlong_buffer
        self.objective = StepObjective(Objective(algorithm, overlong, config.data.max_response_length))
        self.group_log = GroupLog(
            Path(trainer.group_log_dir),
            freq=trainer.group_log_freq,
            max_groups=trainer.group_log_max_groups,
            max_samples_per_group=trainer.group_log_max_samples_per_group,
            adv_estimator=algorithm.adv_estimator,
            scale_by_std=algorithm.norm_adv_by_std_in_grpo,
            normalize_components=algorithm.normalize_components,
            tolerance=algorithm.zero_std_tolerance,
        )
        self.dump_extras: dict[str, dict[str, float]] = {}
        self.steps_in_epoch = int(trainer.ups_rm_steps_per_epoch)

    def init(self) -> None:
        """verl's set-up, while the RM workers load their model where that takes nothing from it.

        Raises:
            RMError: the RM can't be loaded, or the cluster has no room for its workers.
        """
        with self._leaves_reason():
            self.board: Any = failure_board()
            settings = PoolSettings.from_verl(self.config)
            check_capacity(settings, ray.cluster_resources())
            beside = RMPool(settings) if settings.loads_beside_verl else None
            if beside is not None:
                if settings.reward_model.placement == "node":  # its folders could not be seen by the command
                    beside.check_folders()
                beside.start_loading()
            super().init()
            # kept: Ray ends an actor when the process that created it lets go of its handle
            self.rm_pool = beside or RMPool(settings)
            for line in self.rm_pool.wait_ready():
                print(line)

    def fit(self, agent_loop_manager: Any) -> None:
        with self._leaves_reason():
            super().fit(agent_loop_manager)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """One step of verl's, then its record: metrics into `metrics`, groups into the group log.

        Raises:
            RMError: the reward model failed. RunError: replies are missing, or scores are not where they belong.
        """
        with self._not_hidden():
            batch = super().step(metrics, timing_raw)
        data, algorithm = self.config.data, self.config.algorithm
        record = read_step(
            tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(FIELDS)),
            batch.keys,
            batch.tags,
            self.tokenizer,
            limit=data.max_response_length,
            kl_estimator=algorithm.kl_penalty,
        )
        self._check_complete(record)
        check_scores(record)
        combined = None
        if self.objective.worth is not None:  # the advantages were not made of verl's rewards, but of these
            worth = self.objective.worth
            places = {key: i for i, key in enumerate(self.objective.keys)}
            rows = torch.tensor([places[key] for key in record.keys])
            combined = None if worth.combined is None else in_order(worth.combined, rows)
            width = record.response_mask.shape[1]
            record = replace(record, token_level_rewards=worth.rewards[rows, :width])
            metrics.update(worth.metrics)
            self.objective.objective.after_step(worth.metrics)
        metrics.update(
            step_metrics(
                record,
                max_prompt_length=data.max_prompt_length,
                max_response_length=data.max_response_length,
                transform=self.config.reward.ups_rm.transform,
            )
        )
        metrics.setdefault("actor/reward_kl_penalty_coeff", 0.0)
        self._log_groups(record, metrics["actor/reward_kl_penalty_coeff"], combined)
        self.dump_extras = dict(zip(record.keys, record.extras, strict=True))
        timing_raw["reward"] = self.rm_pool.take_seconds()
        return batch

    def _compute_metrics(
        self, batch: Any, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        """verl's own metrics; the file that it reads once holds all passes over the prompts, so we count them."""
        ours = {name: metrics[name] for name in (*BY_THE_LIMITS, *OF_THE_REWARD)}
        epoch = (global_steps - 1) // self.steps_in_epoch
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        metrics.update(ours)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """verl's own; where its estimator is ours, with what is known of the replies at hand."""
        if self.config.algorithm.adv_estimator != ESTIMATOR:
            return super()._compute_advantage(batch, metrics)
        fields = ["rm_scores", "extra_fields"]
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        extras = [dict(row["reward_extra_info"]) for row in rows["extra_fields"]]
        replies = Replies(
            keys=[str(key) for key in batch.keys],
            scores=[score_of(extra) for extra in extras],
            benign=torch.tensor([bool(extra["benign"]) for extra in extras]),
            placed=torch.stack([row.sum() for row in rows["rm_scores"].unbind()]),
            real=torch.tensor([not tag.get("is_padding", False) for tag in batch.tags]),
        )
        with self.objective.during(replies):
            return super()._compute_advantage(batch, metrics)

    def _save_checkpoint(self) -> None:
        self.objective.save(self.folder / f"global_step_{self.global_steps}")  # before verl names it the newest
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps > 0:
            trainer = self.config.trainer
            given = trainer.resume_from_path if trainer.resume_mode == "resume_path" else None
            self.objective.load(Path(given or self.folder / f"global_step_{self.global_steps}"))

    def _validate(self) -> dict[str, float]:
        with self._not_hidden():
            metrics: dict[str, float] = super()._validate()
        self.rm_pool.take_seconds()  # not the next step's
        return metrics

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, reward_extra_infos_dict: Any, sample_turns: Any, **kwargs: Any
    ) -> dict[str, float]:
        metrics: dict[str, float] = super()._val_metrics_update(
            data_sources, sample_uids, reward_extra_infos_dict, sample_turns, **kwargs
        )
        n = self.config.actor_rollout_ref.rollout.val_kwargs.n
        return metrics | validation_metrics(reward_extra_infos_dict["reward"], reward_extra_infos_dict, n)

    def _dump_generations(
        self, inputs: Any, outputs: Any, gts: Any, scores: Any, reward_extra_infos_dict: Any, dump_path: Any
    ) -> None:
        extras = [self.dump_extras.get(key) for key in reward_extra_infos_dict["uid"]]
        if all(extras):  # a step's replies; those of a validation come with theirs
            names = extras[0] or {}
            reward_extra_infos_dict |= {name: [(extra or {})[name] for extra in extras] for name in names}
        super()._dump_generations(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)

    def _check_complete(self, record: StepRecord) -> None:
        expected = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        if len(record.keys) != expected:
            raise RunError(
                f"step {self.global_steps}: only {len(record.keys)} of {expected} replies came back from the rollout; "
                "verl logs the reasons as `Error in _run_prompt`"
            )

    def _log_groups(self, record: StepRecord, kl_coef: float, combined: Combined | None) -> None:
        """A log that can't be written (a full disk) warns and costs no training."""
        if not self.group_log.wants(self.global_steps):
            return
        try:
            self.group_log.write(self.global_steps, step_groups(record, self.tokenizer, combined), kl_coef=kl_coef)
        except OSError as error:
            print(f"step {self.global_steps}: the group log can't be written, training goes on: {error}")

    @contextmanager
    def _not_hidden(self) -> Iterator[None]:
        """A failure on the board is raised, whatever verl made of it."""
        try:
            yield
        except Exception as error:
            self._raise_posted(error)
            raise
        self._raise_posted(None)

    def _raise_posted(self, cause: Exception | None) -> None:
        posted = ray.get(self.board.first.remote(), timeout=BOARD_LIMIT_S)
        if posted is not None:
            raise as_error(posted) from cause

    @contextmanager
    def _leaves_reason(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            write_failure(self.folder, error)
            raise


def algorithm_of(config: Any) -> Algorithm:
    """The recipe's `algorithm` section, which `rewards.verl_overrides` put at `trainer.ups_rm_algorithm`."""
    from omegaconf import OmegaConf

    given = OmegaConf.to_container(config.trainer.ups_rm_algorithm, resolve=True)
    algorithm = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Algorithm), given))
    assert isinstance(algorithm, Algorithm)
    return algorithm
