"""Arithmetic of the numba kernels, in loops that LLVM turns into vector instructions.

In single precision exponentials and logarithms are polynomials (the compiler calls the scalar library otherwise); in
double precision they are those of the library. Sums are single within a block and double across.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic, overload

SUMS = {"reassoc", "contract", "arcp", "nsz", "afn"}
"""Flags that let a sum be split into lanes; none that takes NaN or infinity for impossible."""
EXACT = {"contract", "nsz"}
"""Flags under which the steps of a polynomial keep their order."""
BLOCK = 2048

sums = numba.njit(cache=True, nogil=True, fastmath=SUMS, error_model="numpy")
exact = numba.njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy")
inlined = numba.njit(cache=True, nogil=True, fastmath=EXACT, error_model="numpy", forceinline=True)
"""As ``exact``, for what loops call with single numbers: a call that is left in a loop keeps it out of lanes."""

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
LOWEST = np.float32(-87.0)
"""Below this exponent a single-precision exponential counts as 0."""
HALF_ROOT = np.float32(0.70710678)
F = np.float32


@intrinsic
def _times_power_of_two(context: Any, x: Any, n: Any) -> Any:
    """``x · 2^n`` for a whole number n that is a float, −126 ≤ n ≤ 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, power = arguments
        word = ir.IntType(32)
        bits = builder.shl(builder.add(builder.fptosi(power, word), word(127)), word(23))
        return builder.fmul(value, builder.bitcast(bits, ir.FloatType()))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _exponent(context: Any, x: Any) -> Any:
    """n of ``x = m · 2^n`` with ½ ≤ m < 1, as a float."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        return builder.sitofp(builder.sub(builder.lshr(bits, word(23)), word(126)), ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def _mantissa(context: Any, x: Any) -> Any:
    """m of ``x = m · 2^n`` with ½ ≤ m < 1."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        bits = builder.or_(builder.and_(bits, word(0x007FFFFF)), word(0x3F000000))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def word_of(context: Any, x: Any) -> Any:
    """The bits of a single-precision number; of numbers that are not negative in the numbers' own order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _widened_half(context: Any, x: Any) -> Any:
    """The number whose upper half is this 16-bit word: what a bfloat16 stands for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrowed_half(context: Any, x: Any) -> Any:
    """The nearest bfloat16, ties to even, as a 16-bit word; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(builder.add(bits, word(0x7FFF)), odd), word(16))
        rounded = builder.select(builder.fcmp_unordered("uno", *arguments * 2), word(0x7FC0), rounded)
        return builder.trunc(rounded, ir.IntType(16))

    return types.uint16(types.float32), generate


@inlined
def _exp_single(x):
    y = LOWEST if x < LOWEST else x
    n = np.floor(y * LOG2_E + F(0.5))
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    z = F(1.9875691500e-4)
    z = z * r + F(1.3981999507e-3)
    z = z * r + F(8.3334519073e-3)
    z = z * r + F(4.1665795894e-2)
    z = z * r + F(1.6666665459e-1)
    z = z * r + F(5.0000001201e-1)
    z = (z * r) * r + r + F(1.0)
    value = _times_power_of_two(z, n)
    return F(0.0) if x < LOWEST else value


@inlined
def _log_single(x):
    m, n = _mantissa(x), _exponent(x)
    low = m < HALF_ROOT
    n = n - F(1.0) if low else n
    m = (m + m if low else m) - F(1.0)
    z = F(7.0376836292e-2)
    z = z * m + F(-1.1514610310e-1)
    z = z * m + F(1.1676998740e-1)
    z = z * m + F(-1.2420140846e-1)
    z = z * m + F(1.4249322787e-1)
    z = z * m + F(-1.6668057665e-1)
    z = z * m + F(2.0000714765e-1)
    z = z * m + F(-2.4999993993e-1)
    z = z * m + F(3.3333331174e-1)
    square = m * m
    value = z * m * square + n * LN2_LOW - F(0.5) * square + m + n * LN2_HIGH
    value = value if x < F(math.inf) else x
    return F(-math.inf) if x <= F(0.0) else value


def as_is(number, x):
    """The number in the precision of x."""
    return number


@overload(as_is)
def _as_is_for(number, x):
    if x is types.float32:
        return lambda number, x: F(number)
    return lambda number, x: float(number)


def exp(x):
    """e^x for x ≤ 88; 0 for −∞, and in single precision below ``LOWEST``."""
    return math.exp(x)


@overload(exp)
def _exp_for(x):
    if x is types.float32:
        return lambda x: _exp_single(x)
    return lambda x: math.exp(x)


def log(x):
    """Natural logarithm; −∞ for 0, NaN for NaN."""
    return math.log(x)


@overload(log)
def _log_for(x):
    if x is types.float32:
        return lambda x: _log_single(x)
    return lambda x: math.log(x)


@inlined
def _excess_single(d, share):
    # e^d − 1 and log(1 + w) to the precision of d² / 2, for |d| ≤ 1/16.
    up = d * (F(1.0) + d * (F(0.5) + d * (F(1 / 6) + d * (F(1 / 24) + d * F(1 / 120)))))
    w = share * up
    tail = F(1 / 5) - w * (F(1 / 6) - w * F(1 / 7))
    return w * w * (F(0.5) - w * (F(1 / 3) - w * (F(1 / 4) - w * tail)))


def excess(d, share):
    """``w − log(1 + w)`` with ``w = share · (e^d − 1)``, for d near 0."""
    return share * math.expm1(d) - math.log1p(share * math.expm1(d))


@overload(excess)
def _excess_for(d, share):
    if d is types.float32:
        return lambda d, share: _excess_single(d, share)

    def double(d, share):
        w = share * math.expm1(d)
        return w - math.log1p(w)

    return double


def row_of(matrix, n, scratch):
    """Row n in the kernel's arithmetic: itself, or unpacked into ``scratch`` where it holds bfloat16."""
    return matrix[n]


@overload(row_of)
def _row_for(matrix, n, scratch):
    if matrix.dtype is types.uint16:

        def unpacked(matrix, n, scratch):
            for v in range(matrix.shape[1]):
                scratch[v] = _widened_half(matrix[n, v])
            return scratch

        return unpacked
    return lambda matrix, n, scratch: matrix[n]


def put_row(matrix, n, row):
    """Row n becomes ``row``, rounded where it holds bfloat16."""
    matrix[n] = row


@overload(put_row)
def _put_for(matrix, n, row):
    if matrix.dtype is types.uint16:

        def packed(matrix, n, row):
            for v in range(matrix.shape[1]):
                matrix[n, v] = _narrowed_half(row[v])

        return packed

    def copied(matrix, n, row):
        for v in range(matrix.shape[1]):
            matrix[n, v] = row[v]

    return copied


@exact
def row_max(z):
    """The largest entry; NaN does not count."""
    lanes = np.full(64, -math.inf, z.dtype)
    whole = z.size - z.size % 64
    for first in range(0, whole, 64):
        block = z[first : first + 64]
        for j in range(64):
            lanes[j] = block[j] if block[j] > lanes[j] else lanes[j]
    for v in range(whole, z.size):
        lanes[0] = z[v] if z[v] > lanes[0] else lanes[0]
    top = lanes[0]
    for j in range(1, 64):
        top = lanes[j] if lanes[j] > top else top
    return top


@sums
def range_sum(x, low, high):
    """Sum of ``x[low:high]``, double across blocks."""
    total = 0.0
    for first in range(low, high, BLOCK):
        part = x.dtype.type(0.0)
        for v in range(first, min(first + BLOCK, high)):
            part += x[v]
        total += part
    return total


@sums
def exp_into(z, shift, out):
    """``out[v] = exp(z[v] − shift)``, and the sum."""
    total = 0.0
    for first in range(0, z.size, BLOCK):
        part = z.dtype.type(0.0)
        for v in range(first, min(first + BLOCK, z.size)):
            x = exp(z[v] - shift)
            out[v] = x
            part += x
        total += part
    return total


@sums
def exp_moment(z, shift, out):
    """As ``exp_into``, with ``Σ exp(d) · d`` of the differences d beside the sum."""
    total, moment = 0.0, 0.0
    lowest = as_is(-1000.0, z[0])
    for first in range(0, z.size, BLOCK):
        part, other = z.dtype.type(0.0), z.dtype.type(0.0)
        for v in range(first, min(first + BLOCK, z.size)):
            d = z[v] - shift
            x = exp(d)
            out[v] = x
            part += x
            other += x * (d if d > lowest else lowest)
        total += part
        moment += other
    return total, moment


@sums
def log_sum(z, ids, low, high, skip):
    """``log Σ exp(z[ids[i]])`` over low ≤ i < high without i = ``skip``, against its own maximum; −∞ of nothing."""
    top = -math.inf
    for i in range(low, high):
        if i != skip and z[ids[i]] > top:
            top = float(z[ids[i]])
    if top == -math.inf:
        return -math.inf
    total = 0.0
    for i in range(low, high):
        if i != skip:
            total += math.exp(z[ids[i]] - top)
    return top + math.log(total)
