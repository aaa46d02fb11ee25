"""The components of a tokenizer as JSON: normalizer, pre-tokenizer, decoder and post-processor.

A *step* is a component other than a sequence: a dict with its `type` and settings.
"""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, models

from gold.errors import VocabularyError

Description = dict[str, Any]

_CHILDREN = ("normalizers", "pretokenizers", "decoders", "processors")
_LARGEST_GROWTH = 1000


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The descriptions of a tokenizer's components by name; None for a component it lacks.

    Raises: VocabularyError if a component is written in Python.
    """
    # Serializing a whole tokenizer takes a second for a large vocabulary, so move the components to an empty one.
    shell = Tokenizer(models.BPE())
    try:
        for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
            component = getattr(tokenizer, name)
            if component is not None:
                setattr(shell, name, component)
        description: dict[str, Any] = json.loads(shell.to_str())
    except Exception as error:  # tokenizers raises bare Exception
        raise VocabularyError(f"the tokenizer's components cannot be described: {error}") from None
    return description


def build(name: str, description: Description | None) -> Any:
    """The component "normalizer" or "pre_tokenizer" built from its description."""
    if description is None:
        return None
    shell = json.loads(Tokenizer(models.BPE()).to_str())
    return getattr(Tokenizer.from_str(json.dumps(shell | {name: description})), name)


def steps(description: Description | None, kind: str | None = None) -> list[Description]:
    """The steps of a component in order, optionally only those of one type."""
    if description is None:
        return []
    for name in _CHILDREN:
        if name in description:
            return [step for child in description[name] for step in steps(child, kind)]
    return [description] if kind in (None, description["type"]) else []


def rebuilt(
    description: Description | None, change: Callable[[Description], Description | None]
) -> Description | None:
    """The description with every step replaced by `change(step)`, or dropped where that is None."""
    if description is None:
        return None
    for name in _CHILDREN:
        if name in description:
            kept = [new for child in description[name] if (new := rebuilt(child, change)) is not None]
            return description | {name: kept} if kept or not description[name] else None
    return change(description)


def without(description: Description | None, *kinds: str) -> Description | None:
    """The description without steps of the given types; None if nothing is left."""
    return rebuilt(description, lambda step: None if step["type"] in kinds else step)


def without_prefix_space(description: Description | None) -> Description | None:
    """The pre-tokenizer's description without the option that adds a space before a text."""

    def change(step: Description) -> Description:
        if step["type"] == "ByteLevel":
            return step | {"add_prefix_space": False}
        if step["type"] == "Metaspace":
            return {k: v for k, v in step.items() if k != "add_prefix_space"} | {"prepend_scheme": "never"}
        return step

    return rebuilt(description, change)


def leading_bos(tokenizer: Tokenizer) -> int | None:
    """The id that the post-processor puts before a single text; None if it adds none or several."""
    found = steps(describe(tokenizer)["post_processor"], "TemplateProcessing")
    single = found[0].get("single", []) if len(found) == 1 else []
    before = next((i for i, item in enumerate(single) if "Sequence" in item), len(single))
    if before != 1:
        return None
    index: int | None = tokenizer.token_to_id(single[0]["SpecialToken"]["id"])
    return index


def check_growth(tokenizer: Tokenizer) -> None:
    """Rejects a normalizer that can blow up a text, such as replacements that each double it.

    Raises: VocabularyError.
    """
    growth = 1.0
    for step in steps(describe(tokenizer)["normalizer"], "Replace"):
        shortest = len(step["pattern"].get("String", "").encode())
        growth *= max(1.0, len(step["content"].encode()) / max(shortest, 1))
    if growth > _LARGEST_GROWTH:
        raise VocabularyError(
            f"its normalizer can make a text more than {_LARGEST_GROWTH:,} times as long, which no tokenizer needs"
        )
