"""The stop rule: when a completion counts as stopped, and which ids it then has.

A completion that ``stopped`` ends with one stop id, which counts towards ``max_new_tokens``; its text is all other ids.
A completion that reaches ``max_new_tokens`` without a stop id is cut off there and has not stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


def length_and_stop(drawn: NDArray[np.integer], stop_ids: Sequence[int]) -> tuple[int, bool]:
    """The number of drawn ids up to and including the first stop id, and whether there is a stop id."""
    is_stop = np.isin(drawn, stop_ids)
    stopped = bool(is_stop.any())
    return int(is_stop.argmax()) + 1 if stopped else drawn.size, stopped


def fits_with_stop(ids: Ids, max_new_tokens: int) -> bool:
    """Whether a complete text counts as stopped: ``max_new_tokens`` have room for its ids and a stop id."""
    return ids.size < max_new_tokens


def with_stop(ids: Ids, stop_ids: Sequence[int], stopped: bool) -> Ids:
    """The ids of a text, and after them the first stop id if the text ``stopped``."""
    return np.concatenate((ids, np.array(stop_ids[:1], np.int32))) if stopped else ids


def without_stop(ids: Ids, stopped: bool) -> Ids:
    """The ids of a completion's text: all but the stop id, which is last if the completion ``stopped``."""
    return ids[:-1] if stopped else ids
