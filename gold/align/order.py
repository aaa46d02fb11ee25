"""The ids of a vocabulary in the order of the bytes that they stand for."""

# mypy: allow-untyped-defs, allow-untyped-calls

import numba
import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bytes = NDArray[np.uint8]

# Below this many tokens moving them one by one is faster than counting 257 buckets.
_FEW = 24


def byte_order(ids: NDArray[np.integer], offsets: Int64, blob: Bytes) -> Int32:
    """The ids sorted by their bytes, `sorted(ids, key=lambda i: blob[offsets[i]:offsets[i + 1]].tobytes())`.

    Ids of equal bytes keep the order in which they are given.
    """
    order: Int32 = _sorted(ids.astype(np.int32), offsets, blob)
    return order


def equal_groups(order: Int32, offsets: Int64, blob: Bytes) -> list[Int32]:
    """The ids of each byte string that several ids of a byte order stand for."""
    same = _equals_next(order, offsets, blob)
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])))).reshape(-1, 2)
    return [order[first : last + 1] for first, last in bounds.tolist()]


@numba.njit(cache=True, nogil=True)
def _sorted(ids, offsets, blob):
    # Bucket by bucket from the first byte on. Bucket 0 of 257 are the tokens that end here: they are equal.
    order = ids.copy()
    moved = np.empty_like(order)
    buckets = np.empty(258, np.int64)
    todo = np.empty((ids.size // 2 + 1, 3), np.int64)
    todo[0] = 0, ids.size, 0
    left = 1
    while left:
        left -= 1
        low, high, depth = todo[left]
        if high - low <= _FEW:
            for i in range(low + 1, high):
                index = order[i]
                at = i
                while at > low and _comes_after(order[at - 1], index, depth, offsets, blob):
                    order[at] = order[at - 1]
                    at -= 1
                order[at] = index
            continue
        buckets[:] = 0
        for i in range(low, high):
            buckets[_bucket(order[i], depth, offsets, blob) + 1] += 1
        buckets[0] = low
        for b in range(1, 258):
            buckets[b] += buckets[b - 1]
            if b > 1 and buckets[b] - buckets[b - 1] > 1:
                todo[left] = buckets[b - 1], buckets[b], depth + 1
                left += 1
        for i in range(low, high):
            b = _bucket(order[i], depth, offsets, blob)
            moved[buckets[b]] = order[i]
            buckets[b] += 1
        order[low:high] = moved[low:high]
    return order


@numba.njit(cache=True, nogil=True)
def _bucket(index, depth, offsets, blob):
    at = offsets[index] + depth
    return 1 + blob[at] if at < offsets[index + 1] else 0


@numba.njit(cache=True, nogil=True)
def _comes_after(one, other, depth, offsets, blob):
    """Whether `one` has the greater bytes, where both agree up to `depth`."""
    length, other_length = offsets[one + 1] - offsets[one], offsets[other + 1] - offsets[other]
    for k in range(depth, min(length, other_length)):
        mine, theirs = blob[offsets[one] + k], blob[offsets[other] + k]
        if mine != theirs:
            return mine > theirs
    return length > other_length


@numba.njit(cache=True, nogil=True)
def _equals_next(order, offsets, blob):
    same = np.zeros(max(order.size - 1, 0), np.bool_)
    for i in range(same.size):
        one, other = order[i], order[i + 1]
        # In a byte order the greater one is never first.
        same[i] = not _comes_after(other, one, 0, offsets, blob)
    return same
