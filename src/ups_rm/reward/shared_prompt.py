"""The replies to one prompt together: the prompt's tokens once, beside them each reply's own.

A reply's tokens attend to the prompt and to those before them in the same reply (`layers.shared_attention`), and are
counted on from the prompt's end, so states are those of the conversation alone. The texts of a batch stand side by side
in the layers (`layers.decoder`), which see no padding but up to a round number of tokens, and what several texts begin
with, such as the template's words, once. Decoders that place tokens by rotation only, with full attention, can be run
like this; `can_share` names them, all others get plain batches. Shared is what the token ids have in common, so a
tokenizer may merge across the prompt's end and texts may be cut anywhere.

Letters: N texts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ups_rm.layers.decoder import SCORES_AT_ONCE, DecoderLayers, is_known
from ups_rm.layers.grid import COLUMNS_BY, Distinct, Grid, cells_of, rounded
from ups_rm.layers.shared_attention import Replies, SharedAttention

Ids = Sequence[int] | Tensor
LEAST_SHARED = 16
"""Tokens in common below which a row of its own is as good."""
KEYS_AT_ONCE = 2**15
"""Tokens whose keys and values stand in memory once more while a block of replies attends."""


@dataclass(frozen=True)
class Row:
    """Texts of one batch by number, the tokens at the beginning that they share, and the tokens of all, those once."""

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
    long, or on a GPU, are better off with the causal kernels of transformers' forward: a mask grows with the square of
    a text's length.
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
    """Pooled hidden states of the texts of some rows, in the order they stand there. Shape (N, H)."""
    places = _places(rows, ids)
    cells, again = cells_of(places.standing, device)
    grid, layers = Grid(cells, len(places.real), again, rounded(len(cells))), DecoderLayers(backbone)
    seen, *read = places.real.to(device).split([prod(places.prompts), *(prod(shape) for shape, _ in places.blocks)])
    replies = [
        Replies(part.view(shape), None if prompts is None else torch.tensor(prompts, device=device))
        for part, (shape, prompts) in zip(read, places.blocks, strict=True)
    ]
    dtype = backbone.layers[0].mlp.gate_proj.weight.dtype
    attend = SharedAttention(layers, grid, seen.view(places.prompts), replies, dtype)
    input_ids, positions = (grid.of_tokens(part.to(device)) for part in (places.input_ids, places.positions))
    hidden = layers(input_ids, positions, attend)
    if pooling == "last":
        return layers.norm(hidden[torch.stack([grid.tokens[span[-1][1] - 1] for span in places.spans])]).float()
    hidden = layers.norm(hidden).float()  # (N', H)
    of_texts = [torch.cat([grid.tokens[begin:end] for begin, end in span]) for span in places.spans]
    return torch.stack([hidden[tokens].mean(0) for tokens in of_texts])


@dataclass(frozen=True)
class _Places:
    """Where texts stand in C cells: first what rows share, then, block by block, what each text has for itself.

    Attributes:
        input_ids, positions, real: of each cell; real is False at padding. Shape (C,).
        standing: a cell and the token in it, as `cells_of` takes them.
        spans: of each text, the cells of what it shares, if anything, and of the rest: first and last + 1.
        prompts: (G, T), of the rows that share something.
        blocks: (b, R) of each, and the prompts that its texts follow on; None for texts that share nothing.
    """

    input_ids: Tensor
    positions: Tensor
    real: Tensor
    standing: list[tuple[int, int]]
    spans: list[list[tuple[int, int]]]
    prompts: tuple[int, int]
    blocks: list[tuple[tuple[int, int], list[int] | None]]


def _places(rows: Sequence[Row], ids: Sequence[Ids]) -> _Places:
    texts = [torch.as_tensor(ids[i]) for i in texts_of(rows)]
    shared = [row.shared for row in rows for _ in row.texts]
    numbers = iter(range(len(rows)))
    number_of = [next(numbers) if row.shared > 0 else -1 for row in rows]  # of a row among those that share
    prompt = [number for row, number in zip(rows, number_of, strict=True) for _ in row.texts]
    own = [len(text) - some for text, some in zip(texts, shared, strict=True)]
    prompts = (max(number_of) + 1, rounded(max(shared), COLUMNS_BY))
    starts, count = [0] * len(texts), prod(prompts)  # of a text's own tokens, in cells
    blocks: list[tuple[tuple[int, int], list[int] | None]] = []
    for block in _blocks(own, prompt, prompts[1]):
        columns = rounded(max(own[n] for n in block), COLUMNS_BY)
        follow = [prompt[n] for n in block]
        blocks.append(((len(block), columns), None if follow[0] < 0 else follow))
        for n in block:
            starts[n], count = count, count + columns
    input_ids, positions = torch.zeros(2, count, dtype=torch.long)
    real = torch.zeros(count, dtype=torch.bool)
    standing: list[tuple[int, int]] = []
    spans: list[list[tuple[int, int]]] = []
    distinct = Distinct.of([text.tolist() for text in texts])
    for n, text in enumerate(texts):
        begin = prompt[n] * prompts[1]
        span = [(begin, begin + shared[n])] if prompt[n] >= 0 else []
        spans.append([*span, (starts[n], starts[n] + own[n])])
        first = 0
        for begin, end in spans[-1]:
            place = slice(first, first + end - begin)
            if not real[begin]:  # what is shared stands there once
                input_ids[begin:end], real[begin:end] = text[place], True
                positions[begin:end] = torch.arange(place.start, place.stop)
                standing += zip(range(begin, end), distinct.tokens[n][place], strict=True)
            first = place.stop
    return _Places(input_ids, positions, real, standing, spans, prompts, blocks)


def _blocks(own: Sequence[int], prompt: Sequence[int], width: int) -> list[list[int]]:
    """Texts by number, those with a prompt (of `width` columns) and those without (-1) apart, each block's of similar
    length: at most half as long again as its shortest, or as one of 16. A prompt's keys are copied for each of its
    replies, so blocks are bounded by `KEYS_AT_ONCE` too."""
    blocks: list[list[int]] = []
    for n in sorted(range(len(own)), key=lambda n: (prompt[n] < 0, own[n])):
        block = blocks[-1] if blocks else []
        columns = own[n] + (width if prompt[n] >= 0 else 0)
        fits = (
            len(block) > 0
            and (prompt[block[0]] < 0) is (prompt[n] < 0)
            and own[n] <= 1.5 * max(COLUMNS_BY, own[block[0]])
            and (len(block) + 1) * columns <= KEYS_AT_ONCE
        )
        if fits:
            block.append(n)
        else:
            blocks.append([n])
    return blocks
