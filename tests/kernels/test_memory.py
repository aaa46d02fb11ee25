"""One input has one result, bit for bit, wherever its arrays lie and whichever instructions a number goes through.

Every compiled function of the package is found by itself; one of the kernels without a case here fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core.registry import CPUDispatcher
from support.kernel_inputs import FORMS, every_function, kept_events, rows_like

import gold
from gold.kernels import cpu
from gold.kernels.cpu import divergences, masses, pieces, sorted, statistics
from gold.kernels.cpu import simd as lanes
from gold.tokenize import token_loops

LOOPS = (masses, statistics, divergences, sorted, pieces)
WIDTHS = (1, 17, 40, 300, 2500)
Array = np.ndarray[Any, Any]


def compiled_in(module: ModuleType) -> set[CPUDispatcher]:
    return {value for value in vars(module).values() if isinstance(value, CPUDispatcher)}


def everything_compiled() -> Iterator[CPUDispatcher]:
    folder = Path(gold.__path__[0])
    for path in folder.rglob("*.py"):
        if re.search(r"numba|import compiled|\bcompiled,", path.read_text(encoding="utf-8")):
            name = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
            yield from compiled_in(import_module(name.removesuffix(".__init__")))
    for name, value in vars(token_loops).items():
        if (
            callable(value)
            and getattr(value, "__module__", "") == token_loops.__name__
            and not name.startswith("_")
        ):
            yield token_loops._compiled(value)


def test_the_compiler_may_change_no_rounding() -> None:
    """What `fastmath` or `parallel` allows it does in one copy of a loop and not in the next."""
    found = {*everything_compiled()}
    known = {
        token_loops.__name__,
        lanes.__name__,
        *(m.__name__ for m in LOOPS),
        "gold.bytes.plan",
        "gold.bytes.pieces",
    }
    assert known <= {f.py_func.__module__ for f in found}
    for function in found:
        options = function.targetoptions
        assert not options.get("fastmath"), function.py_func
        assert not options.get("parallel"), function.py_func


def placed(given: Any, draw: np.random.Generator) -> Any:
    """The arrays, in tuples too, copied into one stretch of memory: in any order, at any distance."""
    arrays: list[Array] = []

    def collect(value: Any) -> None:
        if isinstance(value, tuple):
            for part in value:
                collect(part)
        elif isinstance(value, np.ndarray):
            arrays.append(value)

    collect(given)
    order = draw.permutation(len(arrays))
    gaps = draw.integers(0, 40, len(arrays)) * draw.choice([1, 1, 33], len(arrays))
    memory = np.empty(sum(a.nbytes for a in arrays) + 8 * int(gaps.sum()) + 64, np.uint8)
    at, there = -memory.ctypes.data % 64, {}
    for place in order:
        array = arrays[place]
        at += int(gaps[place]) * array.itemsize
        at += -(memory.ctypes.data + at) % array.itemsize
        copy = memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        there[id(array)] = copy
        at += array.nbytes

    def renewed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(renewed, value))
        return there[id(value)] if isinstance(value, np.ndarray) else value

    return renewed(given)


def bits(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(bits, value))
    return np.asarray(value).tobytes()


def assert_one_result(function: Callable[..., Any], given: tuple[Any, ...], tries: int = 12) -> None:
    draw = np.random.default_rng(0)
    expected = None
    for _ in range(tries):
        arguments = placed(given, draw)
        result = function(*arguments)
        found = bits(result), bits(arguments)
        expected = expected or found
        assert found == expected


class Given:
    """Arguments of one width and precision."""

    def __init__(self, width: int, real: type) -> None:
        self.width, self.real = width, real
        self.draw = np.random.default_rng(width)

    def row(self, scale: float = 4.0) -> Array:
        row = (self.draw.standard_normal(self.width) * scale).astype(self.real)
        row[self.width // 2 : self.width // 2 + self.width // 9] = -math.inf
        return row

    def logp(self) -> Array:
        row = self.row().astype(np.float64)
        row[0] = 1.0
        return (row - np.logaddexp.reduce(row)).astype(self.real)

    def room(self, size: int | None = None) -> Array:
        return np.zeros(self.width if size is None else size, self.real)

    def ids(self, size: int | None = None) -> Array:
        return self.draw.permutation(self.width)[:size].astype(np.int64)

    def events(self) -> tuple[Array, Array, Array, Array]:
        """Log-probabilities of both sides and the probabilities."""
        lp, lq = self.logp(), self.logp()
        return lp, lq, np.exp(lp), np.exp(lq)

    def block(self) -> tuple[Array, Array, Array, Array]:
        lp, lq, p, q = (x[: divergences.TERMS].copy() for x in self.events())
        return lp, lq, p, q

    def ranks(self) -> tuple[Array, Array]:
        return np.exp(self.logp()), np.exp(self.logp()) * self.real(0.9)


CASES: dict[CPUDispatcher, Callable[[Given], tuple[Any, ...]]] = {
    lanes.row_max: lambda g: (g.row(),),
    lanes.range_sum: lambda g: (g.row().clip(-9), g.width // 9, g.width),
    lanes.exps: lambda g: (g.row(), g.real(9), g.room()),
    lanes.exp_into: lambda g: (g.row(), g.real(9), g.room()),
    lanes.exp_moment: lambda g: (g.row(), g.real(9), g.room()),
    lanes.log_sum: lambda g: (g.row(), g.ids(), 0, g.width, g.width // 3),
    masses.gather: lambda g: (g.row(), g.ids(), g.room()),
    masses._set_log_mass: lambda g: (g.row(), np.exp(g.row()), np.exp(g.row()), g.ids(), 0, g.width, 3, 9.0, 2.0),
    masses._add_share: lambda g: (g.row(1.0).clip(-1), 0, g.width, g.width // 3, 0.7),
    masses.add_set: lambda g: (g.room(), g.row(), g.ids(), 0, g.width, g.width // 3, 0.7, 9.0),
    divergences._row_side: lambda g: (
        g.row(), g.room(), g.ids(g.width // 2), g.ids(2), g.ids(), g.room(g.width // 2 + 1)
    ),
    divergences._sum_at: lambda g: (np.exp(g.row()), g.ids()),
    divergences._exp_all: lambda g: (g.logp(), g.room()),
    divergences._entropy: lambda g: (*g.events()[1::2], g.room()),
    divergences._student_kl: lambda g: (*g.block(), g.real(0.7), g.room(2 * divergences.TERMS)),
    divergences._student_mixed: lambda g: (*g.block(), g.real(0.7), g.real(0.4), g.room(2 * divergences.TERMS)),
    divergences._teacher_kl: lambda g: (*g.block(), g.real(0.7), g.room(2 * divergences.TERMS)),
    divergences._teacher_mixed: lambda g: (*g.block(), g.real(0.7), g.real(0.4), g.room(2 * divergences.TERMS)),
    divergences._terms: lambda g: (*g.events(), *map(g.real, (0.6, 0.4, 0.4, 0.4)), g.room()),
    divergences._join_rest: lambda g: (*g.events()[:2], 0.1, 0.2),
    sorted._counted: lambda g: (g.ranks()[0], np.zeros((4, sorted.INTERVALS), np.int32)),
    sorted._inside: lambda g: (g.ranks()[0], np.arange(sorted.INTERVALS) % 2 == 0, g.room(), g.ids()),
    sorted._signed_sum: lambda g: (g.ranks()[0], np.ones(sorted.INTERVALS, g.real), g.room()),
    sorted.sorted_row: lambda g: (*(r := g.ranks()), sorted.ranks_for(*r), g.room()),
    pieces._event_sums: lambda g: (
        g.row(), np.exp(g.row()), g.real(9), 2.0, g.ids() % 7, np.arange(8) * 3, g.ids(2), np.zeros(7), g.room(7)
    ),
    pieces.segments_forward: lambda g: (g.logp(), g.ids() % 7, g.room(9)),
    pieces.segments_backward: lambda g: (g.logp(), g.ids() % 7, g.room(9), g.row()[:1].repeat(9), g.room()),
}  # fmt: skip

SCALARS: dict[CPUDispatcher, Callable[..., Any]] = {
    lanes._exp_single: lambda f: lambda lp, lq, share: f(lp),
    lanes._log_single: lambda f: lambda lp, lq, share: f(-lp),
    lanes._excess_single: lambda f: lambda lp, lq, share: f(lp * np.float32(0.005), share),
    divergences._kl_term: lambda f: lambda lp, lq, share: f(lp, lq, share, lp * lp)[0],
    divergences._mixed_term: lambda f: lambda lp, lq, share: f(lp, lq, lp * lp, lq * lq, share)[0],
    sorted._interval: lambda f: lambda lp, lq, share: f(lp),
}
"""What is computed of single numbers, in vectors where a loop is long enough."""

ROWS = {
    **every_function(300),
    **{
        str(form): lambda b, z, form=form: b.row_divergence(
            z,
            rows_like(3, 300, 9).clamp(min=-30.0).to(z),
            *kept_events(300, 300),
            form,
            unshared="renormalise",
        )
        for form in FORMS
    },
    "sorted": lambda b, z: b.sorted_l1(z.float().softmax(-1), z.float().softmax(-1).flip(-1)),
}
WITHIN = {
    *(sorted.ranks_for, masses._shares, masses._add_small),
    *(
        getattr(divergences, n)
        for n in ("_bucketed", "_condition", "_put_nan", "_spread", "_matched", "_scaled")
    ),
}
"""Parts of kernels of rows that are seen in these."""


@pytest.mark.slow  # each is compiled by itself; the kernels of rows, in which they are compiled too, are seen always
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.py_func.__name__)
def test_a_function_of_arrays(function: CPUDispatcher) -> None:
    for real in (np.float32, np.float64):
        for width in WIDTHS:
            assert_one_result(function, CASES[function](Given(width, real)))


@pytest.mark.parametrize("function", SCALARS, ids=lambda f: f.py_func.__name__)
def test_a_function_of_numbers_is_the_same_in_vectors(function: CPUDispatcher) -> None:
    of_one = numba.njit(error_model="numpy")(SCALARS[function](function))

    @numba.njit(error_model="numpy")
    def of_all(lp, lq, share, out):  # type: ignore[no-untyped-def]
        for v in range(lp.size):
            out[v] = of_one(lp[v], lq[v], share)

    given = Given(1001, np.float32)
    lp, lq, share = given.logp(), given.logp(), np.float32(0.3)
    out = given.room() if function is not sorted._interval else np.zeros(1001, np.uint32)
    of_all(lp, lq, share, out)
    alone = np.array([of_one(x, y, share) for x, y in zip(lp, lq, strict=True)], out.dtype)
    np.testing.assert_array_equal(alone.view(np.uint32), out.view(np.uint32))


def runs(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> list[tuple[Any, int, Any]]:
    """The kernels of one function of the back end with their arguments, as they were before they ran."""
    found: list[tuple[Any, int, Any]] = []

    def record(kernel: Any, rows: int, *arguments: Any) -> None:
        found.append((kernel, rows, tuple(a.copy() if isinstance(a, np.ndarray) else a for a in arguments)))
        kernel(0, rows, *arguments)

    monkeypatch.setattr(cpu, "_on_rows", record)
    logits = rows_like(3, 300, 4).to(dtype).requires_grad_(True)
    results = ROWS[name](cpu, logits)
    results = results if isinstance(results, tuple) else (results,)
    sum(r.nan_to_num(neginf=0.0).float().square().sum() for r in results if r.requires_grad).backward()
    return found


@pytest.mark.parametrize("name", ROWS)
def test_a_kernel_of_rows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also a row at a time, and all at once: a row's result does not depend on those beside it."""
    for dtype in (torch.float32, torch.bfloat16):
        for kernel, rows, arguments in runs(monkeypatch, name, dtype):

            def by_row(*given: Any, kernel: Any = kernel, rows: int = rows) -> None:
                for n in reversed(range(rows)):
                    kernel(n, n + 1, *given)

            assert_one_result(lambda *given, kernel=kernel, rows=rows: kernel(0, rows, *given), arguments, 6)
            whole, single = (placed(arguments, np.random.default_rng(1)) for _ in range(2))
            kernel(0, rows, *whole)
            by_row(*single)
            assert bits(whole) == bits(single)


def test_no_kernel_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    of_rows = {kernel for name in ROWS for kernel, _, _ in runs(monkeypatch, name, torch.float32)}
    compiled = set().union(*map(compiled_in, (lanes, *LOOPS)))
    missing = compiled - of_rows - {*CASES} - {*SCALARS} - WITHIN
    assert not missing, "without a case here"


def test_a_gradient_may_lie_where_the_logits_did(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in every_function(300).items():
        grads = []
        for overwrite in (False, True):
            logits = rows_like(3, 300, 4).float().requires_grad_(True)
            results = function(cpu, logits, overwrite=overwrite)
            results = results if isinstance(results, tuple) else (results,)
            total = sum(r.nan_to_num(neginf=0.0).sum() for r in results if r.requires_grad)
            grads.append(torch.autograd.grad(total, logits)[0].clone())
        assert torch.equal(*grads), name
