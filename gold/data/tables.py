"""The rows of tables: parquet files, folders saved or read by `datasets`, data sets on the Hub."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gold.data.formats import Numbered, Rows
from gold.errors import DataError, did_you_mean
from gold.files import one_line
from gold.hub_names import fault_line, named_revision

logger = logging.getLogger(__name__)

_BATCH = 1000
_SLICE = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")
_DATA = {".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"}
_FACTS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_CLASS = re.compile(r" with error <class '[^']*'>")
_OTHER_TYPES = ("timestamp", "date", "time", "duration", "decimal", "binary")


def rows_of_parquet(path: Path, columns: set[str]) -> Rows:
    """The rows of a parquet file, of its columns those that are needed and the names of the others.

    Raises:
        DataError: pyarrow is not installed, or the file cannot be read.
    """
    check_installed(f"{path} is a parquet file", "pyarrow")
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
    except (ArrowException, OSError) as fault:
        raise DataError(f"{path} is no parquet file that can be read: {one_line(fault)}") from None
    names = file.schema_arrow.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has several columns named {_listed(twice)}; give each a name of its own")
    wanted = _wanted(names, columns)

    def batches() -> Iterator[Any]:
        try:
            yield from file.iter_batches(batch_size=_BATCH, columns=wanted)
        except (ArrowException, OSError) as fault:
            raise DataError(f"{path} is broken: {one_line(fault)}; fetch it again") from None

    schema = file.schema_arrow
    return Rows(
        str(path), "parquet", _numbered(batches(), names, wanted, [schema.field(n).type for n in wanted])
    )


def rows_of_folder(path: Path, split: str | None, columns: set[str]) -> Rows:
    """The rows of a folder that `datasets` has saved, or of the data files in a folder as `datasets` finds them.

    Raises:
        DataError: `datasets` is not installed, the folder holds no data, or not that split.
    """
    check_installed(f"{path} is a folder", "datasets")
    import datasets

    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    with _as_data_error(str(path)), _quiet():
        if saved:
            found: Any = datasets.load_from_disk(str(path))
            if isinstance(found, datasets.DatasetDict):
                name, first, last = _chosen(str(path), list(found), split)
                return _rows_of_dataset(
                    _cut(found[name], first, last), f"{path} ({name})", "saved data set", columns
                )
            _, first, last = _chosen(str(path), [split or "all"], split)
            return _rows_of_dataset(_cut(found, first, last), str(path), "saved data set", columns)
        builder = datasets.load_dataset_builder(str(path))
        _note_unread(path, builder.config.data_files or {})
        name, first, last = _chosen(str(path), _splits_of(builder), split)
        streamed = _cut(builder.as_streaming_dataset(split=name), first, last)
        return _rows_of_dataset(streamed, f"{path} ({name})", "folder of data files", columns)


def _note_unread(path: Path, read: Mapping[str, Iterable[str]]) -> None:
    """Logs which data files of a folder `datasets` leaves out: it reads one format, and if some files are named for
    splits, these alone."""
    known = {Path(name).resolve() for names in read.values() for name in names}
    files = (
        file for file in path.rglob("*") if _DATA & {s.lower() for s in file.suffixes} and file.is_file()
    )
    named = {file: str(file.relative_to(path)) for file in files if file.resolve() not in known}
    if left := sorted(n for file, n in named.items() if file.name not in _FACTS and not n.startswith(".")):
        logger.warning(
            "%s: not read: %s; in a folder `datasets` reads the files of one format, or those named for splits",
            *(path, _listed(left)),
        )


def rows_of_hub(
    name: str, subset: str | None, split: str | None, revision: str | None, streaming: bool, columns: set[str]
) -> Rows:
    """The rows of a data set on the Hub, at the commit that the revision is now.

    Raises:
        DataError: `datasets` is not installed; no such data set, revision, subset or split; no access, no network.
    """
    name, revision = named_revision(name, revision)
    check_installed(f"{name}: no such file or folder; to read it as a data set of the Hub", "datasets")
    commit = _commit(name, revision)
    import datasets

    with _as_data_error(name):
        subsets = datasets.get_dataset_config_names(name, revision=commit)
        if subset is None and len(subsets) > 1 and "default" not in subsets:
            raise DataError(f"{name} has the subsets {_listed(subsets)}: choose one (data.subset)")
        if subset is not None and subset not in subsets:
            near = did_you_mean(subset, subsets, f"; it has {_listed(subsets)}")
            raise DataError(f"{name} has no subset {subset}{near} (data.subset)")
        builder = datasets.load_dataset_builder(name, subset, revision=commit)
        part, first, last = _chosen(name, _splits_of(builder), split)
        if streaming:
            found: Any = builder.as_streaming_dataset(split=part)
        else:
            builder.download_and_prepare()
            found = builder.as_dataset(split=part)
        found = _cut(found, first, last)
    said = ", ".join(filter(None, (subset, split or part)))
    rows = _rows_of_dataset(found, f"{name} ({said})", "data set of the Hub", columns)
    rows.revision = commit or rows.revision
    return rows


def rows_of_object(given: Iterable[Any], columns: set[str]) -> Rows:
    """The rows of a `datasets` object, or of any sequence of mappings."""
    if hasattr(given, "with_format") and hasattr(given, "features"):
        return _rows_of_dataset(given, "the data set", type(given).__name__, columns)
    return Rows("the rows", "mappings", _mappings(given))


def _mappings(given: Iterable[Any]) -> Numbered:
    for number, row in enumerate(given, start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"the rows: row {number} is a {type(row).__name__}; expected a mapping of columns"
            )
        yield number, row


def check_installed(needs: str, package: str) -> None:
    """Checks that tables can be read.

    Raises:
        DataError: the package is not installed.
    """
    if find_spec(package) is None:
        raise DataError(f"{needs}: pip install 'gold-distill[data]'")


def _rows_of_dataset(found: Any, name: str, kind: str, columns: set[str]) -> Rows:
    """The rows of a `datasets` object, as Arrow tables: no image or sound in them is decoded."""
    names = list(found.column_names or ()) if found.column_names is not None else None
    if names is None:  # a stream of unknown columns
        batches, wanted = found.with_format("arrow").iter(batch_size=_BATCH), None
        numbered = _numbered(batches, (), wanted, ())
    else:
        wanted = _wanted(names, columns)
        types = [f"{found.features[n]}" for n in wanted] if found.features else ["binary"]
        batches = found.select_columns(wanted).with_format("arrow").iter(batch_size=_BATCH)
        numbered = _numbered(batches, names, wanted, types)
    return Rows(name, kind, _guarded(name, numbered), revision=getattr(found, "_fingerprint", None))


def _guarded(name: str, numbered: Numbered) -> Numbered:
    """The rows, errors of `datasets` as one line."""
    with _as_data_error(name):
        yield from numbered


def _wanted(names: Iterable[str], columns: set[str]) -> list[str]:
    roots = columns | {column.partition(".")[0] for column in columns}
    return [name for name in names if name in roots]


def _numbered(
    batches: Iterable[Any], names: Iterable[str], wanted: list[str] | None, types: Iterable[Any]
) -> Numbered:
    """The rows of Arrow tables with their numbers; columns that are not read hold only a mark that they are there."""
    unread = {name: _UNREAD for name in names if wanted is not None and name not in wanted}
    plain = wanted is not None and not any(kind in str(t).lower() for t in types for kind in _OTHER_TYPES)
    number = 0
    for batch in batches:
        count = batch.num_rows
        rows = batch.to_pylist() if batch.num_columns else itertools.repeat({}, count)
        for row in rows:
            number += 1
            yield number, (row if plain else _as_json(row)) | unread


_UNREAD = "not read"


def _as_json(value: Any) -> Any:
    """A value of a table as JSON types."""
    if isinstance(value, dict):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return value


def _splits_of(builder: Any) -> list[str]:
    return [str(name) for name in (builder.info.splits or builder.config.data_files or {"train": None})]


def _chosen(name: str, splits: list[str], split: str | None) -> tuple[str, int, int | None]:
    """A split by name, `train` or the only one without a name, and the first row and the end of a slice of it."""
    if split is None:
        if "train" not in splits and len(splits) > 1:
            raise DataError(f"{name} has the splits {_listed(splits)}: choose one (data.split)")
        return ("train" if "train" in splits else splits[0]), 0, None
    found = _SLICE.fullmatch(split)
    if found is None:
        raise DataError(
            f"{name}: split {split!r} is none; expected a name such as train, or rows of it: train[:1000]"
        )
    part, first, last = found.groups()
    if part not in splits:
        near = did_you_mean(part, splits, f"; it has {_listed(splits)}")
        raise DataError(f"{name} has no split {part}{near} (data.split)")
    return part, int(first or 0), int(last) if last else None


def _cut(found: Any, first: int, last: int | None) -> Any:
    """Rows ``first`` up to ``last``, exclusive, of a data set or a stream."""
    if last is not None:
        found = found.take(last if not hasattr(found, "num_rows") else min(last, found.num_rows))
    if first:
        found = found.skip(first if not hasattr(found, "num_rows") else min(first, found.num_rows))
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a data set's revision; of one in the cache, if the Hub is not to be asked, the revision itself."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").lower() in ("1", "true", "yes"):
        return revision
    try:
        api = HfApi()
        info = api.dataset_info(name, revision=revision, timeout=10)
        if info.gated:
            api.auth_check(name, repo_type="dataset")
    except Exception as error:  # the Hub client raises many types
        raise DataError(f"{name}: {fault_line(name, revision, error, kind='data set')}") from error
    return info.sha


@contextlib.contextmanager
def _as_data_error(name: str) -> Iterator[None]:
    """Converts errors of `datasets` to one line; what it logs of them names the file, and is part of the line."""
    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    theirs = logging.getLogger("datasets")
    were = theirs.handlers[:], theirs.propagate
    theirs.handlers[:], theirs.propagate = [handler], False
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        reason = _CLASS.sub("", said[-1]) if said else one_line(cause or error)
        raise DataError(f"{name} cannot be read: {' '.join(reason.split())}") from error
    finally:
        theirs.handlers[:], theirs.propagate = were


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets`: a folder is read in a moment; no word about a README of another kind."""
    import datasets

    cards = logging.getLogger("huggingface_hub.repocard")
    level = cards.level
    cards.setLevel(logging.ERROR)
    were = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        cards.setLevel(level)
        if not were:
            datasets.enable_progress_bars()
