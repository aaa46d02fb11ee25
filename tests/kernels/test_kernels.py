"""Every back end against the definition in float64: odd shapes, ties, rows of −inf, rows near probability 1."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from support.kernel_inputs import FORCED, random_layout
from torch import Tensor

from gold.kernels import BACKENDS, reference
from gold.kernels.layout import Columns, KeptEvents, Tokens
from gold.kernels.reference import MixedKL
from gold.losses import DIVERGENCES
from gold.losses.divergences import form_of

over = pytest.mark.parametrize("backend", FORCED, indirect=True)
Function = Callable[..., Tensor | tuple[Tensor, ...]]

FORMS = {name: form for name, d in DIVERGENCES.items() if (form := form_of(d))}
FORMS["jsd, a little"] = MixedKL(student=0.9, student_mix=0.1, teacher=0.1, teacher_mix=0.1)
FORMS["entropy"] = MixedKL(student=1.0, teacher=0.5, above_nats=1.2)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return BACKENDS[request.param]


def logits_of(rows: int, width: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(
        rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def outcome(function: Function, logits: Tensor, *, draw: int = 1) -> list[Tensor]:
    """Values and gradient, in float64, of a random sum of the values."""
    given = logits.clone().requires_grad_(True)
    values = function(given)
    values = values if isinstance(values, tuple) else (values,)
    generator = torch.Generator().manual_seed(draw)
    total = logits.new_zeros((), dtype=torch.float64)
    for value in values:
        if value.requires_grad:
            share = torch.randn(value.shape, dtype=torch.float64, generator=generator)
            total = total + (share * value.double().masked_fill(~value.isfinite(), 0.0)).sum()
    (grad,) = torch.autograd.grad(total, given)
    assert grad.dtype == logits.dtype
    return [*(v.detach().double() for v in values), grad.double()]


def agree(
    ours: Function, definition: Function, logits: Tensor, *, single: float, also: float = 1e-11
) -> None:
    """As exact as the definition: in float64 to rounding, below that no further from float64 than it is itself, plus
    ``single`` times the precision of float32 (and of what bfloat16 rounds a gradient to)."""
    exact = outcome(definition, logits)
    for value, truth in zip(outcome(ours, logits), exact, strict=True):
        torch.testing.assert_close(value, truth, rtol=also, atol=also)
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(dtype)
        exact, naive = outcome(definition, given.double()), outcome(definition, given)
        *values, grad = outcome(ours, given)
        for value, other, truth in zip([*values, grad], [*naive[:-1], naive[-1]], exact, strict=True):
            assert torch.equal(value.isneginf(), truth.isneginf())
            assert torch.equal(value.isposinf(), truth.isposinf())
            here = truth.isfinite()
            size = 1.0 + truth[here].abs()
            rounding = 2.0**-7 if value is grad and dtype == torch.bfloat16 else single * 2.0**-23
            off, off_naive = ((x[here] - truth[here]).abs() / size for x in (value, other))
            allowed = off_naive.max() + rounding if here.any() else torch.tensor(0.0)
            assert (off <= allowed).all(), (dtype, float(off.max()), float(allowed))


def odd(logits: Tensor) -> Tensor:
    """With a row that is certain, one that is nearly so, and one with every third column at −inf."""
    logits = logits.clone()
    rows, width = logits.shape
    if width > 2:
        logits[rows // 2, ::3] = -torch.inf
        logits[-1] = logits[-1] - 40.0
        logits[-1, width // 2] = 25.0
        if rows > 2:
            logits[1], logits[1, 1] = -torch.inf, 2.0
    return logits


SHAPES = [(1, 1), (1, 5), (3, 64), (5, 1037), (2, 70001)]


@over
@pytest.mark.parametrize(("seed", "extra"), [(0, 0), (1, 3), (2, 900)])
def test_byte_masses(backend: ModuleType, seed: int, extra: int) -> None:
    layout = random_layout(seed, stopped=seed != 1, rows=8)
    logits = odd(logits_of(layout.rows, layout.trie.trie.size + extra, seed))
    agree(
        lambda x: backend.byte_masses(x, layout, 0),
        lambda x: reference.byte_masses(x, layout, 0),
        logits,
        single=8 * 60,
    )
    whole = backend.byte_masses(logits, layout, 0)
    for place, part in enumerate(backend.byte_masses(logits[2:], layout, 2)):
        torch.testing.assert_close(part, whole[place][len(whole[place]) - len(part) :], rtol=0.0, atol=0.0)


@over
@pytest.mark.parametrize("shape", SHAPES)
def test_row_statistics(backend: ModuleType, shape: tuple[int, int]) -> None:
    rows, width = shape
    target = torch.arange(rows) * 7 % width
    target[-1] = -1 if rows > 1 else 0
    stops = torch.tensor([0, width - 1][: min(2, width)])
    agree(
        lambda x: backend.row_statistics(x, target, stops),
        lambda x: reference.row_statistics(x, target, stops),
        odd(logits_of(rows, width, 1)),
        single=8 * 40,
    )


@over
@pytest.mark.parametrize("shape", SHAPES)
def test_column_logsumexp(backend: ModuleType, shape: tuple[int, int]) -> None:
    if not hasattr(backend, "column_logsumexp"):
        pytest.skip("it sums within piece_masses")
    rows, width = shape
    event = torch.randint(0, max(1, width // 3), (width,), generator=torch.Generator().manual_seed(2))
    columns = Columns(event, width // 3 + 5)
    agree(
        lambda x: backend.column_logsumexp(x, columns),
        lambda x: reference.column_logsumexp(x, columns),
        odd(logits_of(rows, width, 3)),
        single=8 * 40,
    )


@over
@pytest.mark.parametrize("shape", SHAPES)
def test_piece_masses(backend: ModuleType, shape: tuple[int, int]) -> None:
    """Not all rows are whole for a position, some tokens are moved from their row's sums, some are asked for twice."""
    rows, width = shape
    draw = torch.Generator().manual_seed(7)
    event = torch.randint(0, max(1, width // 3), (width,), generator=draw)
    columns = Columns(event, width // 3 + 2)
    target = torch.arange(rows) * 7 % width
    target[-1] = -1 if rows > 1 else 0
    whole = torch.randperm(rows, generator=draw)[: max(1, rows - 1)].sort().values
    count = 20
    row, id_ = (
        torch.randint(0, rows, (count,), generator=draw),
        torch.randint(0, width, (count,), generator=draw),
    )
    moved = torch.zeros(count, dtype=torch.bool)
    if width > 5:
        moved[:3] = True
        id_[3:6] = id_[0]
    tokens = Tokens(row, id_, moved)
    agree(
        lambda x: backend.piece_masses(x, target, columns, whole, tokens),
        lambda x: reference.piece_masses(x, target, columns, whole, tokens),
        odd(logits_of(rows, width, 3)),
        single=8 * 60,
    )


@over
def test_sums_far_below_the_largest_are_not_lost(backend: ModuleType) -> None:
    """In single precision e^−200 is 0; its logarithm is not."""
    logits = torch.tensor([[0.0, -200.0, -201.0, -torch.inf, -300.0, -torch.inf]])
    columns, none = Columns(torch.tensor([0, 1, 1, 1, 2, 3]), 5), torch.zeros(0, dtype=torch.int64)
    given = torch.tensor([-1]), columns, torch.tensor([0]), Tokens(none, none, none.bool())
    value, *_, grad = outcome(lambda x: backend.piece_masses(x, *given), logits)
    expected = [0.0, -200.0 + math.log1p(math.exp(-1.0)), -300.0, -math.inf, -math.inf]
    torch.testing.assert_close(value[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert grad.isfinite().all()
    assert grad[0, [1, 4]].all()


@over
def test_segment_logsumexp(backend: ModuleType) -> None:
    value = logits_of(1, 900, 4)[0]
    value[::5] = -torch.inf
    segment = torch.randint(0, 400, (900,), generator=torch.Generator().manual_seed(5))
    segment[segment == 7] = 8
    ours, truth = (
        outcome(lambda x, b=b: b.segment_logsumexp(x, segment, 401), value) for b in (backend, reference)
    )
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@over
def test_chunk_sums_of_rows_in_no_chunk(backend: ModuleType) -> None:
    none = torch.full((3,), -1)
    assert backend.chunk_sums(torch.full((3,), -torch.inf), none, 0).shape == (0,)
    assert backend.chunk_sums(torch.full((3,), -torch.inf), none, 2).tolist() == [0.0, 0.0]


@over
def test_chunk_sums(backend: ModuleType) -> None:
    chunk = torch.tensor([0, 0, -1, 2, 2, 2, -1])
    value, grad = outcome(
        lambda x: backend.chunk_sums(x, chunk, 4), -torch.arange(1.0, 8.0, dtype=torch.float64)
    )
    assert value.tolist() == [-3.0, 0.0, -15.0, 0.0]
    assert grad[2] == grad[6] == 0.0
    assert grad[0] == grad[1]


def kept_of(width: int, shared: int, stops: list[int], seed: int) -> KeptEvents:
    free = [v for v in range(width) if v not in stops]
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))[:shared]
    return KeptEvents(
        torch.tensor(free, dtype=torch.int64)[order], torch.tensor(stops, dtype=torch.int64), width
    )


def finite_at_both(x: Tensor) -> Tensor:
    """Without −inf: what only one side can never say costs infinitely much."""
    return x.clamp(min=-60.0)


@over
@pytest.mark.parametrize("unshared", ["bucket", "renormalise"])
@pytest.mark.parametrize("name", sorted(FORMS))
def test_row_divergence(backend: ModuleType, name: str, unshared: reference.Unshared) -> None:
    mine, theirs = kept_of(1037, 600, [3, 9], 1), kept_of(2011, 600, [5], 2)
    logits, logits_T = (finite_at_both(odd(logits_of(5, w, s))) for w, s in ((1037, 6), (2011, 7)))

    def of(b: ModuleType) -> Function:
        return lambda x: b.row_divergence(
            x, logits_T.to(x.dtype), mine, theirs, FORMS[name], unshared=unshared
        )

    agree(of(backend), of(reference), logits, single=8 * 60, also=1e-9)


@over
@pytest.mark.parametrize("unshared", ["bucket", "renormalise"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "reverse_kl"])
def test_events_that_only_one_side_has_join_the_rest(
    backend: ModuleType, name: str, unshared: reference.Unshared
) -> None:
    mine, theirs = kept_of(1037, 600, [3, 9], 1), kept_of(2011, 600, [5], 2)
    logits, logits_T = (odd(logits_of(5, w, s)) for w, s in ((1037, 6), (2011, 7)))
    logits_T[3, theirs.ids[:300]] = -torch.inf
    logits[0, mine.stops] = logits_T[2, theirs.stops] = -torch.inf
    logits = torch.cat((logits[:1], logits[2:]))
    logits_T = torch.cat((logits_T[:1], logits_T[2:]))

    def of(b: ModuleType) -> Function:
        return lambda x: b.row_divergence(
            x, logits_T.to(x.dtype), mine, theirs, FORMS[name], unshared=unshared, only_common=True
        )

    agree(of(backend), of(reference), logits, single=8 * 60, also=1e-9)


@over
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "reverse_kl", "skew_kl"])
@pytest.mark.parametrize("columns", [(1037, 2011, 600), (2011, 1037, 0), (7, 5, 4)])
def test_hybrid_distance(backend: ModuleType, name: str, columns: tuple[int, int, int]) -> None:
    width, width_T, shared = columns
    mine, theirs = kept_of(width, shared, [0], 1), kept_of(width_T, shared, [1] if shared else [], 2)
    if not shared:
        mine = KeptEvents(mine.ids, mine.stops[:0], width)
    logits, logits_T = (finite_at_both(odd(logits_of(5, w, s))) for w, s in ((width, 6), (width_T, 7)))
    before, before_T = -torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def of(b: ModuleType) -> Function:
        def distance(x: Tensor) -> tuple[Tensor, ...]:
            # Its gradient by what came before is that of a state with the same sum of logits.
            log_before = before + 0.01 * x.double().clamp(min=-60.0).mean(-1)
            return b.hybrid_distance(
                x, logits_T.to(x.dtype), log_before, before_T, mine, theirs, FORMS[name], 0.3
            )

        return distance

    agree(of(backend), of(reference), logits, single=8 * 60, also=1e-9)


@over
@pytest.mark.parametrize("columns", [(1, 1, 0), (2, 1, 1), (5, 9, 3)])
def test_row_divergence_of_few_columns(backend: ModuleType, columns: tuple[int, int, int]) -> None:
    """Nothing shared but the stop event, or nothing left on one side."""
    width, width_T, shared = columns
    mine, theirs = kept_of(width, shared, [0], 1), kept_of(width_T, shared if width_T > shared else 0, [0], 2)
    shared = min(mine.ids.numel(), theirs.ids.numel())
    mine, theirs = (KeptEvents(k.ids[:shared], k.stops, k.width) for k in (mine, theirs))
    logits_T = logits_of(3, width_T, 8)

    def of(b: ModuleType) -> Function:
        return lambda x: b.row_divergence(x, logits_T.to(x.dtype), mine, theirs, MixedKL(student=1.0))

    agree(of(backend), of(reference), logits_of(3, width, 9), single=64, also=1e-9)


@over
@pytest.mark.parametrize("name", sorted(FORMS))
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_nothing_in_single_precision_costs_nothing(backend: ModuleType, name: str, side: int) -> None:
    """One side gives a token e^−200, the other rules it out: 0 · ∞ is no number."""
    every = KeptEvents(torch.arange(2), torch.arange(0), 2)
    rows = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -torch.inf]])
    value, _ = backend.row_divergence(
        rows[side], rows[1 - side], every, every, FORMS[name], unshared="renormalise"
    )
    assert value.tolist() == pytest.approx([0.0], abs=1e-6)


@over
@pytest.mark.parametrize("name", sorted(FORMS))
def test_certain_rows_that_are_nearly_equal_have_a_divergence_that_is_nearly_zero(
    backend: ModuleType, name: str
) -> None:
    """Both give a token all but 1e-8: a difference of logarithms would be off by the precision of single numbers."""
    every = KeptEvents(torch.arange(50), torch.arange(0), 50)
    logits, logits_T = (logits_of(4, 50, s) for s in (1, 2))
    for x in (logits, logits_T):
        x[:, 7] = 25.0
    exact, _ = reference.row_divergence(logits, logits_T, every, every, FORMS[name], smoothing=0.0)
    single, _ = backend.row_divergence(
        logits.float(), logits_T.float(), every, every, FORMS[name], smoothing=0.0
    )
    allowed = 1e-6 if backend is reference else 1e-12
    assert (single.double() - exact).abs().max() <= allowed + 1e-3 * exact.abs().max()


@over
def test_equal_rows_have_no_divergence_and_no_gradient(backend: ModuleType) -> None:
    every = KeptEvents(torch.arange(700), torch.arange(0), 700)
    logits = odd(logits_of(4, 700, 1)).float()
    for form in FORMS.values():
        value, _, grad = outcome(
            lambda x, form=form: backend.row_divergence(x, logits, every, every, form, smoothing=0.0), logits
        )
        assert value.abs().max() < 1e-6
        assert grad.abs().max() < 1e-6


def probabilities(rows: int, width: int, seed: int) -> Tensor:
    return torch.softmax(odd(logits_of(rows, width, seed)), -1)


@over
@pytest.mark.parametrize("widths", [(1, 1), (1, 7), (64, 5), (1037, 2011), (2011, 1037)])
def test_sorted_l1(backend: ModuleType, widths: tuple[int, int]) -> None:
    p, q = (probabilities(4, w, s) for s, w in enumerate(widths))
    for dtype, within in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        value, grad = outcome(lambda x: backend.sorted_l1(x, q.to(x)), p.to(dtype))
        truth, slope = outcome(lambda x: reference.sorted_l1(x, q.to(x)), p.to(dtype).double())
        torch.testing.assert_close(value, truth, rtol=within, atol=within)
        # Where entries are equal they may share out their signs.
        for n in range(p.shape[0]):
            alone = torch.unique(p[n].to(dtype), return_counts=True)
            single = torch.isin(p[n].to(dtype), alone[0][alone[1] == 1])
            torch.testing.assert_close(grad[n, single], slope[n, single])


@over
def test_sorted_l1_of_ties(backend: ModuleType) -> None:
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]])
    given = p.clone().requires_grad_(True)
    value = backend.sorted_l1(given, q)
    torch.testing.assert_close(value, torch.tensor([0.5, 0.0]))
    (grad,) = torch.autograd.grad(value.sum(), given)
    assert sorted(grad[0].tolist()) == [-1.0, 0.0, 0.0, 1.0] or grad[0].abs().max() <= 1.0
    assert grad[1].tolist() == [0.0, 0.0, 0.0, 0.0]


@over
@pytest.mark.parametrize("shared", [0, 500, 2011])
def test_sorted_l1_where_the_sides_cross_often(backend: ModuleType, shared: int) -> None:
    """Entries that both sides have, and noise of a hundredth: the sign flips all along the ranks."""
    p = probabilities(3, 2011, 3)
    q = p[:, torch.randperm(2011, generator=torch.Generator().manual_seed(1))]
    noise = torch.rand(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(2))
    q[:, shared:] *= 1.0 + 0.01 * (noise - 0.5)[:, shared:]
    torch.testing.assert_close(backend.sorted_l1(p, q), reference.sorted_l1(p, q), rtol=1e-12, atol=1e-15)


@over
def test_views_are_read_where_they_are(backend: ModuleType) -> None:
    """Every second column, rows that are one row: strides are no copies."""
    wide = logits_of(4, 1200, 1).float()
    stops, target = torch.tensor([1]), torch.arange(4)
    for view in (wide[:, ::2], wide[:1, ::2].expand(4, 600), wide.T[:600].T):
        for function in (
            lambda b, x: b.row_statistics(x, target, stops),
            lambda b, x: (b.sorted_l1(torch.softmax(x, -1)[:, ::3], torch.softmax(x, -1)[:, 1::3]),),
        ):
            for ours, other in zip(function(backend, view), function(backend, view.clone()), strict=True):
                torch.testing.assert_close(ours, other, rtol=0.0, atol=0.0)


@over
def test_what_is_not_a_number_stays_none(backend: ModuleType) -> None:
    """A weight that is NaN must stop a run, not be taken for improbable."""
    logits = logits_of(2, 100, 1).float()
    logits[1, 50] = math.nan
    every = KeptEvents(torch.arange(100), torch.arange(0), 100)
    stops = torch.tensor([1])
    assert backend.row_statistics(logits, torch.tensor([2, 2]), stops)[1].isnan().tolist() == [False, True]
    value, _ = backend.row_divergence(
        logits, logits_of(2, 100, 2).float(), every, every, MixedKL(student=1.0)
    )
    assert value.isnan().tolist() == [False, True]
    p = torch.softmax(logits, -1)
    assert backend.sorted_l1(p, p.flip(-1)[:, :70]).isnan().tolist() == [False, True]


@over
@pytest.mark.slow
def test_rows_of_a_real_vocabulary(backend: ModuleType) -> None:
    """262,145 columns: one more than the widest."""
    logits, width = logits_of(2, 262_145, 1), 262_145
    stops, target = torch.tensor([1, width - 1]), torch.tensor([5, width - 2])
    agree(
        lambda x: backend.row_statistics(x, target, stops),
        lambda x: reference.row_statistics(x, target, stops),
        logits,
        single=64,
    )
    kept, kept_T = kept_of(width, 90_000, [1], 1), kept_of(49_153, 49_000, [1], 2)
    kept = KeptEvents(kept.ids[:49_000], kept.stops, width)
    logits_T = logits_of(2, 49_153, 2)

    def of(b: ModuleType) -> Function:
        return lambda x: b.row_divergence(x, logits_T.to(x.dtype), kept, kept_T, FORMS["jsd"])

    agree(of(backend), of(reference), logits, single=64, also=1e-9)
    p, q = torch.softmax(logits, -1), torch.softmax(logits_T, -1)
    torch.testing.assert_close(backend.sorted_l1(p, q), reference.sorted_l1(p, q), rtol=1e-10, atol=1e-12)


@over
@pytest.mark.slow
def test_more_than_two_to_the_31_numbers(backend: ModuleType) -> None:
    """In the last of these rows an offset of 32 bits has come round."""
    width, rows = 2**18, 2**13 + 3
    if backend is not BACKENDS["cpu"]:
        pytest.skip(
            "torch's offsets are its own; Triton's interpreter would take hours, and has a test of strides"
        )
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6 * 2**30:
        pytest.skip("it takes 4.3 GB of memory")
    logits = torch.zeros(rows, width, dtype=torch.bfloat16)
    logits[-1, -1] = 20.0
    target = torch.full((rows,), -1)
    target[-1] = width - 1
    _, logp, *_ = backend.row_statistics(logits, target, torch.tensor([0]))
    assert float(logp[-1]) == pytest.approx(-math.log1p((width - 1) * math.exp(-20.0)), abs=1e-6)


@pytest.mark.parametrize("name", sorted(FORMS))
@pytest.mark.parametrize("unshared", ["bucket", "renormalise"])
def test_the_definition_agrees_with_finite_differences(name: str, unshared: reference.Unshared) -> None:
    mine, theirs = kept_of(9, 4, [3], 1), kept_of(8, 4, [5], 2)
    logits, logits_T = logits_of(2, 9, 1, 1.0).requires_grad_(True), logits_of(2, 8, 2, 1.0)
    form = FORMS[name]

    def value(x: Tensor) -> Tensor:
        return reference.row_divergence(x, logits_T, mine, theirs, form, unshared=unshared)[0]

    assert torch.autograd.gradcheck(value, (logits,))


def test_the_other_definitions_agree_with_finite_differences() -> None:
    logits = logits_of(2, 9, 1, 1.0).requires_grad_(True)
    columns, target = Columns(torch.tensor([0, 1, 1, 2, 2, 2, 0, 3, 3]), 5), torch.tensor([4, -1])
    segment = torch.tensor([0, 2, 2, 1, 1, 1, 0, 0, 2])
    q = torch.softmax(logits_of(2, 12, 2, 1.0), -1)
    assert torch.autograd.gradcheck(
        lambda x: reference.row_statistics(x, target, torch.tensor([1, 2]))[:3], (logits,)
    )
    assert torch.autograd.gradcheck(lambda x: reference.column_logsumexp(x, columns)[:, :4], (logits,))
    assert torch.autograd.gradcheck(lambda x: reference.segment_logsumexp(x[0], segment, 3), (logits,))
    assert torch.autograd.gradcheck(lambda x: reference.sorted_l1(torch.softmax(x, -1), q), (logits,))
    tokens = Tokens(torch.tensor([0, 1, 1]), torch.tensor([3, 0, 8]), torch.tensor([True, False, False]))
    whole, some = torch.tensor([1, 0]), Columns(torch.tensor([0, 1, 1, 2, 2, 2, 0, 1, 1]), 3)
    assert torch.autograd.gradcheck(
        lambda x: reference.piece_masses(x, target, some, whole, tokens), (logits,)
    )
    mine, theirs = kept_of(9, 4, [3], 1), kept_of(8, 4, [5], 2)
    logits_T, before = logits_of(2, 8, 2, 1.0), torch.tensor([-0.5, -0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, b: reference.hybrid_distance(x, logits_T, b, before, mine, theirs, FORMS["jsd"], 0.3)[0],
        (logits, before.clone().requires_grad_(True)),
    )
