"""Prompts: where they are read from, what their columns mean, and how they are divided."""

from gold.data.columns import LINE_KEYS, UNDERSTOOD, check_map
from gold.data.facts import Facts
from gold.data.load import load_prompts
from gold.data.prompt import MESSAGE_KEYS, ROLES, Message, Prompt, content_hash, row_of
from gold.data.prompts import (
    MOST_EXAMINED,
    LazyPrompts,
    PromptFile,
    any_messages,
    characters_of,
    examined,
    hold_out,
    lacking_completion,
    lacking_messages,
    split_by_hash,
    weights_of,
)

__all__ = [
    "LINE_KEYS",
    "MESSAGE_KEYS",
    "MOST_EXAMINED",
    "ROLES",
    "UNDERSTOOD",
    "Facts",
    "LazyPrompts",
    "Message",
    "Prompt",
    "PromptFile",
    "any_messages",
    "characters_of",
    "check_map",
    "content_hash",
    "examined",
    "hold_out",
    "lacking_completion",
    "lacking_messages",
    "load_prompts",
    "row_of",
    "split_by_hash",
    "weights_of",
]
