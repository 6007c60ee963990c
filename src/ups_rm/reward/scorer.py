"""Safe scores for conversations: the one scorer of the local engine, verl, the server and the evaluation.

Messages in, `Score`s out, in input order. The RM's own tokenizer and chat template render them (render.py), batches are
sorted by length with little padding (batching.py), the replies to one prompt share its tokens (shared_prompt.py), the
last attended token is read by mask, the head is float32. A folder with a second head gives the helpfulness logit from
the same forward pass.

The sign of unsafety is turned in transforms.py and nowhere else: `safe_score(logit)`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ups_rm.console import progress_bar
from ups_rm.device import compute_dtype, torch_device
from ups_rm.errors import RMError
from ups_rm.reward.batching import ENOUGH_TOKENS, token_batches
from ups_rm.reward.card import RMCard, verify_answers, verify_folder
from ups_rm.reward.native import compute_context, heads_of, load_model, load_tokenizer, read_config, rm_folder
from ups_rm.reward.render import DEFAULT_MAX_LENGTH, Rendered, RenderPolicy, render
from ups_rm.reward.transforms import safe_score
from ups_rm.types import Conversation, Score

if TYPE_CHECKING:
    import torch

    from ups_rm.reward.shared_prompt import Row

# Largest difference between a golden logit and the one computed now (other number format, other machine), as a share of
# the largest golden logit, by the coarser of the two number formats. Measured with SmolLM2-135M: 1e-5 and 0.04.
LOGIT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
Answer = tuple[float, ...]
"""The logits of one conversation, one of each head, in the order of config.json's `heads`."""
NO_SAFETY = (
    "this RM has a helpfulness head alone (config.json, heads): it can't judge safety\n"
    "  fix: name it as reward_model.helpfulness.path, beside an RM for safety; or merge both heads into one folder "
    "(ups-rm rm merge --helpfulness-head)"
)


class RewardScorer:
    """A loaded reward model that scores conversations.

    `model` maps (input_ids, attention_mask) of shape (B, T) to logits of shape (B, heads); `heads` names its columns.
    `card` is None for a folder that came without one. `pad_id` is what batches are padded with: it is masked, but some
    encoders count positions by it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policy: RenderPolicy,
        *,
        card: RMCard | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype,
        max_batch_tokens: int = 8192,
        native: bool = True,
        pad_id: int = 0,
        heads: Sequence[str] = ("unsafety",),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.policy = policy
        self.card = card
        self.device = device
        self.dtype = dtype
        self.max_batch_tokens = max_batch_tokens
        self.native = native
        self.pad_id = pad_id
        self.heads = tuple(heads)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        max_batch_tokens: int = 8192,
        chat_template: str | None = None,
        attn_implementation: str | None = None,
        safety: bool = True,
    ) -> RewardScorer:
        """Load an RM folder and check it against its card.

        Args:
            dtype: "auto" computes the backbone in bfloat16 where the hardware does, else float32 (ups_rm.device).
            trust_remote_code: run the folder's own Python files instead of ours.
            max_batch_tokens: upper bound of a batch, padding included.
            chat_template: text of a template, for folders whose tokenizer has none.
            safety: it is to judge safety; False takes a folder with a helpfulness head alone as well.

        Raises:
            RMError: weights missing or unexpected; no chat template; the card does not match, by field; no head for
                unsafety, where `safety` is asked for.
        """
        path = rm_folder(folder)
        heads = heads_of(read_config(path), path)
        if safety:
            check_judges_safety(heads, path)
        device = str(torch_device(device))
        number_format = compute_dtype(dtype, device)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        card = RMCard.read(path)
        if card is None:
            warnings.warn(
                f"{path} has no rm_card.json, so nothing shows that it still is the model it was; "
                f"`ups-rm rm card {path}` writes one",
                stacklevel=2,
            )
            policy = RenderPolicy.infer(tokenizer, max_length=default_max_length(read_config(path), tokenizer))
        else:
            policy = card.render
            verify_folder(card, path, tokenizer)
        model = load_model(
            path,
            dtype=number_format,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        scorer = cls(
            model,
            tokenizer,
            policy,
            card=card,
            device=device,
            dtype=number_format,
            max_batch_tokens=max_batch_tokens,
            native=not trust_remote_code,
            heads=heads,
        )
        if card is not None:
            answers = scorer.answers(render(tokenizer, [golden.messages for golden in card.golden], policy))
            verify_answers(card, path, answers, logit_tolerance(card.dtype, number_format))
        return scorer

    def score(self, conversations: Sequence[Conversation], *, progress: bool = False) -> list[Score]:
        """One Score per conversation, in input order.

        Args:
            conversations: messages that end with the reply to score, which may be empty.
            progress: show a progress bar.

        Raises:
            RMError: a malformed conversation, a logit that is not finite, or no head for unsafety.
        """
        rendered = self.rendered(conversations)
        prompts = [str(conversation[:-1]) for conversation in conversations]
        answers = self.answers(rendered, prompts=prompts, progress=progress)
        return [score_of_answer(self.heads, answer, row) for row, answer in zip(rendered, answers, strict=True)]

    def helpfulness(self, conversations: Sequence[Conversation]) -> list[float]:
        """Helpfulness logit of each conversation's last reply, higher = more helpful, in input order.

        Raises:
            RMError: a malformed conversation, a logit that is not finite, or no head for helpfulness.
        """
        if "helpfulness" not in self.heads:
            raise RMError("the RM has no helpfulness head\n  fix: ups-rm rm train --target both, then ups-rm rm merge")
        prompts = [str(conversation[:-1]) for conversation in conversations]
        column = self.heads.index("helpfulness")
        return [answer[column] for answer in self.answers(self.rendered(conversations), prompts=prompts)]

    def rendered(self, conversations: Sequence[Conversation], policy: RenderPolicy | None = None) -> list[Rendered]:
        """Token ids of conversations as this RM reads them, in input order; by another policy if one is given.

        Raises:
            RMError: a malformed conversation, see `render`.
        """
        return render(self.tokenizer, conversations, policy or self.policy)

    @property
    def enough_tokens(self) -> int:
        """Padded tokens from which on a batch is full enough to refuse padding (`token_batches`)."""
        import torch

        return ENOUGH_TOKENS if torch.device(self.device).type == "cpu" else self.max_batch_tokens // 2

    def logits(self, rendered: Sequence[Rendered]) -> list[float]:
        """The first head's raw logits, see `answers`: unsafety, unless there is none."""
        return [answer[0] for answer in self.answers(rendered)]

    def answers(
        self, rendered: Sequence[Rendered], *, prompts: Sequence[Hashable] | None = None, progress: bool = False
    ) -> list[Answer]:
        """Raw logits of every head for rendered conversations, in input order; the same whatever batch one falls in.

        Args:
            prompts: equal for conversations that differ in the last message only: what they share is computed once.

        Raises:
            RMError: a logit that is not finite.
        """
        from ups_rm.reward.shared_prompt import texts_of

        ids = [row.input_ids for row in rendered]
        rows = self.rows_of(ids, prompts)
        batches = token_batches([row.length for row in rows], self.max_batch_tokens, enough_tokens=self.enough_tokens)
        answers: list[Answer] = [()] * len(rendered)
        pays = sum(row.length for row in rows) >= ENOUGH_TOKENS  # laying out takes as long as scoring some 100 tokens
        with (
            progress_bar("scoring", len(rendered), enabled=progress) as advance,
            self.laid_out() if pays else nullcontext(),
        ):
            for batch in batches:
                some = [rows[i] for i in batch]
                texts = texts_of(some)
                for i, answer in zip(texts, self.row_answers(some, ids), strict=True):
                    answers[i] = answer
                advance(len(texts))
        broken = [i for i, answer in enumerate(answers) if not all(map(math.isfinite, answer))]
        if broken:
            head, value = next(
                one for one in zip(self.heads, answers[broken[0]], strict=True) if not math.isfinite(one[1])
            )
            named = "" if head == "unsafety" else f" of {head}"
            raise RMError(
                f"the RM's logit{named} is {value} for conversation {broken[0]} ({len(broken)} of {len(answers)} "
                f"are not finite), computed in {self.dtype}\n  fix: dtype float32, and `ups-rm rm check` on the folder"
            )
        return answers

    def rows_of(self, ids: Sequence[Sequence[int]], prompts: Sequence[Hashable] | None = None) -> list[Row]:
        """What batches are made of: each text in a row of its own, or those of equal `prompts` in one (`answers`)."""
        from ups_rm.reward.shared_prompt import Row, shared_rows

        if prompts is None or not self.packs:
            return [Row((i,), 0, len(one)) for i, one in enumerate(ids)]
        return shared_rows(ids, prompts, self.max_batch_tokens)

    def laid_out(self) -> AbstractContextManager[None]:
        """Within, `row_answers` is faster, see `layers.linear`."""
        from ups_rm.layers.linear import laid_out

        return laid_out(self.model.model.layers) if self.packs else nullcontext()

    @property
    def packs(self) -> bool:
        """Whether texts go through the layers side by side (`shared_prompt`), not as padded rows."""
        from ups_rm.reward.shared_prompt import can_share

        return self.native and hasattr(self.model, "head_logits") and can_share(self.model.model)

    def batch_logits(self, rows: Sequence[Sequence[int]], *, side: Literal["left", "right"] = "right") -> list[float]:
        """The first head's logits of one batch of token ids, see `batch_answers`."""
        return [answer[0] for answer in self.batch_answers(rows, side=side)]

    def batch_answers(self, rows: Sequence[Sequence[int]], *, side: Literal["left", "right"] = "right") -> list[Answer]:
        """Every head's logits of one batch of token ids, padded on `side`; as the model gives them, finite or not.

        Raises:
            RMError: logits of another shape than (batch, heads).
        """
        return self.tensor_answers(*pad_batch(rows, side=side, pad_id=self.pad_id))

    def row_answers(self, rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> list[Answer]:
        """Every head's logits of one batch of rows (`rows_of`), in the order texts stand there; finite or not.

        Side by side or, where that is slower (`together_and_apart`), as padded texts.
        """
        import torch

        from ups_rm.reward.shared_prompt import pooled_rows, texts_of, together_and_apart

        together, apart = together_and_apart(rows, self.model.model) if self.packs else ([], rows)
        answers: dict[int, Answer] = {}
        if together:
            with torch.inference_mode(), compute_context(self.dtype, self.device):
                hidden = pooled_rows(self.model.model, together, ids, self.model.config.pooling, self.device)
                found = self.model.head_logits(hidden).float().tolist()
            answers |= zip(texts_of(together), map(tuple, found), strict=True)
        if apart:
            texts = texts_of(apart)
            answers |= zip(texts, self.batch_answers([ids[i] for i in texts]), strict=True)
        return [answers[i] for i in texts_of(rows)]

    def tensor_logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[float]:
        """The first head's logits of one batch that is padded already, see `tensor_answers`."""
        return [answer[0] for answer in self.tensor_answers(input_ids, attention_mask)]

    def tensor_answers(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[Answer]:
        """Every head's logits of one batch that is padded already; both arguments have shape (B, T).

        Raises:
            RMError: logits of another shape than (batch, heads).
        """
        import torch

        number_format = compute_context(self.dtype, self.device) if self.native else nullcontext()
        with torch.inference_mode(), number_format:
            answer = self.model(
                input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device)
            ).logits
        expected = (len(input_ids), len(self.heads))
        if answer.shape != expected:
            raise RMError(f"the RM gives logits of shape {tuple(answer.shape)}, expected {expected}")
        return [tuple(one) for one in answer.float().tolist()]


def score_of_answer(heads: Sequence[str], answer: Answer, row: Rendered) -> Score:
    """What the heads' logits for one rendered conversation mean.

    Raises:
        RMError: none of them is the unsafety logit.
    """
    told = dict(zip(heads, answer, strict=True))
    if "unsafety" not in told:
        raise RMError(NO_SAFETY)
    logit = told["unsafety"]
    return Score(
        logit=logit,
        safe_score=safe_score(logit),
        tokens=len(row.input_ids),
        truncated=row.truncated,
        helpfulness=told.get("helpfulness"),
    )


def check_judges_safety(heads: Sequence[str], folder: Path) -> None:
    """Raises RMError for a folder that has a helpfulness head alone."""
    if "unsafety" not in heads:
        raise RMError(f"{folder}: {NO_SAFETY}")


def pad_batch(
    rows: Sequence[Sequence[int]], *, side: Literal["left", "right"] = "right", pad_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (B, T). Padding is id 0 by default, which every vocabulary has: it is never read."""
    import torch

    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        input_ids[i, place] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, place] = 1
    return input_ids, attention_mask


def default_max_length(config: dict[str, Any], tokenizer: Any) -> int:
    """What model and tokenizer can take, at most 4096 tokens."""
    limits = [DEFAULT_MAX_LENGTH, config.get("max_position_embeddings"), getattr(tokenizer, "model_max_length", None)]
    return min(int(limit) for limit in limits if isinstance(limit, int) and limit >= 8)


def logit_tolerance(card_dtype: str, dtype: torch.dtype) -> float:
    """How far a golden logit may lie from the one computed now."""
    names = (card_dtype, str(dtype).removeprefix("torch."))
    return max(LOGIT_TOLERANCE.get(name, LOGIT_TOLERANCE["bfloat16"]) for name in names)
