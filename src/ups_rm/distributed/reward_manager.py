"""The reward manager that verl loads by its own hook: `reward.reward_manager.source=importlib`.

One reply in, its safe score out, while the rollout of others still runs. The reply is decoded with the policy's
tokenizer, put behind the prompt's messages and queued (batch_queue.py) for the RM workers (rm_workers.py). verl puts
the score on the last response token; it is sigmoid(-logit) on the scalar before that. What else is known of the reply
goes to verl's dumps and validation metrics as `reward_extra_info`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from ups_rm.data.prompts import kind_of
from ups_rm.distributed.batch_queue import BatchQueue
from ups_rm.distributed.failures import as_failure, failure_board
from ups_rm.distributed.prompts import messages_of
from ups_rm.distributed.rm_workers import PoolSettings, RMPool
from ups_rm.distributed.step_record import MODEL_PREFIX
from ups_rm.errors import RMError
from ups_rm.evaluation.refusal import is_refusal
from ups_rm.evaluation.text import prompt_overlap, repetition
from ups_rm.types import Conversation, Message

POST_SECONDS = 30.0
"""How long a failure may take to reach the board that the driver reads."""


class SafetyRewardManager(RewardManagerBase):
    """One per verl reward-loop worker; all of them share the same RM workers."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        settings = PoolSettings.from_verl(config)
        self.pool = RMPool(settings)
        self.queue = BatchQueue(
            self.pool.score,
            max_batch_tokens=settings.reward_model.max_batch_tokens,
            slots=settings.reward_model.num_workers,
        )
        self.board: Any = failure_board()
        self.failed: RMError | None = None

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Score the last reply of `data`.

        Returns:
            reward_score: sigmoid(-logit). reward_extra_info: numbers only, so that verl averages them in validation.

        Raises:
            RMError: the RM failed, now or before: after the first failure nothing is scored any more.
        """
        if self.failed is not None:
            raise self.failed
        item = data[-1:][0]
        responses = item.batch["responses"]  # (R,)
        length = int(item.batch["attention_mask"][-responses.shape[-1] :].sum())
        text = self.tokenizer.decode(responses[:length], skip_special_tokens=True)
        prompt = messages_of(item.non_tensor_batch["raw_prompt"], item.non_tensor_batch.get("extra_info"))
        conversation: Conversation = [*prompt, Message(role="assistant", content=text)]
        try:
            score = await self.queue.score(conversation, tokens=int(item.batch["attention_mask"].sum()))
        except Exception as error:
            self.failed = error if isinstance(error, RMError) else RMError(f"scoring failed: {error}")
            # where Ray itself is at fault the board may not answer; verl then shows the error in its own way
            with suppress(asyncio.TimeoutError):  # not the builtin one before Python 3.11
                await asyncio.wait_for(self.board.post.remote(as_failure(self.failed)), POST_SECONDS)
            raise self.failed from error
        extra = {
            "logit": score.logit,
            "safe_score": score.safe_score,
            "rm_tokens": float(score.tokens),
            "rm_truncated": float(score.truncated),
            "refusal": float(is_refusal(text)),
            "repetition": repetition(text),
            "prompt_overlap": prompt_overlap(conversation[-2]["content"], text),
            "length": float(length),
            "benign": float(prompt_kind(item.non_tensor_batch.get("extra_info")) == "benign"),
            **{f"{MODEL_PREFIX}{name}": logit for name, logit in score.model_logits.items()},
            **({} if score.helpfulness is None else {"helpfulness": score.helpfulness}),
        }
        return {"reward_score": score.safe_score, "reward_extra_info": extra}


def prompt_kind(extra_info: Any) -> str:
    """ "unsafe" or "benign", from the row's `extra_info`: its `kind`, or the ending of its `prompt_source`."""
    info = extra_info if isinstance(extra_info, dict) else {}
    return str(info.get("kind") or kind_of(info.get("prompt_source")) or "unsafe")
