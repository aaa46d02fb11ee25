"""Ids in byte order, against Python's own sorting of byte strings."""

from itertools import groupby

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from gold.tokenize.order import byte_order, equal_groups

# Tokens that agree up to any byte and differ there, or end: several of the words in which bytes are compared.
begins = st.builds(
    lambda text, length: text[:length],
    st.sampled_from([b"\0ab\xffcdefghijklmnopqr", b"\0ab\xffcdzfghijklmnopqr"]),
    st.integers(0, 18),
)
tails = st.lists(st.sampled_from([b"\0", b"a", b"\xff"]), max_size=3).map(b"".join)
tokens = st.builds(bytes.__add__, begins, tails)


@given(tokens_and_kept=st.lists(st.tuples(tokens, st.booleans())))
@example(tokens_and_kept=[(b"\0" * (i % 40), True) for i in range(120)])
def test_ids_are_sorted_by_their_bytes_and_equal_ones_stay_in_order(
    tokens_and_kept: list[tuple[bytes, bool]],
) -> None:
    found = [one for one, _ in tokens_and_kept]
    ids = [i for i, (_, kept) in enumerate(tokens_and_kept) if kept]
    offsets = np.cumsum([0, *map(len, found)], dtype=np.int64)
    blob = np.frombuffer(b"".join(found), np.uint8)
    order, repeats = byte_order(np.array(ids, np.int64), offsets, blob)
    assert order.tolist() == sorted(ids, key=found.__getitem__)
    assert repeats.tolist() == [i > 0 and found[order[i]] == found[order[i - 1]] for i in range(len(ids))]

    groups = [list(group) for _, group in groupby(order.tolist(), key=found.__getitem__)]
    several = equal_groups(np.array(ids, np.int64), offsets, blob)
    assert [group.tolist() for group in several] == [group for group in groups if len(group) > 1]
