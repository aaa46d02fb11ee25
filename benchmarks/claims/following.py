"""Prompts with one instruction each that a program can check, and that check: some of IFEval's instructions.

Requests are this module's own; instructions, in their own words, and their verifiers are IFEval's, from the package
if-verifiable. They are those kinds that SmolLM2-135M-Instruct follows in most of its short answers; two at once it
rarely follows. The kinds that count sentences or capital words need data of nltk and are left out.

Source: Zhou et al. 2311.07911.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gold.data import Prompt
from gold.errors import GoldError

NEEDS = "if-verifiable==0.1.2"
SYSTEM = "Answer briefly."
KINDS: Mapping[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "title": (("detectable_format:title", {}),),
    "placeholder": (("detectable_content:number_placeholders", {"num_placeholders": 1}),),
    "highlight": (("detectable_format:number_highlighted_sections", {"num_highlights": 1}),),
    "language": tuple(("language:response_language", {"language": code}) for code in ("fr", "es", "de")),
    "bullets": (("detectable_format:number_bullet_lists", {"num_bullets": 2}),),
    "section": (("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 1}),),
}
"""IFEval's instructions by a short name, with their arguments; of several, each topic has another."""
TOPICS: Mapping[str, tuple[str, ...]] = {
    "heldout": (
        *("a rainy day", "cats", "making tea", "the ocean", "winter", "a city park", "old music", "trains"),
    ),
    "train": (
        *("dogs", "a bakery", "the moon", "summer", "a library", "riding a bicycle", "coffee", "a garden"),
        *(
            "birds",
            "a long walk",
            "the desert",
            "learning to swim",
            "a birthday",
            "a small village",
            "horses",
        ),
        *("spring", "a busy market", "the stars", "cooking soup", "an old house", "rivers", "a good friend"),
        *("autumn", "painting", "the mountains", "a letter from home", "football", "bees", "a quiet evening"),
        *(
            "snow",
            "a new job",
            "apples",
            "the theatre",
            "fishing",
            "a school",
            "clouds",
            "dancing",
            "a bridge",
        ),
        *("sleep", "breakfast"),
    ),
}
"""What requests are about; no topic is in both."""


def instruction(kind: str, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """IFEval's instruction: the object that checks whether an answer follows it, and its words.

    Raises:
        GoldError: if-verifiable is not installed.
    """
    try:
        import langdetect
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise GoldError(f"IFEval's verifiers are not installed: pip install {NEEDS} ({error})") from None
    langdetect.DetectorFactory.seed = 0  # it draws at random else
    found = INSTRUCTION_DICT[kind](kind)
    return found, found.build_description(**arguments)


def asked(split: str, topics: int | None = None) -> list[Prompt]:
    """A prompt for each of so many topics of a split and each kind; its reference is what `followed` needs."""
    return [
        _prompt(name, variants[n % len(variants)], topic)
        for n, topic in enumerate(TOPICS[split][:topics])
        for name, variants in KINDS.items()
    ]


def _prompt(name: str, given: tuple[str, Mapping[str, Any]], topic: str) -> Prompt:
    kind, arguments = given
    words = instruction(kind, arguments)[1]
    turns = (
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Write a sentence about {topic}. {words}"},
    )
    return Prompt(f"{name}: {topic}", messages=turns, reference=[name, kind, dict(arguments)])


def followed(prompt: Prompt, text: str) -> bool:
    """Whether an answer, as it is, follows the prompt's instruction; an empty one does not."""
    _, kind, arguments = prompt.reference
    return bool(text.strip()) and bool(instruction(kind, arguments)[0].check_following(text))
