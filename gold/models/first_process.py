"""What the first of several processes finds out for all of them, since it alone has a model's weights."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch.distributed as dist

from gold.errors import ModelError

Found = TypeVar("Found")


def is_first() -> bool:
    """Whether this is the first process of the run."""
    return dist.get_rank() == 0


def from_first(find: Callable[[], Found]) -> Found:
    """What ``find`` returns in the first process, in all of them; all call this.

    Raises:
        ModelError: the one that it raises there; after any other error there, which only that process raises, one that
            says so.
    """
    answer: list[object] = [None, "the first process, which reads the models for all, has failed"]
    group = _waiting(dist.group.WORLD)
    try:
        if is_first():
            answer = [find(), None]
    except ModelError as error:
        answer = [None, str(error)]
    finally:  # the others wait, whatever happens
        dist.broadcast_object_list(answer, src=0, group=group)
    found, fault = answer
    if fault is not None:
        raise ModelError(str(fault))
    return cast(Found, found)


@cache
def _waiting(world: Any) -> Any:
    """A group of the processes of ``world``, which wait for each other as long as it takes to read a large model."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def first_then_others(make: Callable[[], Found]) -> Found:
    """What ``make`` returns in this process; the others make theirs once the first has.

    Raises:
        ModelError: the one that the first raises, or one of its own.
    """
    made: list[Found] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else make()
