"""The replies to one prompt in one row of the batch: the prompt's tokens once, after them each reply's own.

A reply's tokens attend to the prompt and to those before them in the same reply, by a mask over the row, and are
counted on from the prompt's end, so states are those of the conversation alone. The rows of a batch stand side by side
in the layers (`layers.decoder`), which see no padding, and what several texts begin with, such as the template's words,
once. Decoders that place tokens by rotation only, with full attention, can be run like this; `can_share` names them,
all others get plain batches. Shared is what the token ids have in common, so a tokenizer may merge across the prompt's
end and texts may be cut anywhere.

Letters: B rows, W tokens of the longest row, N texts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ups_rm.layers.decoder import SCORES_AT_ONCE, DecoderLayers, is_known
from ups_rm.layers.grid import COLUMNS_BY, Distinct, Grid, cells_of, rounded

Ids = Sequence[int] | Tensor
LEAST_SHARED = 16
"""Tokens in common below which a row of its own is as good."""


@dataclass(frozen=True)
class Row:
    """Texts by number, the tokens at the beginning that they share, and the tokens of the whole row."""

    texts: tuple[int, ...]
    shared: int
    length: int


def texts_of(rows: Sequence[Row]) -> list[int]:
    """The texts of some rows, in their order."""
    return [i for row in rows for i in row.texts]


def can_share(backbone: Any) -> bool:
    """Whether `pooled_rows` takes the backbone; it attends as transformers' sdpa does."""
    return is_known(backbone) and backbone.config._attn_implementation == "sdpa"


def together_and_apart(rows: Sequence[Row], backbone: Any) -> tuple[list[Row], list[Row]]:
    """The rows of a batch that go through `pooled_rows`, and those that are better padded: (together, apart).

    Rows that share something go side by side, the others with them where the mask is small. Texts of their own that are
    long, or on a GPU, are better off with the causal kernels of transformers' forward: a mask over each row would grow
    with the square of its length, and take those that share along.
    """
    sharing, alone = ([row for row in rows if (len(row.texts) > 1) is shares] for shares in (True, False))
    scores = len(alone) * max((row.length for row in alone), default=0) ** 2 * backbone.config.num_attention_heads
    fits = backbone.device.type == "cpu" and scores <= SCORES_AT_ONCE
    return (list(rows), []) if fits else (sharing, alone)


def shared_rows(ids: Sequence[Ids], prompts: Sequence[Hashable], max_tokens: int, hidden_size: int) -> list[Row]:
    """Every text in one row; texts of equal `prompts` together where that saves anything.

    Args:
        ids: token ids of each text, at least one.
        max_tokens: upper bound of a row of several texts.
        hidden_size: of the backbone; says how long a row pays.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    rows = list[Row]()
    for texts in groups.values():
        # each text keeps a token of its own, whose state is the one that is read
        shared = min(_in_common([ids[i] for i in texts]), *(len(ids[i]) - 1 for i in texts))
        if len(texts) == 1 or shared < LEAST_SHARED:
            rows += [Row((i,), 0, len(ids[i])) for i in texts]
            continue
        limit = min(max_tokens, shared + best_own_tokens(shared, hidden_size))
        waiting, length = list[int](), shared
        for i in texts:
            own = len(ids[i]) - shared
            if waiting and length + own > limit:
                rows.append(Row(tuple(waiting), shared, length))
                waiting, length = [], shared
            waiting.append(i)
            length += own
        rows.append(Row(tuple(waiting), shared, length))
    return rows


def best_own_tokens(shared: int, hidden_size: int) -> int:
    """How many tokens of replies to put behind a prompt so that each costs least.

    A token in a row of W costs 24 H^2 in matrix products and 4 W H in attention, which looks at the whole row whatever
    the mask says: in proportion 1 + W / 6H. K tokens of replies share a prompt of S, so each costs
    (S/K + 1) (1 + (S + K) / 6H), which is least at K = sqrt(S (S + 6H)). Two replies within it never cost more than in
    rows of their own. That another row of the batch may share the prompt's products too is left out.
    """
    return isqrt(shared * (shared + 6 * hidden_size))


def _in_common(texts: Sequence[Ids]) -> int:
    """How many tokens all texts begin with."""
    shortest = min(map(len, texts))
    first, *others = (torch.as_tensor(text[:shortest]) for text in texts)
    differ = [(one != first).nonzero()[:1, 0].tolist() for one in others]
    return min((place for found in differ for place in found), default=shortest)


def pooled_rows(
    backbone: Any, rows: Sequence[Row], ids: Sequence[Ids], pooling: str, device: str | torch.device
) -> Tensor:
    """Pooled hidden states of the texts of some rows, in the order they stand there. Shape (N, H)."""
    width = rounded(max(row.length for row in rows), COLUMNS_BY)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros_like(input_ids)
    part = torch.full_like(input_ids, -1)  # 0: the prompt, 1, 2, ...: a reply, -1: padding
    spans: list[tuple[int, int, int, int]] = []  # of each text: row, shared tokens, first and last own place
    texts = [ids[i] for i in texts_of(rows)]
    distinct = iter(Distinct.of([text.tolist() if isinstance(text, Tensor) else list(text) for text in texts]).tokens)
    standing: list[tuple[int, int]] = []  # a cell of (B, W), and the token in it
    for b, row in enumerate(rows):
        part[b, : row.shared] = 0
        input_ids[b, : row.shared] = torch.as_tensor(ids[row.texts[0]][: row.shared])
        positions[b, : row.shared] = torch.arange(row.shared)
        start = row.shared
        for number, text in enumerate(row.texts, 1):
            tokens = next(distinct)
            if number == 1:
                standing += enumerate(tokens[: row.shared], b * width)
            standing += enumerate(tokens[row.shared :], b * width + start)
            own = torch.as_tensor(ids[text][row.shared :])
            place = slice(start, start + len(own))
            input_ids[b, place], part[b, place] = own, number
            positions[b, place] = torch.arange(row.shared, row.shared + len(own))
            spans.append((b, row.shared, start, start + len(own) - 1))
            start += len(own)
    part = part.to(device)
    own_part = part[:, :, None] == part[:, None, :]  # padding sees padding, so that no query sees nothing
    order = torch.arange(width, device=device)
    seen = (own_part | (part == 0)[:, None, :]) & (order[:, None] >= order)  # (B, W, W)
    cells, again = cells_of(standing, device)
    grid, layers = Grid(cells, part.numel(), again, rounded(len(cells))), DecoderLayers(backbone)
    mask = layers.additive(seen, backbone.layers[0].mlp.gate_proj.weight.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (grid.pad(y).view(len(rows), width, *y.shape[1:]) for y in (q, k, v))
        return grid.pack(layers.attention(q, k, v, mask).flatten(0, 1))

    hidden = layers(grid.pack(input_ids.to(device).flatten()), grid.pack(positions.to(device).flatten()), attend)
    token = grid.tokens.view(len(rows), width)
    if pooling == "last":
        return layers.norm(hidden[torch.stack([token[b, last] for b, _, _, last in spans])]).float()
    hidden = layers.norm(hidden).float()  # (N, H)
    return torch.stack(
        [
            (hidden[token[b, :shared]].sum(0) + hidden[token[b, first : last + 1]].sum(0)) / (shared + last + 1 - first)
            for b, shared, first, last in spans
        ]
    )
