"""Sorting and grouping the ids of a vocabulary by their bytes."""

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

# An integer that sorts like the next bytes of a token: seven bytes plus their count, 8 for more than seven.
_WORD = 7
_KEPT = np.array([(1 << 64) - (1 << (64 - 8 * min(count, _WORD))) for count in range(_WORD + 2)], np.uint64)


def byte_order(ids: npt.NDArray[np.integer], offsets: Int64, blob: UInt8) -> tuple[Int32, Bool]:
    """The ids sorted by their bytes, and for each whether its bytes equal those of the one before.

    Equivalent to `sorted(ids, key=lambda i: bytes(blob[offsets[i]:offsets[i + 1]]))`: ids with equal bytes keep their
    order.
    """
    order, repeats = ids.astype(np.int32), np.zeros(len(ids), np.bool_)
    windows = np.lib.stride_tricks.sliding_window_view(np.append(blob, np.zeros(8, np.uint8)), 8)
    # Sorted by the words so far; run[i]: where the group of equal prefixes that contains i begins; todo: members of
    # groups of several that have more bytes.
    run = np.zeros(len(ids), np.int64)
    todo = np.arange(len(ids))
    depth = 0
    while len(todo):
        chosen = order[todo]
        starts = offsets[chosen] + depth
        left = np.minimum(offsets[chosen + 1] - starts, _WORD + 1)
        word = windows[starts].view(">u8")[:, 0] & _KEPT[left] | left.astype(np.uint64)
        by_word = np.lexsort((word, run[todo]))
        order[todo], word = chosen[by_word], word[by_word]
        new = np.ones(len(todo) + 1, np.bool_)
        new[1:-1] = (word[1:] != word[:-1]) | (run[todo][1:] != run[todo][:-1])
        repeats[todo] = ~new[:-1]
        run[todo] = todo[new[:-1]][np.cumsum(new[:-1]) - 1]
        todo = todo[~(new[:-1] & new[1:]) & (word & np.uint64(15) > _WORD)]
        depth += _WORD
    return order, repeats


def equal_groups(ids: npt.NDArray[np.integer], offsets: Int64, blob: UInt8) -> list[Int32]:
    """The groups of ids with equal bytes, one array for each byte string that several ids share."""
    order, repeats = byte_order(ids, offsets, blob)
    bounds = np.flatnonzero(np.diff(np.append(repeats, False)))
    return [order[first : last + 1] for first, last in bounds.reshape(-1, 2).tolist()]
