"""The ids before a completion, and whether a completion fits after them."""

from __future__ import annotations

from typing import Protocol

from gold.data import Prompt
from gold.errors import DataError


class PromptModel(Protocol):
    """Anything that encodes prompts: a model, a teacher, or only its tokenizer."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    @property
    def context(self) -> int | None:
        """Maximum sequence length in tokens, if known."""
        ...

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids before a completion."""
        ...


def encode_prompt(model: PromptModel, prompt: Prompt, room: int) -> tuple[int, ...]:
    """The ids before a completion of up to ``room`` tokens.

    Raises:
        DataError: the prompt has no ids or leaves too little room in the model's context; the message names its key.
    """
    try:
        ids = model.prompt_ids(prompt)
    except DataError as error:
        raise DataError(f"prompt {prompt.key}: {error}") from error
    if not ids:
        raise DataError(
            f"prompt {prompt.key}: it is empty for model {model.name}, which has no token to begin a text with"
        )
    if model.context is not None and len(ids) + room > model.context:
        raise DataError(
            f"prompt {prompt.key}: {len(ids)} tokens and {room} new ones do not fit the {model.context} tokens of "
            f"model {model.name}; shorten the prompt or lower rollout.max_new_tokens"
        )
    return tuple(ids)
