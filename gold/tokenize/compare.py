"""Differences between two vocabularies, for display."""

from collections.abc import Iterable

from gold.tokenize.vocabulary import Vocabulary


def differences(mine: Vocabulary, theirs: Vocabulary, limit: int = 5, texts: Iterable[str] = ()) -> list[str]:
    """One line for each difference between two vocabularies: sizes, roles, bytes of ids, and ids of sample texts.

    At most `limit` ids (and as many texts) are listed, followed by the number of the remaining ones. Empty if equal.
    """
    lines = [
        f"{role}: {here} here, {there} there"
        for role, here, there in (
            ("size", mine.size, theirs.size),
            ("stop ids", sorted(mine.stop_ids), sorted(theirs.stop_ids)),
            ("BOS id", mine.bos_id, theirs.bos_id),
            ("pad id", mine.pad_id, theirs.pad_id),
        )
        if here != there
    ]
    ids = [
        f"id {index} is {_what(mine, index)} here, {_what(theirs, index)} there"
        for index in range(min(mine.size, theirs.size) if mine.fingerprint != theirs.fingerprint else 0)
        if mine.token_bytes(index) != theirs.token_bytes(index)
    ]
    others = [line for text in texts if (line := _other_ids(mine, theirs, text))]
    for found, kind in ((ids, "ids"), (others, "texts")):
        lines += found[:limit]
        if len(found) > limit:
            lines.append(f"and {len(found) - limit} more {kind}")
    return lines


def _what(vocabulary: Vocabulary, index: int) -> str:
    """What an id stands for: the text that it writes, or a special token."""
    data = vocabulary.token_bytes(index)
    if data:
        return f"the text {data.decode('utf-8', 'backslashreplace')!r}"
    return "a special token" if vocabulary.is_special[index] else "no text"


def _other_ids(mine: Vocabulary, theirs: Vocabulary, text: str) -> str | None:
    here, there = mine.encode(text).ids.tolist(), theirs.encode(text).ids.tolist()
    if here == there:
        return None
    pairs = enumerate(zip(here, there, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(here), len(there)))
    shown = text if len(text) <= 40 else text[:40] + "…"
    return f"text {shown!r} from token {at} on: {here[at : at + 4]} here, {there[at : at + 4]} there"
