"""Numbers about the replies' text: variety, length in words, refusals. No tokenizer, no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ups_rm.evaluation.refusal import is_refusal

_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+(?:['’][^\W\u3400-\u9fff]+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks; every Chinese character is a word of its own."""
    return [word.lower() for word in _WORD.findall(text)]


def word_count(text: str) -> int:
    """Words without punctuation."""
    return sum(word[0].isalnum() for word in words(text))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams, counted over all texts together (Li et al., arXiv:1510.03055).

    1 where nothing repeats, towards 0 where all replies say the same. It falls with the amount of text, so compare only
    sets of the same number of replies. nan if no text has n words.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(text: str, n: int = 4) -> float:
    """Share of the text's n-grams of words that stood in it before: 1 - different / all; 0 for fewer than n words.

    0 where nothing comes twice, towards 1 for a phrase that is repeated to the end. Source: seq-rep-n of Welleck et
    al., arXiv:1908.04319.
    """
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def prompt_overlap(prompt: str, text: str, n: int = 4) -> float:
    """Share of the text's n-grams of words that are the prompt's; 0 for fewer than n words, 1 for a copy."""
    grams, of_prompt = _grams(text, n), set(_grams(prompt, n))
    return sum(gram in of_prompt for gram in grams) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    tokens = words(text)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def common_opening(texts: Sequence[str]) -> tuple[float, str]:
    """Share of the texts that begin with the same two words, for the two words that most begin with, and these words.

    Punctuation does not count. A policy that cheats its reward model often does it by one opening for every reply, long
    before distinct-2 falls. (0, "") for no texts with a word.
    """
    openings = Counter(" ".join([word for word in words(text) if word[0].isalnum()][:2]) for text in texts)
    del openings[""]
    if not openings:
        return 0.0, ""
    opening, count = openings.most_common(1)[0]
    return count / len(texts), opening


def text_metrics(
    responses: Sequence[str], kinds: Sequence[str] | None = None, prompts: Sequence[str] | None = None
) -> dict[str, float]:
    """What a batch of replies reads like, under the names of `docs/metrics.md`.

    Args:
        responses: the replies of one batch.
        kinds: "unsafe" or "benign" per reply, the kind of its prompt; adds the refusal rate of each kind that occurs.
        prompts: the last message before each reply; adds how much of it the reply copies and, with `kinds`, how many
            different ones are harmless.
    """
    if not responses:
        return {}
    refusals = [is_refusal(response) for response in responses]
    metrics = {
        "text/refusal_rate": sum(refusals) / len(refusals),
        "text/distinct_1": distinct_n(responses, 1),
        "text/distinct_2": distinct_n(responses, 2),
        "text/unique_share": len(set(responses)) / len(responses),
        "text/repetition": sum(map(repetition, responses)) / len(responses),
    }
    if prompts is not None:
        metrics["text/prompt_overlap"] = sum(map(prompt_overlap, prompts, responses)) / len(responses)
    if prompts is not None and kinds is not None:
        benign = {prompt for prompt, kind in zip(prompts, kinds, strict=True) if kind == "benign"}
        metrics["text/benign_prompts"] = float(len(benign))
    for kind in ("unsafe", "benign"):
        of_kind = [refused for refused, its_kind in zip(refusals, kinds or (), strict=False) if its_kind == kind]
        if of_kind:
            metrics[f"text/refusal_rate_{kind}_prompts"] = sum(of_kind) / len(of_kind)
    return metrics
