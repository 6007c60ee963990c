"""Hidden states for head training (`ups-rm rm features`) against plain transformers, over the same texts.

SmolLM2-135M, pairs of replies as in PKU-SafeRLHF. The peers run the same token ids through `AutoModel`: in bf16 sorted
by length (in fp32 on a CPU that does not compute in bf16), and in fp32 as given, in batches of 16, and keep the last
real token's state. Real tokens per second of the forward passes alone, loading and rendering left out; what we compute
once, a prompt for its replies, the template's words for a batch, counts for each text.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from torch import Tensor

from benchmarks.result import Result, versions
from benchmarks.rm_scoring import BATCH, Peer, conversations, peers
from ups_rm.data.rows import Row


def pairs_of_replies(count: int) -> list[Row]:
    """Rows with two replies each."""
    talks = [[str(message["content"]) for message in talk] for talk in conversations(count, 2)]
    return [
        Row(prompt, first, second, True, False, 0, 0)
        for (prompt, first), (_, second) in zip(talks[::2], talks[1::2], strict=True)
    ]


def plain_states(backbone: Path, peer: Peer, ids: Sequence[Tensor]) -> Callable[[], Tensor]:
    """By transformers alone: what gives the state of each text, in their order. Shape (N, H)."""
    import torch
    from transformers import AutoModel

    from ups_rm.reward.features import pad_batch

    model = AutoModel.from_pretrained(backbone, dtype=peer.dtype).eval()
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i])) if peer.sort else list(range(len(ids)))

    @torch.inference_mode()
    def states() -> Tensor:
        out = torch.zeros(len(ids), model.config.hidden_size)
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            input_ids, mask = pad_batch([ids[i] for i in some])
            hidden = model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
            out[some] = hidden[torch.arange(len(some)), mask.sum(1) - 1].float()
        return out

    return states


def run(pairs: int = 5, rows: int = 48) -> list[Result]:
    """All three in turn, after one warm-up each."""
    from ups_rm.models import fetch
    from ups_rm.reward.feature_set import FeatureSet
    from ups_rm.reward.features import backbone_config, collect_texts, extract_features, render_texts
    from ups_rm.reward.merge import load_backbone_tokenizer, render_policy

    backbone, data = Path(fetch()), pairs_of_replies(rows)
    tokenizer = load_backbone_tokenizer(backbone, None)
    ids, _ = render_texts(tokenizer, collect_texts(data), render_policy(tokenizer, {}, backbone_config(backbone)))
    tokens = sum(map(len, ids))
    plain = {peer: plain_states(backbone, peer, ids) for peer in peers()}
    speeds: dict[Peer | None, list[float]] = {who: [] for who in (None, *plain)}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(pairs + 1):
            report = extract_features(backbone, data, Path(folder) / f"{i}.safetensors", device="cpu", progress=False)
            speeds[None].append(report.tokens_per_second)
            ours = FeatureSet.read(report.path).hidden
            for peer, states in plain.items():
                begun = perf_counter()
                theirs = states()
                speeds[peer].append(tokens / (perf_counter() - begun))
                apart = float((theirs - ours).norm() / theirs.norm())
                if apart > 0.05:
                    raise RuntimeError(f"{peer.name}: states differ by {apart:.0%} of their size, so it is other work")
    middle = {who: statistics.median(found[1:]) for who, found in speeds.items()}
    used = versions("torch", "transformers")
    return [
        Result(f"RM features, {len(ids)} texts in pairs, {tokens} tokens", middle[None], middle[peer], "tokens/s",
               peer.name, versions=used, required=peer.required)
        for peer in plain
    ]  # fmt: skip
