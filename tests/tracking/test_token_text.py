"""Where a token ends in the text, on a tokenizer whose tokens need not be whole characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import llama3_tokenizer, qwen_tokenizer
from ups_rm.tracking.token_text import token_ends

TOKENIZERS = {"qwen": qwen_tokenizer(), "llama3": llama3_tokenizer()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(alphabet="how do bake! 面包é🙂\n<>", max_size=40))
def test_a_prefix_of_tokens_ends_where_its_text_does(name: str, text: str) -> None:
    """The oracle decodes every prefix as a whole; where that is no whole text, a character is not finished yet."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    [ends] = token_ends(tokenizer, [ids], [text])
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    for count, end in enumerate(ends, start=1):
        prefix = tokenizer.decode(ids[:count])
        if "\ufffd" not in prefix:
            assert text[:end] == prefix
    assert not ids or ends[-1] == len(text)


def test_end_tokens_and_broken_bytes_take_no_text() -> None:
    tokenizer = TOKENIZERS["qwen"]
    end = tokenizer.eos_token_id
    half = tokenizer("面", add_special_tokens=False)["input_ids"][:1]
    ids = [*tokenizer("wait", add_special_tokens=False)["input_ids"], *half, end]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    [ends] = token_ends(tokenizer, [ids], [text])
    assert ends[-1] == len(text)
    assert text[: ends[-3]] == "wait"
    assert token_ends(tokenizer, [[], [end]], ["", ""]) == [[], [0]]
