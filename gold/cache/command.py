"""The output of `gold cache`, as text and as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gold import terminal
from gold.cache.store import ScoreCache, merge

_TELL_S = 5.0


def facts(cache: ScoreCache) -> dict[str, Any]:
    """The contents of a cache, as JSON types."""
    size, rows = cache.size_bytes, cache.rows
    return {
        "folder": str(cache.folder),
        "teacher": cache.origin.teacher,
        "revision": cache.origin.revision,
        "vocabulary": cache.origin.vocabulary,
        "top_k": cache.origin.top_k,
        "date": cache.origin.date,
        "texts": len(cache),
        "tokens": rows,
        "bytes": size,
        "bytes_per_token": round(size / rows, 2) if rows else None,
        "shards": len(cache.shards),
        "repeated": cache.repeated,
        "damaged": len(cache.damage),
    }


def run_info(folder: Path, as_json: bool = False) -> None:
    """Prints the contents of a cache.

    Raises: TeacherError if there is none, or it cannot be read.
    """
    found = facts(ScoreCache.open(folder))
    if as_json:
        terminal.show_json(found)
        return
    for name, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        terminal.show(f"{name.replace('_', ' '):<16} {shown}")


def run_verify(folder: Path) -> bool:
    """Reads every byte of a cache, prints a line for each damaged range, and returns True if there is none.

    Raises: TeacherError if there is none, or it cannot be read.
    """
    cache = ScoreCache.open(folder)
    damage = cache.verify()
    for place in damage:
        terminal.show(place)
    advice = f"; gold cache merge NEW {folder} takes over all that is whole" if damage else ""
    terminal.show(
        f"{len(cache):,} texts in {len(cache.shards)} shards, {len(damage)} parts damaged or cut short{advice}"
    )
    return not damage


def run_merge(into: Path, sources: Sequence[Path]) -> None:
    """Merges caches and prints the resulting contents and the damage in the sources.

    Raises: GoldError as for ``merge``.
    """
    cache, damage = merge(into, sources)
    for place in damage:
        terminal.show(f"left out: {place}")
    terminal.show(summary(cache))


def summary(cache: ScoreCache) -> str:
    """The contents of a cache in one line."""
    found = facts(cache)
    each = "" if found["bytes_per_token"] is None else f", {found['bytes_per_token']:.1f} bytes per token"
    return f"{cache.folder}: {found['texts']:,} texts, {found['tokens']:,} tokens, {found['bytes']:,} bytes{each}"


def teller() -> Callable[[int, int, int], None]:
    """Prints the progress of a build, every few seconds and at its end."""
    started = reported = time.perf_counter()

    def tell(total: int, done: int, rows: int) -> None:
        nonlocal reported
        now = time.perf_counter()
        if done == total or now - reported > _TELL_S:
            reported = now
            speed = rows / (now - started)
            terminal.show(f"{done:,} of {total:,} texts, {rows:,} tokens asked, {speed:,.0f} tokens/s")

    return tell
