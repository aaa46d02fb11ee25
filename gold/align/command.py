"""The body of `gold align`: two tokenizers, a text, and where their tokens end."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from gold.align.chunks import Alignment, align_tokens, coverage
from gold.align.vocabulary import Spelling, Vocabulary
from gold.errors import DataError


def run_align(
    text: str | None,
    *,
    student: str,
    teacher: str,
    as_json: bool = False,
    jsonl: Path | None = None,
    file: Path | None = None,
    color: bool = True,
    stream: TextIO | None = None,
) -> None:
    """Writes the alignment of one text, of a file, or of each line of a JSON Lines file to the stream.

    Exactly one of `text`, `file` and `jsonl` is given. `jsonl` answers one JSON object per line that has a `text`.
    There are colours only on a terminal, and only if `color`.

    Raises: DataError for a text that cannot be read, VocabularyError for a tokenizer.
    """
    if sum(source is not None for source in (text, jsonl, file)) != 1:
        raise DataError("give exactly one of TEXT, --file and --jsonl")
    out = stream or sys.stdout
    if jsonl is not None:
        texts = _texts_of(jsonl)
        sides = Vocabulary.load(student), Vocabulary.load(teacher)
        for line in texts:
            print(json.dumps(describe(*_align(line, *sides))), file=out)
        return
    data = _bytes_of(file) if file is not None else os.fsencode(text or "")
    aligned = _align(data, Vocabulary.load(student), Vocabulary.load(teacher))
    if as_json:
        print(json.dumps(describe(*aligned)), file=out)
        return
    from rich.console import Console

    from gold.align.show import show_alignment

    show_alignment(
        *aligned, Console(file=out, no_color=not color, highlight=False, emoji=False, markup=False)
    )


def describe(student: Spelling, teacher: Spelling, alignment: Alignment) -> dict[str, Any]:
    """An alignment as JSON: ids and byte ends of both sides, and chunks as half-open ranges of their tokens."""
    return {
        "bytes": len(student.data),
        "student": _describe_side(student),
        "teacher": _describe_side(teacher),
        "chunks": alignment.chunks.tolist(),
        "repaired_bytes": student.repaired_bytes + teacher.repaired_bytes,
        "coverage": asdict(coverage(student, teacher, alignment)),
    }


def _describe_side(spelling: Spelling) -> dict[str, Any]:
    return {
        "ids": spelling.ids.tolist(),
        "ends": spelling.ends.tolist(),
        "repaired_bytes": spelling.repaired_bytes,
    }


def _align(
    text: str | bytes, student: Vocabulary, teacher: Vocabulary
) -> tuple[Spelling, Spelling, Alignment]:
    spelling_S, spelling_T = student.encode(text), teacher.encode(text)
    return spelling_S, spelling_T, align_tokens(spelling_S, spelling_T)


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _texts_of(file: Path) -> Iterator[str]:
    """The text of each line; lines of white space are passed over."""
    for number, line in enumerate(_bytes_of(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: no JSON: {error}") from None
        found = record.get("text") if isinstance(record, dict) else None
        if not isinstance(found, str):
            raise DataError(f'{file}:{number}: needs an object with a string "text", got {line[:60]!r}')
        yield found
