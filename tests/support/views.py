"""Texts as two of the families read them, ready to be shown."""

from __future__ import annotations

from functools import cache
from typing import Any

from support.tokenizers import EOS_ID, families

from gold.inspect.view import AlignmentView, TokenizedSide
from gold.tokenize.vocabulary import Vocabulary


@cache
def vocabulary_of(name: str) -> Vocabulary:
    """The vocabulary of a family."""
    return Vocabulary(families()[name], stop_ids=[EOS_ID])


def view_of(
    text: str | bytes, student: str = "byte-level", teacher: str = "byte-fallback", **beside: Any
) -> AlignmentView:
    """A text as two of the families read it, both with the same things beside it."""
    vocabularies = [vocabulary_of(name) for name in (student, teacher)]
    sides = [TokenizedSide(v.family, v, v.encode(text), 0.5, **beside) for v in vocabularies]
    return AlignmentView(*sides)
