"""The contract that every objective is held to, clause by clause, over the whole table of objectives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import oracle
from support.kernel_inputs import BACKENDS_HERE, FORCED

from gold.align.vocabularies import VocabularyPair
from gold.kernels import chunk_sums, use_backend
from gold.kernels.tables import byte_tables, common_events
from gold.losses import DIVERGENCES, OBJECTIVES, Loss, forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl
from tests.contract.clauses import (
    CLAUSES,
    PAIR,
    STUDENT,
    TEACHER,
    gradient,
    needs_one_vocabulary,
    pair_for,
    texts_for,
    variants,
)
from tests.contract.toys import (
    ToyModel,
    aligned,
    batch_of,
    counted,
    inputs_of,
    random_texts,
    student_rows,
    teacher_rows,
    toy_vocabulary,
)

VARIANTS = dict(variants())
BY_NUMBER = {clause.number: clause for clause in CLAUSES}

over = partial(pytest.mark.parametrize, "name")


def by_form(name: str, number: str) -> list[pytest.MarkDecorator]:
    """Clauses 6 and 8b take seconds for a divergence between states, and 8b one with options; most forms have them
    among the slow tests."""
    kind, _, support = name.partition("/")
    quick = name in ("reverse_kl/bytes", "forward_kl/prefix") or support.startswith("shared")
    between_states = kind.split()[0] in DIVERGENCES and not quick
    slow = (number in ("6", "8b") and between_states) or (number == "8b" and ", " in kind)
    return [pytest.mark.slow] if slow else []


def of_the_definition(name: str) -> list[pytest.MarkDecorator]:
    """Each objective is compared with the definition below; all its forms are among the slow tests."""
    kind, _, support = name.partition("/")
    return [pytest.mark.slow] if kind.split()[0] in DIVERGENCES and support not in ("bytes", "shared") else []


@pytest.mark.parametrize(
    ("name", "number"),
    [pytest.param(n, c, marks=by_form(n, c)) for n in sorted(VARIANTS) for c in BY_NUMBER],
)
def test_the_clause_holds(name, number):
    objective = VARIANTS[name]
    if number in objective.exceptions:
        return  # shown below
    outcome = BY_NUMBER[number].measure(objective)
    assert outcome is None or outcome.holds, f"{BY_NUMBER[number].says}: {outcome}"


@over([pytest.param(n, marks=of_the_definition(n)) for n in sorted(VARIANTS)])
@pytest.mark.parametrize("number", ["1", "4", "5a", "7"])
def test_the_clause_holds_with_the_definition_of_the_kernels(name, number):
    with use_backend("reference"):
        test_the_clause_holds(name, number)


EXCEPTIONS = sorted(
    {(o.options.get("support") or o.name, n) for o in VARIANTS.values() for n in o.exceptions}
)


@pytest.mark.parametrize(("owner", "number"), EXCEPTIONS)
def test_an_exception_is_shown_to_be_one(owner, number):
    """A clause that an objective, or a support, is excused from does fail, for one of its variants at least."""
    its_own = [o for o in VARIANTS.values() if (o.options.get("support") or o.name) == owner]
    outcomes = (BY_NUMBER[number].measure(o) for o in its_own)
    assert any(outcome is not None and not outcome.holds for outcome in outcomes)


def test_every_objective_of_the_table_is_under_contract():
    assert {o.name for o in VARIANTS.values()} == set(OBJECTIVES)


# 2. The same tokenizer on both sides reproduces the plain token-level objective.


def test_bytes_sum_up_to_the_token_level_divergence_where_no_token_begins_another(monkeypatch):
    """Chain rule of KL: over the sampled token, the expected sum over its bytes is the divergence of the tokens."""
    monkeypatch.setattr("gold.kernels.tables.SMOOTHING", 1e-15)
    vocabulary = toy_vocabulary(["a+b", "b+b"], letters="ab", cut=None)
    pair = VocabularyPair(vocabulary, vocabulary)
    student, teacher = ToyModel(vocabulary, 1), ToyModel(vocabulary, 2)
    # Only tokens that are no prefix of another: ab, bb, stop.
    allowed = [vocabulary.tokenizer.token_to_id(t) for t in ("ab", "bb", "<eos>")]
    logits, logits_T = (torch.full((2, vocabulary.size), -torch.inf, dtype=torch.float64) for _ in range(2))
    for model, target in ((student, logits), (teacher, logits_T)):
        target[:, allowed] = model.states([allowed[0]], 2)[:, allowed]
    p, q = torch.softmax(logits[0], -1), torch.softmax(logits_T[0], -1)
    expected = oracle.kl(p[allowed], q[allowed])
    objective = OBJECTIVES["reverse_kl"]()
    total = 0.0
    for v in allowed[:2]:
        text = aligned(pair, [v])
        value, _ = gradient(objective, inputs_of(pair, [text], logits[:1], logits_T[:1]))
        total += float(p[v]) * value
    stop = aligned(pair, [allowed[2]])
    value, _ = gradient(objective, inputs_of(pair, [stop], logits[:1], logits_T[:1]))
    total += float(p[allowed[2]]) * value
    assert total == pytest.approx(float(expected), rel=1e-9)


# 5. Padded positions, padding rows of the output matrix, and the order in a batch are inert.


@over(sorted(OBJECTIVES))
@pytest.mark.parametrize("name_of_backend", FORCED)
def test_every_back_end_computes_the_same(name, name_of_backend):
    objective = next(o for o in VARIANTS.values() if o.name == name)
    pair = pair_for(objective)
    texts = texts_for(objective, pair)[:2]
    rows = student_rows(ToyModel(pair.student, 3), texts), teacher_rows(ToyModel(pair.teacher, 4), texts)
    found = []
    for backend in ("reference", name_of_backend):
        with use_backend(backend):
            found.append(gradient(objective, inputs_of(pair, texts, *rows)))
    (expected, grad), (value, grad_2) = found
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(grad_2, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif("cuda" not in BACKENDS_HERE, reason="triton does not run here")
@pytest.mark.slow
def test_the_default_objective_is_the_same_under_triton():
    test_every_back_end_computes_the_same("reverse_kl", "cuda")


@over(sorted(VARIANTS))
@pytest.mark.parametrize("backend", FORCED, indirect=True)
def test_special_ids_without_a_row_are_inert(name, backend):
    """The last ids of a vocabulary are special, and the output matrix does not have them."""
    objective = VARIANTS[name]
    student, teacher = (
        toy_vocabulary(m, cut=c, unused=2) for m, c in ((["a+b", "b+ ", "ab+b"], None), (["b+a"], " "))
    )
    if needs_one_vocabulary(objective):
        teacher = student
    pair = VocabularyPair(student, teacher)
    texts = texts_for(objective, pair)
    rows = student_rows(ToyModel(student, 3), texts), teacher_rows(ToyModel(teacher, 4), texts)
    masked = [x.clone() for x in rows]
    for x in masked:
        x[:, -2:] = -torch.inf
    expected, grad = gradient(objective, inputs_of(pair, texts, *masked))
    value, grad_cut = gradient(objective, inputs_of(pair, texts, *(x[:, :-2] for x in rows)))
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(grad_cut, grad[:, :-2])


@pytest.mark.parametrize("kind", sorted(DIVERGENCES))
def test_a_token_whose_beginning_is_no_token_costs_no_infinity(kind):
    """Inside such a token its side has no rest at all, while the other side can stop there."""
    long = toy_vocabulary(["b+c", "a+bc"], letters="abc", cut=None)
    letters = toy_vocabulary([], letters="abc", cut=None)
    for student, teacher in ((long, letters), (letters, long)):
        pair = VocabularyPair(student, teacher)
        text = aligned(pair, [*student.encode("abcabc").ids.tolist(), student.stop_ids[0]])
        value, grad = gradient(
            OBJECTIVES[kind](), inputs_of(pair, [text], ToyModel(student, 1), ToyModel(teacher, 2))
        )
        assert 0 < value < 100
        assert torch.isfinite(grad).all()


def test_the_end_of_a_text_that_was_cut_off_is_not_supervised():
    a = STUDENT.encode("ab").ids.tolist()
    cut, ended = (batch_of(PAIR, [aligned(PAIR, ids)]) for ids in (a, [*a, STUDENT.stop_ids[0]]))
    for name in ("reverse_kl/bytes", "reverse_kl/shared"):
        assert VARIANTS[name].count(ended) == VARIANTS[name].count(cut) + 1


# 6. Chunk sums conserve log-probability, tables are distributions, divergences are proper.


@pytest.mark.parametrize("backend", FORCED, indirect=True)
def test_chunk_sums_conserve_log_probability(backend):
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    chunk = torch.randint(-1, 9, (50,), generator=generator)
    sums = chunk_sums(logp, chunk, 9)
    for c in range(9):
        assert sums[c].item() == pytest.approx(logp[chunk == c].sum().item())
    assert sums.sum().item() == pytest.approx(logp[chunk >= 0].sum().item())
    (grad,) = torch.autograd.grad((sums * torch.arange(9.0)).sum(), logp)
    torch.testing.assert_close(grad, torch.where(chunk >= 0, chunk, 0).double())


@pytest.mark.parametrize("backend", FORCED, indirect=True)
def test_byte_tables_are_the_definition(backend):
    for seed in range(5):
        texts = random_texts(PAIR, 5, seed)
        batch = batch_of(PAIR, texts)
        for model, layout, vocabulary, side in (
            (ToyModel(STUDENT, 3, extra=2), batch.student.layout, STUDENT, "student"),
            (ToyModel(TEACHER, 4), batch.teacher.layout, TEACHER, "teacher"),
        ):
            rows_of = student_rows if side == "student" else teacher_rows
            inputs = inputs_of(PAIR, texts, rows_of(model, texts), rows_of(model, texts))
            table, _, _ = byte_tables(inputs.student, layout)
            expected = torch.cat(
                [
                    oracle.byte_table(
                        [vocabulary.token_bytes(i) or None for i in range(vocabulary.size)],
                        vocabulary.stop_ids,
                        rows_of(model, [t]),
                        getattr(t, side).ids.tolist(),
                        t.student.data,
                        t.stopped,
                    )
                    for t in texts
                ]
            )
            kept = layout.supervised
            assert torch.equal(kept, expected.sum(-1) > 0)
            torch.testing.assert_close(table[kept].exp(), expected[kept], rtol=1e-10, atol=1e-14)


def test_common_events_keep_the_mass_and_name_only_what_both_resolve():
    generator = torch.Generator().manual_seed(1)
    table = torch.log_softmax(torch.randn(20, 258, generator=generator, dtype=torch.float64), -1)
    mine, theirs = (torch.rand(20, 258, generator=generator) < 0.5 for _ in range(2))
    joined = common_events(table, mine, theirs)
    torch.testing.assert_close(joined.exp().sum(-1), torch.ones(20, dtype=torch.float64))
    both = (mine & theirs)[:, :257]
    torch.testing.assert_close(joined[:, :257][both], table[:, :257][both], atol=2e-5, rtol=0)
    assert torch.isneginf(joined[:, :257][~both]).all()


@pytest.mark.parametrize(
    "divergence", [reverse_kl, forward_kl, jsd, partial(jsd, beta=0.1), skew_kl, skew_reverse_kl]
)
def test_divergences_are_positive_and_zero_only_at_equality(divergence):
    generator = torch.Generator().manual_seed(2)
    p, q = (
        torch.log_softmax(3 * torch.randn(200, 7, generator=generator, dtype=torch.float64), -1)
        for _ in range(2)
    )
    assert (divergence(p, q) > 1e-6).all()
    torch.testing.assert_close(divergence(p, p), torch.zeros(200, dtype=torch.float64))


def test_jsd_is_the_formula_of_gkd_and_its_ends_are_the_two_kls():
    p, q = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.6, 0.1, 0.3]).double()
    mixture = 0.3 * q + 0.7 * p
    expected = 0.3 * oracle.kl(q, mixture) + 0.7 * oracle.kl(p, mixture)
    torch.testing.assert_close(jsd(p.log(), q.log(), 0.3), expected)
    torch.testing.assert_close(jsd(p.log(), q.log(), 0.0), oracle.kl(q, p))
    torch.testing.assert_close(jsd(p.log(), q.log(), 1.0), oracle.kl(p, q))


# 7. Sampled estimators agree with enumeration.


def test_the_expected_gradient_of_span_pg_is_that_of_the_spans_reverse_kl():
    """All sequences of a toy student, weighted by their probability, against the exact gradient, state by state."""
    student_vocabulary = toy_vocabulary(["a+b"], letters="ab ", cut=None)
    teacher_vocabulary = toy_vocabulary(["b+a"], letters="ab ")
    pair = VocabularyPair(student_vocabulary, teacher_vocabulary)
    student = ToyModel(student_vocabulary, 1, longest=3, requires_grad=True, never=("<junk>",))
    teacher = ToyModel(teacher_vocabulary, 2)
    objective = OBJECTIVES["span_pg"]()
    everything = oracle.sequences(student.logp, student_vocabulary.stop_ids, 4)
    assert len(everything) > 50
    sampled = torch.zeros((), dtype=torch.float64)
    exact = torch.zeros((), dtype=torch.float64)
    for ids, logp in everything:
        text = aligned(pair, list(ids))
        batch = batch_of(pair, [text])
        sampled = sampled + logp.detach().exp() * objective(inputs_of(pair, [text], student, teacher)).total
        # Exact: each span's reverse KL given what came before it, which has no gradient.
        span_S, span_T, spans = batch.spans
        rows = torch.stack([student.logp(ids[:k])[ids[k]] for k in range(len(ids))])
        targets = [*text.teacher.ids.tolist(), teacher_vocabulary.stop_ids[0]]
        rows_T = torch.stack([teacher.logp(targets[:k])[targets[k]] for k in range(len(targets))])
        assert (span_S >= 0).all()
        for c in range(spans):
            inside, before, after = span_S == c, span_S < c, span_S > c
            span = rows[inside].sum()
            weight = rows[before].sum().detach().exp() * span.exp() * rows[after].sum().detach().exp()
            exact = exact + weight * (span - rows_T[span_T == c].sum().detach())
    leaves = list(student.rows.values())
    grads = torch.autograd.grad(sampled, leaves, allow_unused=True)
    grads_exact = torch.autograd.grad(exact, leaves, allow_unused=True)
    compared = 0
    for a, b in zip(grads, grads_exact, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            compared += 1
    assert compared > 10


def test_spans_end_where_the_teacher_cuts_whatever_comes_next():
    """After a space it does; after a letter it depends on the next one. What follows the last cut is open."""
    letters = toy_vocabulary([], cut=None)
    pair = VocabularyPair(letters, toy_vocabulary(["b+a"]))
    ids = letters.encode("ab a b").ids.tolist()
    ended, cut = (batch_of(pair, [aligned(pair, i)]) for i in ([*ids, letters.stop_ids[0]], ids))
    assert ended.spans[0].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert ended.spans[1].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert cut.spans[0].tolist() == [0, 0, 0, 1, 1, -1]
    assert (ended.spans[2], cut.spans[2]) == (3, 2)
    # A text that ends with a cut: the stop event is a span of its own.
    ids = letters.encode("a ").ids.tolist()
    assert batch_of(pair, [aligned(pair, [*ids, letters.stop_ids[0]])]).spans[0].tolist() == [0, 0, 1]


def test_an_objective_returns_what_it_says():
    loss = OBJECTIVES["reverse_kl"]()(
        inputs_of(PAIR, random_texts(PAIR, 3, 1), ToyModel(STUDENT, 3), ToyModel(TEACHER, 4))
    )
    assert isinstance(loss, Loss)
    assert set(loss.sequence_logp) == {"student_logp", "teacher_logp", "logp_bytes"}
    assert all(
        not part.requires_grad
        for part in (*loss.parts.values(), *loss.sequence_logp.values(), *loss.details.values())
    )


# Blocks: no matrix of all rows by all tokens is ever made.


@over(sorted(VARIANTS))
@pytest.mark.parametrize("block_rows", [1, 3])
def test_rows_are_projected_a_block_at_a_time_with_the_same_result(name, block_rows, monkeypatch):
    objective = VARIANTS[name]
    pair = pair_for(objective)
    texts = texts_for(objective, pair)
    inputs = inputs_of(pair, texts, ToyModel(STUDENT, 3), ToyModel(pair.teacher, 4))
    value, grad = gradient(objective, inputs)
    widest = max(inputs.student.width, inputs.teacher.width)
    monkeypatch.setattr("gold.kernels.logits.BLOCK_BYTES", 4 * widest * block_rows)
    seen: list[int] = []
    value_blocks, grad_blocks = gradient(objective, counted(inputs, seen))
    assert value_blocks == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(grad_blocks, grad)
    # The narrower side may take a row or two more than the wider one.
    assert max(seen) <= block_rows * widest // min(inputs.student.width, inputs.teacher.width)
