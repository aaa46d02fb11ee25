"""Loads prompts from files, folders and the Hub."""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gold.data.columns import Columns, Renamed
from gold.data.facts import Facts
from gold.data.formats import DATA_SUFFIXES, Rows, rows_of_file
from gold.data.prompt import content_hash, row_of
from gold.data.prompts import PromptFile, characters
from gold.errors import DataError
from gold.hub_names import IS_ID

logger = logging.getLogger(__name__)


def load_prompts(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    map: Renamed | None = None,
    route: str | None = None,
    weight: str | None = None,
    unweighted: bool = False,
    log_notes: bool = True,
) -> PromptFile:
    """The prompts of a file, a folder, a data set on the Hub, or of rows in memory, in order.

    A file holds JSON lines, a JSON array, CSV or parquet, and is recognised by its content; a folder is one that
    ``datasets`` has saved or can read. ``split`` (``train``, ``train[:1000]``) is of folders and of the Hub, where
    ``subset`` and ``revision`` choose too, and with ``streaming`` nothing is kept on disk. Rows in memory are mappings,
    or a ``datasets.Dataset``.

    The columns that are understood are in docs/data.md; ``map`` gives understood names to others:
    ``{"prompt": "text"}``, or None to columns that are not to be read. With ``route``, the column of that name, a
    string, is each prompt's route, with ``weight``, that column, a number, its weight (with ``unweighted`` 1 if it is
    missing). Without an ``id`` the key is a hash of the content, numbered if the same content occurs again. Columns
    that are not read are named in ``facts.notes``, and logged with ``log_notes``.

    Raises:
        DataError: the source is missing, empty or unreadable, or a row is no prompt; the error for a row starts with
            ``file:line`` or ``file: row number``.
    """
    columns = Columns(map, route, weight, unweighted=unweighted)
    found = _read(source, columns, split, subset, revision, streaming)
    for note in found.facts.notes if log_notes else ():
        logger.warning("%s", note)
    return found


def _read(
    source: str | Path | Iterable[Mapping[str, Any]],
    columns: Columns,
    split: str | None,
    subset: str | None,
    revision: str | None,
    streaming: bool,
) -> PromptFile:
    needed = columns.needed
    if not isinstance(source, str | Path):
        from gold.data.tables import rows_of_object

        return _prompts(rows_of_object(source, needed), columns)
    given = {"subset": subset, "revision": revision, "streaming": streaming or None}
    path = Path(source).expanduser()
    if not path.exists() and _may_be_on_hub(source):
        from gold.data.tables import rows_of_hub

        return _prompts(rows_of_hub(str(source), subset, split, revision, streaming, needed), columns)
    kind = "folder" if path.is_dir() else "file"
    given |= {} if kind == "folder" else {"split": split}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise DataError(f"{source} is a {kind}, which has no {wrong[0]}; leave {wrong[0]} out")
    if kind == "folder":
        from gold.data.tables import rows_of_folder

        return _prompts(rows_of_folder(path, split, needed), columns)
    return _prompts(rows_of_file(path, needed), columns)


def _may_be_on_hub(source: str | Path) -> bool:
    """True for a name that no data file has, and a repository on the Hub could have."""
    name = str(source)
    is_file = Path(name).suffix.lower() in DATA_SUFFIXES or name.startswith((".", "~"))
    return isinstance(source, str) and IS_ID.fullmatch(name) is not None and not is_file


def _prompts(rows: Rows, columns: Columns) -> PromptFile:
    """The prompts of rows, as bytes."""
    columns.texts = rows.texts
    held = bytearray()
    # Of each prompt: its end in `held`, size, hash, characters, weight, whether it has a completion, and messages.
    arrays: tuple[array[Any], ...] = tuple(array(code) for code in "qqQqdbb")
    appends = [column.append for column in arrays]
    number_of_key: dict[str, int] = {}  # negative where the key is the content's hash
    repeats: dict[str, int] = {}
    what = "line" if rows.format == "JSON lines" else "row"
    with contextlib.closing(rows.numbered) as numbered:
        for number, row in numbered:
            try:
                prompt, hashed = columns.prompt_of(row)
                if hashed and number_of_key.get(hashed, 0) < 0:
                    repeats[hashed] = repeats.get(hashed, 1) + 1
                    prompt = replace(prompt, key=f"{hashed}-{repeats[hashed]}")
                if before := number_of_key.get(prompt.key):
                    raise DataError(
                        f'id "{prompt.key}" was already given on {what} {abs(before)}; every id must be unique; map: '
                        "{id: null} leaves them out"
                    )
            except DataError as error:
                raise DataError(f"{rows.at(number)}: {error}") from error
            number_of_key[prompt.key] = -number if hashed else number
            held += (made := row_of(prompt))
            appends[0](len(held))
            appends[1](len(made))
            appends[2](int((hashed or content_hash(prompt))[:16], 16))
            appends[3](characters(prompt))
            appends[4](prompt.weight)
            appends[5](prompt.completion is not None)
            appends[6](prompt.messages is not None)
    if not held:
        expected = (
            'one JSON object per line, such as {"prompt": "…"}' if what == "line" else "at least one row"
        )
        raise DataError(f"{rows.name}: no prompts in it; expected {expected}")
    facts = Facts(
        rows.name,
        rows.format,
        len(arrays[0]),
        dict(columns.kinds),
        tuple(columns.used),
        tuple(columns.ignored),
        columns.blank_answers,
        rows.revision,
    )
    *numbers, completions, conversations = (np.array(column) for column in arrays)
    parts = (*numbers, completions.astype(bool), conversations.astype(bool))
    return PromptFile(held, parts, facts)
