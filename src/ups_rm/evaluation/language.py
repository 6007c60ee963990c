"""Which script a text is written in, to see whether a Chinese prompt still gets a Chinese reply.

By Unicode names, without a model: it tells Chinese from English, Russian or Arabic, and not English from French, nor
Chinese from Japanese without kana.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

from ups_rm.evaluation.text import words


def main_script(text: str) -> str | None:
    """The script of most words ("latin", "cjk", "kana", "cyrillic", "hangul", ...); every Chinese character is a word.

    None where no word has a letter. Text with kana in at least a tenth of its Chinese and Japanese words is "kana".
    """
    scripts = Counter(unicodedata.name(word[0], "?").split()[0].lower() for word in words(text) if word[0].isalpha())
    scripts["kana"] = scripts.pop("hiragana", 0) + scripts.pop("katakana", 0)
    if 10 * scripts["kana"] >= scripts["kana"] + scripts["cjk"] > 0:
        scripts["kana"] += scripts.pop("cjk", 0)
    script, count = max(sorted(scripts.items()), key=lambda item: item[1])
    return script if count else None


def keeps_language(prompt: str, reply: str) -> float | None:
    """1.0 if prompt and reply are in the same script, 0.0 if not; None where either has no words."""
    scripts = main_script(prompt), main_script(reply)
    return None if None in scripts else float(scripts[0] == scripts[1])
