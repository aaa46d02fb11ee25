"""Arithmetic of the numba kernels, in loops that LLVM vectorizes.

In single precision, exponentials and logarithms are polynomials (the compiler would call the scalar library); in double
precision they are those of the library. Sums are in single precision within a block and double across blocks.

The result of a row does not depend on its memory address: nothing is compiled with `fastmath`, so the compiler may not
change any rounding, and whether it runs a loop in vectors or scalars (it checks at run time whether arrays overlap)
does not change any bit. The speed of `fastmath` comes from the source: sums in fixed lanes (``lane_sum``,
``lane_dot``), and fused multiply-add (``fused``).
"""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

BLOCK = 2048
"""Numbers of a sum in single precision; a multiple of the number of lanes."""
LANE_BYTES = 256
"""Bytes of all lanes of a sum: eight registers of 32 bytes, or four of 64."""

compiled = numba.njit(cache=True, nogil=True, error_model="numpy")
inlined = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
"""As ``compiled``, for scalar functions called in loops: a call left in a loop prevents vectorization."""

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
LOWEST = np.float32(-87.0)
"""Below this exponent a single-precision exponential counts as 0."""
HALF_ROOT = np.float32(0.70710678)
F = np.float32


@intrinsic
def _times_power_of_two(context: Any, x: Any, n: Any) -> Any:
    """``x · 2^n`` for an integer-valued float n, −126 ≤ n ≤ 127."""

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
    """The bits of a single-precision number as an integer, which preserves the order of non-negative numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _widened_half(context: Any, x: Any) -> Any:
    """The float32 whose upper half is this 16-bit word: the value of a bfloat16."""

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


def _fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """IR of ``x · y + z`` of numbers or vectors: rounded once if the processor has FMA, else twice."""
    wide = isinstance(x.type, ir.VectorType)
    single = x.type.element if wide else x.type
    name = f"v{x.type.count}" if wide else ""
    name += "f32" if single == ir.FloatType() else "f64"
    kind = ir.FunctionType(x.type, [x.type] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{name}"), [x, y, z]
    )


@intrinsic
def fused(context: Any, x: Any, y: Any, z: Any) -> Any:
    """``x · y + z`` with a single rounding if the processor has FMA, in vectors and scalars alike."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _fused(builder, *arguments)

    if x not in (types.float32, types.float64) or not x == y == z:
        return None
    return x(x, x, x), generate


def _in_lanes(builder: Any, datas: Any, low: Any, high: Any) -> Any:
    """IR of the sum over low ≤ i < high of ``x[i]``, or of ``x[i] · y[i]`` if two arrays are given.

    Number i goes to lane ``(i − low) mod lanes``; the lanes are added in halves. The remainder goes to eight lanes in
    the same way, and its remainder to one.
    """
    real = datas[0].type.pointee
    index = low.type
    bytes_ = 4 if real == ir.FloatType() else 8
    total, begin = ir.Constant(real, 0.0), low
    for lanes in (LANE_BYTES // bytes_, 8, 1):
        kind = ir.VectorType(real, lanes) if lanes > 1 else real
        at, sums = cgutils.alloca_once(builder, index), cgutils.alloca_once(builder, kind)
        builder.store(begin, at)
        builder.store(ir.Constant(kind, None if lanes > 1 else 0.0), sums)
        count = builder.sub(high, begin)
        whole = builder.sub(count, builder.srem(count, index(lanes)))
        end = builder.add(begin, whole)
        head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        builder.cbranch(builder.icmp_signed("<", builder.load(at), end), body, after)
        builder.position_at_end(body)
        here = builder.load(at)
        found = [
            builder.load(builder.bitcast(builder.gep(d, [here]), kind.as_pointer()), align=bytes_)
            for d in datas
        ]
        before = builder.load(sums)
        builder.store(
            _fused(builder, found[0], found[1], before) if len(found) > 1 else builder.fadd(before, *found),
            sums,
        )
        builder.store(builder.add(here, index(lanes)), at)
        builder.branch(head)
        builder.position_at_end(after)
        value = builder.load(sums)
        while lanes > 1:
            lanes //= 2
            nothing = ir.Constant(value.type, ir.Undefined)
            halves = [
                builder.shuffle_vector(
                    value, nothing, ir.Constant(ir.VectorType(ir.IntType(32), lanes), part)
                )
                for part in ([*range(lanes)], [*range(lanes, 2 * lanes)])
            ]
            value = builder.fadd(*halves)
        if isinstance(value.type, ir.VectorType):
            value = builder.extract_element(value, ir.IntType(32)(0))
        total, begin = builder.fadd(total, value), end
    return total


def _lane_function(arrays: Any, low: Any, high: Any) -> Any:
    first = arrays[0]
    for array in arrays:
        if not isinstance(array, types.Array) or array.ndim != 1 or array.layout != "C":
            return None
        if array.dtype != first.dtype or array.dtype not in (types.float32, types.float64):
            return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *given, low, high = arguments
        datas = [context.make_array(a)(context, builder, x).data for a, x in zip(arrays, given, strict=True)]
        return _in_lanes(builder, datas, low, high)

    return first.dtype(*arrays, types.intp, types.intp), generate


@intrinsic
def lane_sum(context: Any, x: Any, low: Any, high: Any) -> Any:
    """``Σ x[i]`` over low ≤ i < high, in lanes, in the precision of x."""
    return _lane_function((x,), low, high)


@intrinsic
def lane_dot(context: Any, x: Any, y: Any, low: Any, high: Any) -> Any:
    """``Σ x[i] · y[i]`` over low ≤ i < high, in lanes, in the precision of x."""
    return _lane_function((x, y), low, high)


@inlined
def _exp_single(x):
    y = LOWEST if x < LOWEST else x
    n = np.floor(fused(y, LOG2_E, F(0.5)))
    r = fused(-n, LN2_LOW, fused(-n, LN2_HIGH, y))
    z = F(1.9875691500e-4)
    z = fused(z, r, F(1.3981999507e-3))
    z = fused(z, r, F(8.3334519073e-3))
    z = fused(z, r, F(4.1665795894e-2))
    z = fused(z, r, F(1.6666665459e-1))
    z = fused(z, r, F(5.0000001201e-1))
    z = fused(z * r, r, r) + F(1.0)
    value = _times_power_of_two(z, n)
    return F(0.0) if x < LOWEST else value


@inlined
def _log_single(x):
    m, n = _mantissa(x), _exponent(x)
    low = m < HALF_ROOT
    n = n - F(1.0) if low else n
    m = (m + m if low else m) - F(1.0)
    z = F(7.0376836292e-2)
    z = fused(z, m, F(-1.1514610310e-1))
    z = fused(z, m, F(1.1676998740e-1))
    z = fused(z, m, F(-1.2420140846e-1))
    z = fused(z, m, F(1.4249322787e-1))
    z = fused(z, m, F(-1.6668057665e-1))
    z = fused(z, m, F(2.0000714765e-1))
    z = fused(z, m, F(-2.4999993993e-1))
    z = fused(z, m, F(3.3333331174e-1))
    square = m * m
    value = fused(F(-0.5), square, fused(z * m, square, n * LN2_LOW)) + m
    value = fused(n, LN2_HIGH, value)
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
    up = fused(d, fused(d, fused(d, fused(d, F(1 / 120), F(1 / 24)), F(1 / 6)), F(0.5)), F(1.0))
    w = share * (d * up)
    tail = fused(-w, fused(-w, F(1 / 7), F(1 / 6)), F(1 / 5))
    return w * w * fused(-w, fused(-w, fused(-w, tail, F(1 / 4)), F(1 / 3)), F(0.5))


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
    """Row n in the kernel's dtype: the row itself, or unpacked into ``scratch`` if it is bfloat16."""
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
    """Writes ``row`` to row n, rounded if the matrix is bfloat16."""
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


@compiled
def row_max(z):
    """The largest entry, NaN ignored."""
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


@compiled
def range_sum(x, low, high):
    """Sum of ``x[low:high]``, in double precision across blocks."""
    total = 0.0
    for first in range(low, high, BLOCK):
        total += lane_sum(x, first, min(first + BLOCK, high))
    return total


@compiled
def exps(z, shift, out):
    """``out[v] = exp(z[v] − shift)``."""
    for v in range(z.size):
        out[v] = exp(z[v] - shift)


@compiled
def exp_into(z, shift, out):
    """As ``exps``, and returns the sum."""
    total = 0.0
    for first in range(0, z.size, BLOCK):
        last = min(first + BLOCK, z.size)
        exps(z[first:last], shift, out[first:last])
        total += lane_sum(out, first, last)
    return total


@compiled
def exp_moment(z, shift, out):
    """As ``exp_into``, and also returns ``Σ exp(d) · d`` of the differences d."""
    total, moment = 0.0, 0.0
    lowest = as_is(-1000.0, z[0])
    room = np.empty(min(BLOCK, z.size), z.dtype)
    for first in range(0, z.size, BLOCK):
        last = min(first + BLOCK, z.size)
        some, made, differences = z[first:last], out[first:last], room[: last - first]
        for v in range(some.size):
            d = some[v] - shift
            differences[v] = lowest if d < lowest else d
        exps(differences, z.dtype.type(0.0), made)
        total += lane_sum(made, 0, made.size)
        moment += lane_dot(made, differences, 0, made.size)
    return total, moment


@compiled
def log_sum(z, ids, low, high, skip):
    """``log Σ exp(z[ids[i]])`` over low ≤ i < high without i = ``skip``, relative to its maximum; −∞ if empty."""
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
