"""The replies to one prompt in one row of the batch: the prompt's tokens once, after them each reply's own.

A reply's tokens attend to the prompt and to those before them in the same reply (`layers.shared_attention`), and are
counted on from the prompt's end, so states are those of the conversation alone. The rows of a batch stand side by side
in the layers (`layers.decoder`), which see no padding, and what several texts begin with, such as the template's words,
once. Decoders that place tokens by rotation only, with full attention, can be run like this; `can_share` names them,
all others get plain batches. Shared is what the token ids have in common, so a tokenizer may merge across the prompt's
end and texts may be cut anywhere.

Letters: N texts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ups_rm.layers.decoder import SCORES_AT_ONCE, DecoderLayers, is_known
from ups_rm.layers.grid import COLUMNS_BY, Distinct, Grid, cells_of, rounded
from ups_rm.layers.shared_attention import Replies, SharedAttention

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


def shared_rows(ids: Sequence[Ids], prompts: Sequence[Hashable], max_tokens: int) -> list[Row]:
    """Every text in one row; texts of equal `prompts` together where that saves anything.

    Args:
        ids: token ids of each text, at least one.
        max_tokens: upper bound of a row of several texts.
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
        waiting, length = list[int](), shared
        for i in texts:
            own = len(ids[i]) - shared
            if waiting and length + own > max_tokens:
                rows.append(Row(tuple(waiting), shared, length))
                waiting, length = [], shared
            waiting.append(i)
            length += own
        rows.append(Row(tuple(waiting), shared, length))
    return rows


def _in_common(texts: Sequence[Ids]) -> int:
    """How many tokens all texts begin with."""
    shortest = min(map(len, texts))
    first, *others = (torch.as_tensor(text[:shortest]) for text in texts)
    differ = [(one != first).nonzero()[:1, 0].tolist() for one in others]
    return min((place for found in differ for place in found), default=shortest)


def pooled_rows(
    backbone: Any, rows: Sequence[Row], ids: Sequence[Ids], pooling: str, device: str | torch.device
) -> Tensor:
    """Pooled hidden states of the texts of some rows, in the order they stand there. Shape (N, H).

    What a row shares is a prompt to `SharedAttention`, as is a text that has a row of its own, and what texts have for
    themselves are its replies.
    """
    texts = [torch.as_tensor(ids[i]) for i in texts_of(rows)]
    places = [(g, row.shared) for g, row in enumerate(rows) for _ in row.texts]
    width = rounded(max(row.shared or row.length for row in rows), COLUMNS_BY)
    starts = [g * width for g, _ in places]  # of a text's own tokens, in cells
    count = len(rows) * width
    own = {n: len(text) - shared for n, (text, (_, shared)) in enumerate(zip(texts, places, strict=True)) if shared}
    blocks = _of_similar_length(own)
    shapes: list[tuple[int, int]] = []
    for block in blocks:
        shapes.append((len(block), rounded(max(own[n] for n in block), COLUMNS_BY)))
        for n in block:
            starts[n], count = count, count + shapes[-1][1]
    input_ids, positions = torch.zeros(2, count, dtype=torch.long)
    real = torch.zeros(count, dtype=torch.bool)
    standing: list[tuple[int, int]] = []  # a cell, and the token in it
    distinct = Distinct.of([text.tolist() for text in texts])
    spans: list[list[tuple[int, int]]] = []  # of each text: the cells of what it shares, and of the rest
    for n, (text, (g, shared), start) in enumerate(zip(texts, places, starts, strict=True)):
        spans.append([(g * width, g * width + shared), (start, start + len(text) - shared)])
        for (begin, end), first in zip(spans[-1], (0, shared), strict=True):
            if begin < end and not real[begin]:  # what is shared stands there once
                input_ids[begin:end] = text[first : first + end - begin]
                positions[begin:end] = torch.arange(first, first + end - begin)
                real[begin:end] = True
                standing += zip(range(begin, end), distinct.tokens[n][first:], strict=False)
    input_ids, positions, real = (part.to(device) for part in (input_ids, positions, real))
    cells, again = cells_of(standing, device)
    grid, layers = Grid(cells, count, again, rounded(len(cells))), DecoderLayers(backbone)
    seen, *read = real.split([len(rows) * width, *(b * length for b, length in shapes)])
    replies = [
        Replies(part.view(shape), torch.tensor([places[n][0] for n in block], device=device))
        for part, shape, block in zip(read, shapes, blocks, strict=True)
    ]
    dtype = backbone.layers[0].mlp.gate_proj.weight.dtype
    attend = SharedAttention(layers, grid, seen.view(len(rows), width), replies, dtype)
    hidden = layers(grid.pack(input_ids), grid.pack(positions), attend)
    if pooling == "last":
        return layers.norm(hidden[torch.stack([grid.tokens[end - 1] for _, (_, end) in spans])]).float()
    hidden = layers.norm(hidden).float()  # (N', H)
    of_texts = [torch.cat([grid.tokens[begin:end] for begin, end in span]) for span in spans]
    return torch.stack([hidden[tokens].mean(0) for tokens in of_texts])


def _of_similar_length(lengths: dict[int, int]) -> list[list[int]]:
    """The keys in blocks, in each of which no length is over one and a half times the first (or one column's worth)."""
    blocks: list[list[int]] = []
    for n in sorted(lengths, key=lengths.__getitem__):
        if not blocks or lengths[n] > 1.5 * max(COLUMNS_BY, lengths[blocks[-1][0]]):
            blocks.append([])
        blocks[-1].append(n)
    return blocks
