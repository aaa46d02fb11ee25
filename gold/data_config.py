"""The keys of `data`: where prompts are read from, and what their columns mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue

from gold.errors import ConfigError
from gold.schema import CountInt, PositiveInt, Section, Text
from gold.train.recipe import Order

_OF_FILES = (
    *("map", "split", "subset", "revision", "streaming"),
    *("heldout_split", "heldout_subset", "heldout_map"),
)


def _columns(renamed: dict[str, Text | None]) -> dict[str, Text | None]:
    if not renamed:
        return renamed
    from gold.data import check_map

    try:
        return check_map(renamed)
    except ConfigError as error:
        raise ValueError(str(error)) from None


ColumnMap = Annotated[dict[str, Text | None], AfterValidator(_columns)]


class TaskConfig(Section):
    """A procedural task: generated prompts, and a verifier that scores completions."""

    name: Text
    """running_sums, or a task of reasoning-gym such as countdown"""
    options: dict[str, JsonValue] = Field(default={})
    """options of the task"""
    seed: CountInt = 0
    """seed of the prompts"""
    train: PositiveInt = 400
    """training prompts"""
    heldout: PositiveInt = 128
    """held-out prompts"""


class DataConfig(Order):
    """The prompts: exactly one of `prompts` and `task`."""

    prompts: Text | None = None
    """file (JSON lines, JSON array, CSV, parquet), folder of `datasets`, or Hub id; docs/data.md has the columns"""
    map: ColumnMap = Field(default={})
    """columns by the name under which they are understood, as {prompt: text}; null: a column is not read"""
    split: Text | None = None
    """split of a folder or of a data set on the Hub, or rows of one: train[:1000]; null: train, or the only one"""
    subset: Text | None = None
    """subset (configuration) of a data set on the Hub"""
    revision: Text | None = None
    """commit, tag or branch of a data set on the Hub; null: main, or as in ID@revision"""
    streaming: bool = False
    """read a data set of the Hub without keeping it on disk"""
    task: TaskConfig | None = None
    """procedural task with a verifier"""
    heldout: Text | None = None
    """held-out prompts, as `prompts`; null: some of `prompts`, chosen by the hash of their content"""
    heldout_split: Text | None = None
    """split of `heldout`, or without it of the data set in `prompts`"""
    heldout_subset: Text | None = None
    """subset of `heldout`; null: `subset`, if both are of one data set"""
    heldout_map: ColumnMap | None = None
    """columns of the held-out prompts; null: as `map`"""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """share of `prompts` held out without a `heldout` file; null: evaluate.prompts of them, of few at most a fifth"""
    weight: Text | None = None
    """column with the weight of a prompt: how often it is trained on, relative to the others"""


def impossible_data(data: DataConfig) -> Iterator[str]:
    """One line for each invalid combination of these keys, beginning with the key."""
    if data.prompts is None and data.task is None:
        yield "data: neither prompts nor task is given: name a file or data set, or a task"
    if data.prompts is not None and data.task is not None:
        yield "data: both prompts and task are given: keep one"
    for name in _OF_FILES if data.task else ():
        if getattr(data, name):
            yield f"data.{name}: prompts of a task are read from nowhere: leave it out"
    if data.heldout is not None and data.task is not None:
        yield "data: a task makes its own held-out prompts (data.task.heldout): leave data.heldout out"
    if data.weight is not None and data.task is not None:
        yield "data.weight: prompts of a task have no fields: leave it out"
    if data.weight is not None and data.order == "kept":
        yield "data.weight: has no meaning in the order of the file: set data.order to shuffled, or leave it out"
