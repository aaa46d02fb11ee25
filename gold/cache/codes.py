"""The scores of one text as bytes: 16-bit log-probabilities on a scale that is finest near 0, and bit-packed ids."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FAR_NATS = 10_000.0
"""Log-probabilities below −FAR_NATS are clamped to it."""
STEP = math.log1p(FAR_NATS) / 65_534
_NEVER = 65_535
"""The code of −∞."""
MOST_OFF = 1e-2
"""Tolerance for the mass of a row around 1; the rounding of servers reaches a tenth of it."""
_HEAD = struct.Struct("<IIB")
_MOST_PLACES = 2**26
"""Limit on the ids, padding included, that decoded bytes may contain."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The observed distribution of each row of a text, in nats.

    ``ids_NK`` (−1 pads) are the observed tokens, the one of the text first, and ``logp_NK`` their log-probabilities;
    ``log_rest_N`` is the log of the tail mass (all other tokens). A row's mass is 1.
    """

    ids_NK: npt.NDArray[np.int64]
    logp_NK: npt.NDArray[np.float64]
    log_rest_N: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids_NK)


def encode(scores: Scores) -> bytes:
    """The scores as bytes, little-endian.

    The layout is: number of rows and of observed tokens (uint32 each) and bits per id (uint8); number of observed
    tokens of each row, codes of ``log_rest_N`` and of the observed log-probabilities (uint16 each, row by row); ids,
    highest bit first, packed without gaps.

    The code of l is round(ln(1 − l) / STEP), 65,535 for −∞, so that l is restored within 7.1e-5 · (1 − l).

    Raises: ValueError for a row with NaN, or whose mass is not 1.
    """
    known = scores.ids_NK >= 0
    logp = np.where(known, scores.logp_NK, -np.inf)
    mass = np.exp(logp).sum(1) + np.exp(scores.log_rest_N)
    if not (np.abs(mass - 1.0) <= MOST_OFF).all():
        at = int(np.argmin(np.abs(mass - 1.0) <= MOST_OFF))
        raise ValueError(f"the probabilities of row {at} add up to {mass[at]:.4g}")
    ids = scores.ids_NK[known]
    bits = max(1, int(ids.max(initial=0)).bit_length())
    planes = (ids[:, None] >> np.arange(bits)[::-1]) & 1
    parts = (known.sum(1).astype("<u2"), _codes(scores.log_rest_N), _codes(logp[known]))
    return b"".join(
        (
            _HEAD.pack(len(scores), ids.size, bits),
            *(part.tobytes() for part in parts),
            np.packbits(planes.astype(np.uint8)).tobytes(),
        )
    )


def decode(data: bytes | memoryview) -> Scores:
    """The scores in these bytes, each row renormalized to mass 1.

    An observed log-probability l of a row with entropy H is restored within 7.1e-5 · (2 − l + H), in nats.

    Raises: ValueError for bytes that ``encode`` does not produce.
    """
    rows, size, bits = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else (0, 0, 0)
    if bits == 0 or len(data) != _HEAD.size + 2 * (2 * rows + size) + (size * bits + 7) // 8:
        raise ValueError("its length is not what its first bytes say")
    codes = np.frombuffer(data, "<u2", 2 * rows + size, _HEAD.size)
    counts = codes[:rows].astype(np.int64)
    if counts.sum() != size:
        raise ValueError("its rows do not have as many tokens as its first bytes say")
    if rows * int(counts.max(initial=0)) > max(_MOST_PLACES, 64 * len(data)):
        raise ValueError("its rows are of lengths too different")
    planes = np.unpackbits(np.frombuffer(data, np.uint8, -1, _HEAD.size + codes.nbytes), count=size * bits)
    ids = planes.reshape(size, bits) @ (1 << np.arange(bits, dtype=np.int64)[::-1])
    row = np.repeat(np.arange(rows), counts)
    column = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(counts.max(initial=1))
    ids_NK = np.full((rows, width), -1, np.int64)
    logp_NK = np.full((rows, width), -np.inf)
    ids_NK[row, column] = ids
    logp_NK[row, column] = _values(codes[2 * rows :])
    log_rest_N = _values(codes[rows : 2 * rows])
    mass = np.exp(logp_NK).sum(1) + np.exp(log_rest_N)
    if not (np.abs(mass - 1.0) <= 2 * MOST_OFF).all():
        raise ValueError("its probabilities do not add up to 1")
    norm = np.log(mass)
    return Scores(ids_NK, logp_NK - norm[:, None], log_rest_N - norm)


def _codes(logp: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    finite = np.clip(np.nan_to_num(logp, neginf=0.0), -FAR_NATS, 0.0)
    return np.where(np.isneginf(logp), _NEVER, np.rint(np.log1p(-finite) / STEP)).astype("<u2")


def _values(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    return np.where(codes == _NEVER, -np.inf, -np.expm1(codes * STEP))
