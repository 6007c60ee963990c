"""Rollout: n sampled replies per prompt, as padded tensors and as text.

Dimension letters: P prompts, n replies per prompt, B = P * n sequences, T prompt tokens, R response tokens.
Row i answers prompt i // n. Models that `decode.FastDecoder` knows run through it; any other through `generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationConfig

from ups_rm.data.prompts import encode_prompts
from ups_rm.errors import PolicyError
from ups_rm.local.decode import FastDecoder
from ups_rm.local.kept_forward import KeptForward
from ups_rm.local.policy import Policy
from ups_rm.local.sampling import Sampling, draw
from ups_rm.local.sequences import Sequences
from ups_rm.types import Conversation, Message


@dataclass(frozen=True)
class Rollout:
    """One batch of replies.

    Attributes:
        sequences: token ids and masks; the response mask is 1 up to and with the end token.
        rollout_logprobs: log-probability of each token as it was sampled (B, R), 0 at padding.
        texts: the reply as text, without the end token.
        finished: the reply ended by itself; otherwise it was cut at the limit.
        conversations: prompt messages and the reply, for the reward model.
        kept: what the training forward can take over, where it was asked for and can be had.
    """

    sequences: Sequences
    rollout_logprobs: Tensor
    texts: list[str]
    finished: list[bool]
    conversations: list[Conversation]
    kept: KeptForward | None = None

    def replaced(self, rows: list[int], new: Rollout) -> Rollout:
        """A copy in which the replies of `rows` are those of `new`, in its order; nothing is kept of either."""
        length = max(self.sequences.responses.shape[1], new.sequences.responses.shape[1])

        def merged(own: Tensor, others: Tensor) -> Tensor:
            wide = torch.nn.functional.pad(own, (0, length - own.shape[1]))
            wide[rows] = torch.nn.functional.pad(others, (0, length - others.shape[1]))
            return wide

        texts, finished, conversations = list(self.texts), list(self.finished), list(self.conversations)
        for i, row in enumerate(rows):
            texts[row], finished[row], conversations[row] = new.texts[i], new.finished[i], new.conversations[i]
        sequences = replace(
            self.sequences,
            responses=merged(self.sequences.responses, new.sequences.responses),
            response_mask=merged(self.sequences.response_mask, new.sequences.response_mask),
        )
        logprobs = merged(self.rollout_logprobs, new.rollout_logprobs)
        return Rollout(sequences, logprobs, texts, finished, conversations)


class RolloutEngine:
    """Generates with the policy's weights as they are at the first rollout after `refresh()`."""

    def __init__(self, policy: Policy, *, max_num_seqs: int = 256) -> None:
        self.policy, self.max_num_seqs = policy, max_num_seqs
        self.decoder = FastDecoder.of(policy.model)

    def refresh(self) -> None:
        """The policy has changed or is about to: give back what was laid out for decoding, a copy of all weights."""
        if self.decoder is not None:
            self.decoder.release()

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[Message]],
        *,
        n: int,
        max_new_tokens: int,
        sampling: Sampling,
        on_group: Callable[[list[Conversation]], None] | None = None,
        keep: bool = False,
    ) -> Rollout:
        """n replies to each prompt, at most `max_new_tokens` long; equal seeds give equal replies.

        Args:
            keep: the rollout is for a training forward over all of it, with the weights as they are. On CPUs only:
                elsewhere room for the longest replies takes its memory at once, and recorded steps write over theirs.
            on_group: told of a prompt's replies once all have ended, if others are still decoded then. Only where the
                decoder is ours.
        """
        if not prompts:
            raise PolicyError("a rollout needs at least one prompt")
        ids = encode_prompts(self.policy.tokenizer, prompts)
        uniforms = sampling.uniforms(len(prompts) * n, max_new_tokens)
        rows: list[tuple[Tensor, Tensor]] = []  # (tokens, logprobs) per sequence
        per_call = max(1, self.max_num_seqs // n)
        keep = keep and len(uniforms) <= self.max_num_seqs and self.policy.device.type == "cpu"
        kept = self.decoder.kept_forward() if self.decoder is not None and keep else None
        for start in range(0, len(ids), per_call):
            chunk = ids[start : start + per_call]
            drawn = uniforms[start * n : (start + len(chunk)) * n]
            for part in drawn.split(self.max_num_seqs):  # one, unless n > max_num_seqs; then the chunk is one prompt
                replies = len(part) // len(chunk)
                given = (chunk, replies, max_new_tokens, self.policy.eos_ids, sampling, part)
                if self.decoder is None:
                    rows += self._generate_plain(*given)
                elif on_group is None or replies < n:
                    rows += self.decoder.generate(*given, kept=kept)
                else:
                    told: set[int] = set()
                    ended = self._by_group(prompts[start : start + per_call], n, on_group, told)
                    rows += self.decoder.generate(*given, ended=ended, kept=kept)
                    if start + per_call < len(ids):  # others are still to be decoded
                        self._tell_rest(prompts[start : start + per_call], rows[start * n :], n, on_group, told)
        return replace(self._pack(prompts, ids, rows, n), kept=kept)

    def _by_group(
        self, prompts: list[list[Message]], n: int, on_group: Callable[[list[Conversation]], None], told: set[int]
    ) -> Callable[[int, Tensor], None]:
        """What the decoder tells of rows, told of whole groups; their numbers are noted in `told`."""
        waiting: dict[int, dict[int, Tensor]] = {}

        def ended(row: int, tokens: Tensor) -> None:
            group = waiting.setdefault(row // n, {})
            group[row] = tokens
            if len(group) == n:
                told.add(row // n)
                on_group([self._conversation(prompts[row // n], group[i]) for i in sorted(group)])

        return ended

    def _tell_rest(
        self,
        prompts: list[list[Message]],
        rows: list[tuple[Tensor, Tensor]],
        n: int,
        on_group: Callable[[list[Conversation]], None],
        told: set[int],
    ) -> None:
        """Groups of a chunk whose last reply ended with it."""
        for group in {*range(len(prompts))} - told:
            on_group([self._conversation(prompts[group], tokens) for tokens, _ in rows[group * n : (group + 1) * n]])

    def _conversation(self, prompt: list[Message], tokens: Tensor) -> Conversation:
        text = self.policy.tokenizer.decode(tokens, skip_special_tokens=True)
        return [*prompt, Message(role="assistant", content=text)]

    def _generate_plain(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        eos_ids: list[int],
        sampling: Sampling,
        uniforms: Tensor,
    ) -> list[tuple[Tensor, Tensor]]:
        """`FastDecoder.generate` by way of transformers' `generate`, for architectures that the decoder does not know.

        Our own `draw` picks the tokens as a logits processor, and the folder's generation settings (repetition penalty
        and the like) are set aside: replies must come from the policy that is trained, not from a changed one.
        """
        device, pad, model = self.policy.device, self.policy.pad_id, self.policy.model
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        uniforms = uniforms.to(device)
        drawn: list[Tensor] = []  # log-probabilities, one tensor (b,) per position

        def pick(_: Tensor, logits: Tensor) -> Tensor:
            token, logprob, _ = draw(logits, sampling, uniforms[:, len(drawn)])
            drawn.append(logprob)
            return torch.full_like(logits, float("-inf")).scatter_(1, token[:, None], 0.0)

        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            tokens = model.generate(
                input_ids=ids.repeat_interleave(n, 0),
                attention_mask=mask.repeat_interleave(n, 0),
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_ids,
                pad_token_id=pad,
                do_sample=False,
                logits_processor=[pick],
            )[:, width:]  # (b, R)
        finally:
            model.generation_config = own
        logprobs = torch.stack(drawn, dim=1)
        ends = torch.isin(tokens, torch.tensor(eos_ids, device=device))
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1])
        return [(tokens[i, :k].cpu(), logprobs[i, :k].cpu()) for i, k in enumerate(lengths.tolist())]

    def _pack(
        self, prompts: list[list[Message]], ids: list[list[int]], rows: list[tuple[Tensor, Tensor]], n: int
    ) -> Rollout:
        pad, eos = self.policy.pad_id, set(self.policy.eos_ids)
        batch, width = len(rows), max(map(len, ids))
        length = max(1, max(len(tokens) for tokens, _ in rows))
        prompt_ids = torch.full((batch, width), pad)
        prompt_mask = torch.zeros(batch, width, dtype=torch.long)
        responses, logprobs = torch.full((batch, length), pad), torch.zeros(batch, length)
        response_mask = torch.zeros(batch, length, dtype=torch.long)
        texts, finished, conversations = [], [], []
        for i, (tokens, lps) in enumerate(rows):
            own = ids[i // n]
            prompt_ids[i, width - len(own) :] = torch.tensor(own)
            prompt_mask[i, width - len(own) :] = 1
            responses[i, : len(tokens)], logprobs[i, : len(tokens)] = tokens, lps
            response_mask[i, : len(tokens)] = 1
            conversations.append(self._conversation(prompts[i // n], tokens))
            texts.append(conversations[-1][-1]["content"])
            finished.append(len(tokens) > 0 and int(tokens[-1]) in eos)
        device = self.policy.device
        sequences = Sequences(
            prompts=prompt_ids.to(device),
            prompt_mask=prompt_mask.to(device),
            responses=responses.to(device),
            response_mask=response_mask.to(device),
            group_ids=torch.arange(len(prompts), device=device).repeat_interleave(n),
        )
        return Rollout(
            sequences=sequences,
            rollout_logprobs=logprobs.to(device),
            texts=texts,
            finished=finished,
            conversations=conversations,
        )
