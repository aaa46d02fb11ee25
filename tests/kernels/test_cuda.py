"""The Triton kernels beside the definitions: under Triton's interpreter on a CPU, and on a CUDA device where one is."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from support.kernel_inputs import (
    FORMS,
    INTERPRETER_FAILS,
    every_function,
    generator,
    kept_events,
    layout_of,
    random_layout,
    rows_like,
)
from torch import Tensor

from gold.kernels import BACKENDS, reference, why_not
from gold.kernels.layout import Columns, KeptEvents, Tokens
from gold.kernels.reference import MixedKL, Unshared

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if reason := why_not("cuda", DEVICE):
    pytest.skip(reason, allow_module_level=True)
if DEVICE.type == "cpu" and INTERPRETER_FAILS:
    pytest.skip(INTERPRETER_FAILS, allow_module_level=True)
cuda = BACKENDS["cuda"]
launch = cuda.launch


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, leaves and steps in rows of a hundred columns."""
    sizes = {"TILE": 64, "BACK_TILE": 64, "LEAF": 8, "RANGES": 512, "STEP": 8, "JOIN": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(launch, name, size)


def results(function: Callable[..., Tensor | tuple[Tensor, ...]], logits: Tensor) -> list[Tensor]:
    """What a function returns, and the gradient of a random combination of it, all in float64."""
    logits = logits.detach().requires_grad_(True)
    out = function(logits)
    out = out if isinstance(out, tuple) else (out,)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for k, one in enumerate(o for o in out if o.requires_grad):
        weight = torch.randn(one.shape, dtype=torch.float64, generator=generator(k)).to(one.device)
        total = total + (torch.where(torch.isfinite(one), one.double(), 0.0) * weight).sum()
    (grad,) = torch.autograd.grad(total, logits)
    return [o.detach().double().cpu() for o in (*out, grad)]


def assert_same(
    function: Callable[[ModuleType, Tensor], Tensor | tuple[Tensor, ...]],
    logits: Tensor,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Kernels agree with the definition; in less than float64 they are as near to float64 as the definition is.

    ``function(backend, logits)``; both get the same logits, rounded to ``dtype``.
    """
    logits = logits.to(DEVICE, dtype)
    found = results(lambda z: function(cuda, z), logits)
    exact = results(lambda z: function(reference, z), logits.double())
    naive = results(lambda z: function(reference, z), logits)
    for one, true, other in zip(found, exact, naive, strict=True):
        assert torch.equal(torch.isfinite(one), torch.isfinite(true))
        finite = torch.isfinite(true)
        if not finite.any():
            continue
        scale = true[finite].abs().max()
        error, naive_error = ((x - true)[finite].abs().max() for x in (one, other))
        # What is not a gradient of bfloat16 logits is float32; the interpreter rounds to bfloat16 towards zero.
        unit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
        if dtype == torch.bfloat16 and one is found[-1]:
            unit = 2.0**-7
        assert error <= 1.5 * naive_error + unit * (scale if unit > 1e-6 else 10 + scale)


SHAPES = [
    (1, 1, torch.float64),
    (1, 97, torch.float32),
    (3, 64, torch.bfloat16),
    (4, 131, torch.float64),
]


# Sets of tokens below prefixes


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.float64), (0, torch.bfloat16), (1, torch.float32)])
def test_masses(seed: int, dtype: torch.dtype) -> None:
    layout = random_layout(seed, stopped=seed == 0, device=DEVICE, rows=4)
    logits = rows_like(layout.rows, layout.trie.trie.size + 3 * seed, seed)
    assert_same(lambda backend, z: backend.byte_masses(z, layout, 0), logits, dtype)


@pytest.mark.usefixtures("tiny")
def test_masses_of_a_block_of_rows_in_any_memory_layout() -> None:
    layout = random_layout(2, device=DEVICE, rows=4)
    logits = rows_like(layout.rows, layout.trie.trie.size + 5, 2)[1:-1].t().contiguous().t()
    assert not logits.is_contiguous()
    assert_same(lambda backend, z: backend.byte_masses(z, layout, 1), logits)


def test_masses_with_the_sizes_that_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        # The interpreter's time goes by programs.
        monkeypatch.setattr(launch, "RANGES", 256)
    layout = random_layout(3, count=700, device=DEVICE)
    assert_same(
        lambda backend, z: backend.byte_masses(z, layout, 0), rows_like(layout.rows, layout.trie.trie.size, 3)
    )


def test_masses_where_nothing_is_text_and_where_nothing_stops() -> None:
    for layout in (
        layout_of([b"", b"", b"ab"], [[2]], True, (), DEVICE),
        layout_of([b"", b""], [[]], True, (0, 1), DEVICE),
    ):
        assert_same(
            lambda backend, z, layout=layout: backend.byte_masses(z, layout, 0),
            rows_like(layout.rows, layout.trie.trie.size + 1, 0),
        )


# Rows, columns, chunks


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES)
def test_row_statistics(rows: int, width: int, dtype: torch.dtype) -> None:
    target = torch.tensor([width - 1, -1, width // 2, 0], device=DEVICE)[:rows]
    stops = torch.tensor([0, width // 3], device=DEVICE).unique() if width > 97 else target[:0]
    assert_same(
        lambda backend, z: backend.row_statistics(z, target, stops), rows_like(rows, width, width), dtype
    )


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES)
def test_column_logsumexp(rows: int, width: int, dtype: torch.dtype) -> None:
    event = torch.randint(0, 20, (width,), generator=generator(width)) * 2
    event[::2] = 8
    columns = Columns(event.to(DEVICE), 41)
    logits = rows_like(rows, width, width)
    assert_same(lambda backend, z: backend.column_logsumexp(z, columns), logits, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tokens", "chunks"), [(0, 3), (1, 1), (50, 7)])
def test_chunk_sums(tokens: int, chunks: int, dtype: torch.dtype) -> None:
    chunk = torch.randint(-1, max(chunks - 1, 0), (tokens,), generator=generator(tokens)).to(DEVICE)
    logp = -torch.rand(tokens, dtype=torch.float64, generator=generator(chunks))
    logp[3:4] = -torch.inf
    assert_same(lambda backend, z: backend.chunk_sums(z, chunk, chunks), logp, dtype)


# Divergences


def teacher_rows() -> Tensor:
    """The second row is nearly certain, the last one unsure; no event is impossible."""
    teacher = rows_like(3, 70, 5).clamp(min=-30.0)
    teacher[1, 4] = 60.0
    teacher[2] *= 0.1
    return teacher.to(DEVICE)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("form", "unshared", "smoothing"),
    [
        *zip(FORMS, ["bucket", "renormalise"] * 3, [1e-5] * 5, strict=False),
        (FORMS[2], "bucket", 0.0),
        (FORMS[3], "bucket", 1e-5),
    ],
)
def test_row_divergence(form: MixedKL, unshared: Unshared, smoothing: float) -> None:
    kept_V, kept_W = kept_events(131, 70, DEVICE)
    teacher = teacher_rows()
    assert_same(
        lambda backend, z: backend.row_divergence(
            z, teacher, kept_V, kept_W, form, unshared=unshared, smoothing=smoothing
        ),
        rows_like(3, 131, 4),
    )


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("form", "dtype"), [(FORMS[0], torch.float32), (FORMS[2], torch.bfloat16)])
def test_row_divergence_in_less_than_float64(form: MixedKL, dtype: torch.dtype) -> None:
    kept_V, kept_W = kept_events(131, 70, DEVICE)
    teacher = teacher_rows().to(dtype)
    assert_same(
        lambda backend, z: backend.row_divergence(
            z, teacher.double() if z.dtype == torch.float64 else teacher, kept_V, kept_W, form
        ),
        rows_like(3, 131, 4),
        dtype,
    )


@pytest.mark.usefixtures("tiny")
def test_events_that_one_side_rules_out() -> None:
    """Forward KL to a teacher that gives some events no probability is finite, and so is its gradient."""
    kept_V, kept_W = kept_events(131, 70, DEVICE)
    teacher = rows_like(3, 70, 5).to(DEVICE)
    assert_same(
        lambda backend, z: backend.row_divergence(z, teacher, kept_V, kept_W, FORMS[1]),
        rows_like(3, 131, 4).clamp(min=-30.0),
    )


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("unshared", ["bucket", "renormalise"])
def test_events_that_only_one_side_has_join_the_rest(unshared: Unshared) -> None:
    kept_V, kept_W = kept_events(131, 70, DEVICE)
    teacher = rows_like(3, 70, 5)
    teacher[0, kept_W.stops.cpu()] = -torch.inf
    teacher[2, kept_W.ids[:9].cpu()] = -torch.inf
    teacher = teacher.to(DEVICE)
    assert_same(
        lambda backend, z: backend.row_divergence(
            z, teacher, kept_V, kept_W, FORMS[2], unshared=unshared, only_common=True
        ),
        rows_like(3, 131, 4),
    )


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sorted_distances_of_rows_that_cross(dtype: torch.dtype) -> None:
    """Entries that both sides have, in another order and off by a hundredth, zeros, and ties."""
    p = torch.softmax(rows_like(3, 200, 1), -1)
    q = torch.cat((p[:, torch.randperm(200, generator=generator(2))], torch.zeros(3, 9)), -1)
    q[:, 50:] *= 1.0 + 0.01 * (torch.rand(3, 159, dtype=q.dtype, generator=generator(3)) - 0.5)
    q = q.to(DEVICE, dtype)
    assert_same(lambda backend, z: backend.sorted_l1(z, q.to(z)), p, dtype)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["pieces", "hybrid"])
def test_what_is_made_of_other_kernels(name: str) -> None:
    function = every_function(131, DEVICE)[name]
    assert_same(lambda backend, z: function(backend, z), rows_like(3, 131, 4).clamp(min=-30.0))


def test_gradients_of_a_token_that_counts_often_are_rounded_once() -> None:
    """A column of one token, asked for twenty times, in bfloat16: all that its row gives and takes is 0."""
    once = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    tokens, columns = Tokens(once, once, once > 0), Columns(once[:1], 2)
    assert_same(
        lambda backend, z: backend.piece_masses(z, once[:1], columns, once[:1], tokens),
        rows_like(1, 1, 3),
        torch.bfloat16,
    )


@pytest.mark.usefixtures("tiny")
def test_row_divergence_of_one_vocabulary_without_a_rest() -> None:
    every = torch.arange(50, device=DEVICE)
    kept = KeptEvents(every, every[:0], 50)
    teacher = rows_like(1, 50, 1).to(DEVICE)
    assert_same(
        lambda backend, z: backend.row_divergence(z, teacher, kept, kept, FORMS[0], smoothing=0.0),
        rows_like(1, 50, 2),
    )
    value, mass = cuda.row_divergence(teacher, teacher, kept, kept, FORMS[0], smoothing=0.0)
    assert value.item() == pytest.approx(0.0, abs=1e-14)
    assert mass.item() == pytest.approx(1.0)


# Memory


FUNCTIONS = ["masses", "statistics", "divergence", "common"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_far_apart_whose_gradient_takes_their_place(name: str) -> None:
    """Rows begin beyond 2**31 elements, columns stand two apart; the memory between is reserved and never touched."""
    function = every_function(60, DEVICE)[name]
    rows = rows_like(3, 60, 1).to(DEVICE, torch.bfloat16)
    try:
        room = torch.empty(2**31 + 120, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4 GiB cannot be reserved")
    apart = room.as_strided((3, 60), (2**30, 2))
    apart.copy_(rows)
    expected = results(lambda z: function(cuda, z), rows)
    found = results(lambda z: function(cuda, z, overwrite=True), apart)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(apart.double().cpu(), expected[-1])


@pytest.mark.parametrize("name", ["statistics", "columns", "divergence"])
def test_no_rows(name: str) -> None:
    kept = KeptEvents(torch.arange(3, device=DEVICE), torch.arange(3, 4, device=DEVICE), 5)
    logits = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out = {
        "statistics": lambda: cuda.row_statistics(logits, none, none)[0],
        "columns": lambda: cuda.column_logsumexp(logits, Columns(torch.zeros(5).long().to(DEVICE), 2)),
        "divergence": lambda: cuda.row_divergence(logits, logits, kept, kept, FORMS[0])[0],
    }[name]()
    assert out.shape[0] == 0
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert grad.shape == (0, 5)


# Real sizes

WIDTH = 262_145


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masses_of_a_whole_vocabulary(dtype: torch.dtype) -> None:
    layout = random_layout(11, count=WIDTH - 100, device=DEVICE, letters=26, longest=8, rows=60)
    logits = rows_like(layout.rows, WIDTH, 11)
    assert_same(lambda backend, z: backend.byte_masses(z, layout, 0), logits, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_whole_vocabulary(dtype: torch.dtype) -> None:
    logits = rows_like(64, WIDTH, 12)
    target = torch.arange(64, device=DEVICE) * 4000 - 1
    columns = Columns(torch.randint(0, 30_000, (WIDTH,), generator=generator(1)).to(DEVICE), 30_001)
    stops = torch.tensor([1, 5, WIDTH - 1], device=DEVICE)
    assert_same(lambda backend, z: backend.row_statistics(z, target, stops), logits, dtype)
    assert_same(lambda backend, z: backend.column_logsumexp(z, columns), logits, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_divergences_of_two_whole_vocabularies(form: MixedKL) -> None:
    kept_V, kept_W = kept_events(WIDTH, 151_936, DEVICE)
    teacher = rows_like(64, 151_936, 13).clamp(min=-30.0).to(DEVICE, torch.bfloat16)
    for unshared in ("bucket", "renormalise"):
        assert_same(
            lambda backend, z, unshared=unshared: backend.row_divergence(
                z,
                teacher.to(torch.promote_types(z.dtype, teacher.dtype)),
                kept_V,
                kept_W,
                form,
                unshared=unshared,
            ),
            rows_like(64, WIDTH, 14),
            torch.bfloat16,
        )


@pytest.mark.gpu
def test_sorted_distances_of_two_whole_vocabularies() -> None:
    # Of numbers below the smallest normal one the sign is no matter.
    p, q = (torch.softmax(rows_like(16, w, s).clamp(-30, 30), -1) for w, s in ((WIDTH, 14), (151_936, 13)))
    q = q.to(DEVICE, torch.float32)
    assert_same(lambda backend, z: backend.sorted_l1(z, q.to(z)), p, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["common", "pieces", "hybrid"])
def test_other_functions_of_a_whole_vocabulary(name: str) -> None:
    function = every_function(WIDTH, DEVICE)[name]
    assert_same(lambda backend, z: function(backend, z), rows_like(3, WIDTH, 4).clamp(min=-30.0))


@pytest.mark.gpu
def test_two_runs_give_the_same_bits() -> None:
    layout = random_layout(11, count=50_000, device=DEVICE, letters=26, longest=8, rows=60)
    logits = rows_like(layout.rows, layout.trie.trie.size, 15).to(DEVICE, torch.float32)
    chunk = torch.randint(-1, 100, (100_000,), generator=generator(0)).to(DEVICE)
    logp = -torch.rand(100_000, generator=generator(1)).to(DEVICE)
    for function, values in (
        (lambda z: cuda.byte_masses(z, layout, 0), logits),
        (lambda z: cuda.chunk_sums(z, chunk, 100), logp),
        (lambda z: cuda.sorted_l1(torch.softmax(z, -1), torch.softmax(z[:, ::2].detach(), -1)), logits),
    ):
        for one, other in zip(results(function, values), results(function, values), strict=True):
            assert torch.equal(one, other)
