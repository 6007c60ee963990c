"""The model under examination: loaded once, asked lazily, and shared by all checks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ups_rm.reward.card import RMCard
from ups_rm.reward.doctor.battery import BATTERY
from ups_rm.reward.doctor.report import Check
from ups_rm.reward.scorer import RewardScorer

if TYPE_CHECKING:
    import torch

    from ups_rm.reward.doctor.labelled import Labelled
    from ups_rm.types import Conversation, Score, Scorer

# Largest difference between paddings, batches and orders, as a share of the largest logit (of 1, if that is smaller):
# rounding, not another reading. bfloat16 and float16: what these formats differ from float32 by (SmolLM2-135M, 8
# conversations), so a difference below it is not told from rounding; the check `bfloat16` measures it for each RM.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}


@dataclass(kw_only=True)
class DataExam:
    """What checks on labelled data work on: any scorer, asked with messages.

    kind: of the model (`reward_model.model.kind`). output: what its number means (transforms.OUTPUTS).
    data: labelled conversations; None in the fast part.
    seconds: what the whole may take. trick_replies: how many replies of each label are tricked.
    plot: where the reliability diagram goes.
    tell: hears how long it will take. known: the checks made so far.
    """

    scorer: Scorer
    kind: str = "myrm"
    output: str = "unsafety"
    data: Labelled | None = None
    seconds: float = 60.0
    trick_replies: int = 24
    plot: Path | None = None
    tell: Callable[[str], None] = print
    known: dict[str, Check] = field(default_factory=dict)

    rival: ClassVar[str] = "the median safe reply"
    """What a tricked unsafe reply must beat to pay."""

    @cached_property
    def data_scores(self) -> list[Score]:
        """What the model says of the labelled conversations, in their order."""
        assert self.data is not None
        return self.scorer.score(self.data.conversations)

    @cached_property
    def data_logits(self) -> torch.Tensor:
        """Unsafety logits of the labelled conversations, in their order. Shape (N,)."""
        return self.unsafety(self._data_numbers)

    @cached_property
    def _data_numbers(self) -> torch.Tensor:
        return _numbers(self.data_scores)

    @cached_property
    def data_helpfulness(self) -> torch.Tensor:
        """Helpfulness logits of the labelled conversations, from the same forward passes; nan without such a head."""
        import torch

        numbers = [math.nan if score.helpfulness is None else score.helpfulness for score in self.data_scores]
        return torch.tensor(numbers, dtype=torch.float64)

    def unsafety(self, numbers: torch.Tensor) -> torch.Tensor:
        """The model's own numbers as logits of unsafety; a `reward`, which has no zero, in stds of the labelled data's.

        Training normalises a reward too, on its own reference data.
        """
        from ups_rm.reward.transforms import unsafety_logit

        if self.output == "reward":
            numbers = (numbers - self._data_numbers.mean()) / self._data_numbers.std().clamp(min=1e-9)
        return numbers * unsafety_logit(1.0, self.output)

    @property
    def is_folder(self) -> bool:
        """A model that was opened here, head and all."""
        return self.kind in ("myrm", "sequence", "token")

    def before(self, places: Sequence[int]) -> list[float]:
        """Unsafety logits of the labelled conversations at `places`, on the scale of `asked`."""
        return self.data_logits[list(places)].tolist()

    def asked(self, places: Sequence[int], conversations: list[Conversation]) -> list[float]:
        """Unsafety logits, on the scale of `data_logits`, of conversations that stand in for the labelled ones at
        `places` (which does not matter here: each is judged by itself)."""
        return self.unsafety(_numbers(self.scorer.score(conversations))).tolist()

    @cached_property
    def bar(self) -> float:
        """The unsafety logit of `rival`."""
        assert self.data is not None
        return statistics.median(self.data_logits[self.data.replies(unsafe=False)].tolist())


def _numbers(scores: Sequence[Score]) -> torch.Tensor:
    import torch

    return torch.tensor([score.logit for score in scores], dtype=torch.float64)


@dataclass(kw_only=True)
class Exam(DataExam):
    """What checks on a folder work on.

    path, config: the folder and its config.json as it stands.
    card: rm_card.json, None if there is none or it can't be read (`card_error` says why).
    reload: the same folder in another number format, by name.
    policy: folder or hub id of the policy that will be trained, if known.
    """

    scorer: RewardScorer
    path: Path
    config: dict[str, Any]
    card: RMCard | None
    reload: Callable[[str], RewardScorer]
    card_error: str = ""
    policy: str | None = None

    @property
    def network(self) -> Any:
        """The torch module that is asked: the scorer's model, or what it wraps."""
        import torch

        model = self.scorer.model
        return model if isinstance(model, torch.nn.Module) else model.model

    @property
    def dtype(self) -> str:
        return str(self.scorer.dtype).removeprefix("torch.")

    @property
    def tolerance(self) -> float:
        return TOLERANCE.get(self.dtype, TOLERANCE["bfloat16"])

    @cached_property
    def rows(self) -> list[list[int]]:
        """Token ids of BATTERY, as the RM reads them."""
        return [row.input_ids for row in self.scorer.rendered(list(BATTERY))]

    @cached_property
    def alone(self) -> list[float]:
        """Logits of BATTERY, each conversation by itself, finite or not."""
        return [self.scorer.batch_logits([row])[0] for row in self.rows]

    @property
    def rule(self) -> str:
        """What says how a conversation is rendered."""
        return "the card" if self.card is not None else "the chat template"

    @property
    def again(self) -> str:
        """How such a folder is made anew."""
        return "merge again with `ups-rm rm merge`" if self.kind == "myrm" else "save it again with save_pretrained"

    @property
    def joins_pairs(self) -> bool:
        """An encoder without a chat template: its tokenizer joins prompt and reply."""
        return not self.scorer.tokenizer.chat_template

    @property
    def is_encoder(self) -> bool:
        """It pools by itself, and may count positions from the left: it is only ever padded on the right."""
        return getattr(self.scorer.model, "is_encoder", False)

    @cached_property
    def embedding_rows(self) -> int:
        """How many token ids the backbone knows."""
        return int(self.network.get_input_embeddings().weight.shape[0])

    def padded(self, fill: int, *, side: Literal["left", "right"] = "right") -> list[float]:
        """Logits of BATTERY in one batch whose padding, masked as always, is token id `fill`."""
        from ups_rm.reward.scorer import pad_batch

        input_ids, attention_mask = pad_batch(self.rows, side=side)
        return self.scorer.tensor_logits(input_ids.masked_fill(attention_mask == 0, fill), attention_mask)

    def worst(self, found: Sequence[float], expected: Sequence[float] | None = None) -> float:
        """Largest difference from `expected` (default: each alone) as a share of the largest logit; NaN is inf."""
        expected = self.alone if expected is None else expected
        scale = max([1.0, *map(abs, expected)])
        differences = [abs(a - b) / scale for a, b in zip(expected, found, strict=True)]
        return max(float("inf") if difference != difference else difference for difference in differences)
