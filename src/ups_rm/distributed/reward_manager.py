"""The reward model inside verl: a reward manager that verl loads by its own hook (`reward.reward_manager`)."""

from __future__ import annotations

from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from ups_rm.reward.scorer import RewardScorer
from ups_rm.types import Conversation, Message


class SafetyRewardManager(RewardManagerBase):
    """Scores each reply by the RM folder of the recipe, in the process of verl's reward worker."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        settings = config.reward.ups_rm
        self.scorer = RewardScorer.load(
            settings.path,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            max_batch_tokens=settings.max_batch_tokens,
        )

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """verl's hook: one reply in, its safe score out; the raw logit goes to the dumps."""
        item = data[-1:][0]
        responses = item.batch["responses"]
        length = int(item.batch["attention_mask"][-responses.shape[-1] :].sum())
        text = self.tokenizer.decode(responses[:length], skip_special_tokens=True)
        conversation: Conversation = [*item.non_tensor_batch["raw_prompt"], Message(role="assistant", content=text)]
        score = (await self.loop.run_in_executor(None, self.scorer.score, [conversation]))[0]
        return {
            "reward_score": score.safe_score,
            "reward_extra_info": {"safe_score": score.safe_score, "logit": score.logit},
        }
