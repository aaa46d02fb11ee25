"""When a completion counts as stopped, and which ids it has then."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gold.rollout.stopping import fits_with_stop, length_and_stop, with_stop, without_stop

IDS = st.lists(st.integers(0, 5), max_size=8).map(lambda ids: np.array(ids, np.int32))


@given(IDS, st.lists(st.integers(0, 5), max_size=3))
def test_drawn_ids_end_with_the_first_stop_id(drawn: np.ndarray, stop_ids: list[int]) -> None:
    kept: list[int] = []
    for index in drawn.tolist():
        kept.append(index)
        if index in stop_ids:
            break
    assert length_and_stop(drawn, stop_ids) == (len(kept), any(i in stop_ids for i in kept))


@given(IDS, st.integers(1, 10))
def test_a_complete_text_that_counts_as_stopped_has_room_for_the_stop_id(ids: np.ndarray, most: int) -> None:
    stopped = fits_with_stop(ids, most)
    assert stopped == (ids.size + 1 <= most)
    whole = with_stop(ids, (7, 8), stopped)
    assert whole.dtype == np.int32
    assert whole.tolist() == [*ids.tolist(), *([7] if stopped else [])]
    assert without_stop(whole, stopped).tolist() == ids.tolist()
