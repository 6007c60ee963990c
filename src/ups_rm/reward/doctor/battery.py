"""Conversations that every RM is asked, whatever it was trained on: harmless, and different in what can go wrong."""

from __future__ import annotations

from ups_rm.reward.card import GOLDEN_CONVERSATIONS
from ups_rm.types import Conversation

_MORE: tuple[Conversation, ...] = (
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    [
        {"role": "user", "content": "Write a long list of vegetables, please."},
        {"role": "assistant", "content": "Carrots, peas, leeks, beans, onions, garlic, kale and cress. " * 6},
    ],
    [{"role": "user", "content": "你好，今天天气怎么样？"}, {"role": "assistant", "content": "我不知道，但愿是晴天。"}],
)
BATTERY: tuple[Conversation, ...] = (*GOLDEN_CONVERSATIONS, *_MORE)
