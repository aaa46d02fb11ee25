"""Ids in byte order, against Python's own sorting of byte strings."""

from itertools import groupby

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from gold.align.order import byte_order, equal_groups

# Few different bytes, so that tokens share prefixes; many tokens, so that both ways of sorting are met.
tokens = st.binary(max_size=6) | st.lists(st.sampled_from([b"\0", b"a", b"\xff"]), max_size=12).map(b"".join)
spellings = st.lists(tokens, max_size=200)


def laid(found: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate(([0], np.cumsum([len(one) for one in found], dtype=np.int64)))
    return offsets.astype(np.int64), np.frombuffer(b"".join(found), np.uint8)


@given(found=spellings, chosen=st.data())
@example(found=[b"\0" * (i % 40) for i in range(120)], chosen=None)
def test_ids_are_sorted_by_their_bytes_and_equal_ones_stay_in_order(
    found: list[bytes], chosen: st.DataObject | None
) -> None:
    offsets, blob = laid(found)
    kept = (
        chosen.draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found)))
        if chosen
        else [True] * len(found)
    )
    ids = [i for i, keep in enumerate(kept) if keep]
    order = byte_order(np.array(ids, np.int64), offsets, blob)
    assert order.dtype == np.int32
    assert order.tolist() == sorted(ids, key=found.__getitem__)

    groups = [list(group) for _, group in groupby(order.tolist(), key=found.__getitem__)]
    assert [group.tolist() for group in equal_groups(order, offsets, blob)] == [
        g for g in groups if len(g) > 1
    ]
