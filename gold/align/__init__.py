"""Alignment of two tokenizations of one text, in bytes. Neither torch nor transformers is imported here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gold.align.chunks import Alignment as Alignment
    from gold.align.chunks import Coverage as Coverage
    from gold.align.chunks import align_tokens as align_tokens
    from gold.align.chunks import coverage as coverage
    from gold.align.overlap import PrefixMap as PrefixMap
    from gold.align.overlap import byte_equal_pairs as byte_equal_pairs
    from gold.align.overlap import longest_prefixes as longest_prefixes

_HOMES = {
    "Alignment": "chunks",
    "Coverage": "chunks",
    "PrefixMap": "overlap",
    "align_tokens": "chunks",
    "byte_equal_pairs": "overlap",
    "coverage": "chunks",
    "longest_prefixes": "overlap",
}

__all__ = [
    "Alignment",
    "Coverage",
    "PrefixMap",
    "align_tokens",
    "byte_equal_pairs",
    "coverage",
    "longest_prefixes",
]


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that the command line's help need not wait for numpy and tokenizers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"gold.align.{_HOMES[name]}"), name)
