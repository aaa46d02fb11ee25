"""The contract that every objective is held to, clause by clause, over the whole table of objectives."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from gold.aligned import VocabularyPair
from gold.kernels import BACKENDS
from gold.kernels.linear import byte_tables
from gold.kernels.tables import common_events
from gold.losses import DIVERGENCES, OBJECTIVES, Loss, Objective, View, forward_kl, jsd, reverse_kl
from tests import oracle
from tests.contract.toys import (
    ToyModel,
    aligned,
    batch_of,
    random_texts,
    student_rows,
    teacher_rows,
    toy_vocabulary,
    view_of,
)

STUDENT = toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None)
TEACHER = toy_vocabulary(["a+a", "b+a", "ba+a"])
PAIR = VocabularyPair(STUDENT, TEACHER)
SAME = VocabularyPair(STUDENT, STUDENT)

# Every row of the table, with every option that changes what is computed.
VARIANTS: dict[str, Objective] = {
    **{f"{name}/bytes": OBJECTIVES[name](support="bytes") for name in DIVERGENCES},
    "jsd0.1/bytes": OBJECTIVES["jsd"](support="bytes", beta=0.1),
    **{
        f"{name}/shared/{rest}": OBJECTIVES[name](support="shared", rest=rest)
        for name in DIVERGENCES
        for rest in ("bucket", "renormalise")
    },
    "reverse_kl/bytes/one_to_one": OBJECTIVES["reverse_kl"](where="one_to_one", half_life=3.0),
    "forward_kl/shared/top_k": OBJECTIVES["forward_kl"](support="shared", top_k=2, top_k_of="student"),
    "reverse_kl/shared/top_k": OBJECTIVES["reverse_kl"](support="shared", top_k=2, rest="bucket"),
    "span_pg": OBJECTIVES["span_pg"](),
    "span_pg/options": OBJECTIVES["span_pg"](clip=2.0, noncanonical_penalty=0.0, importance_cap=2.0),
    "token_pg": OBJECTIVES["token_pg"](),
    "token_pg/span": OBJECTIVES["token_pg"](horizon="span"),
    "sft": OBJECTIVES["sft"](),
    "reward": OBJECTIVES["reward"](),
    "reference_kl": OBJECTIVES["reference_kl"](),
}
WITH_TEACHER = {name: o for name, o in VARIANTS.items() if o.needs != "nothing"}
DISTRIBUTIONS = {name: o for name, o in VARIANTS.items() if o.needs == "top_k"}

over = partial(pytest.mark.parametrize, "name")


def gradient(objective: Objective, view: View) -> tuple[float, Tensor]:
    """An objective's sum, and its gradient with respect to the student's logits."""
    logits = view.student.hidden_ND.detach().requires_grad_(True)
    value = objective(replace(view, student=replace(view.student, hidden_ND=logits))).total
    (grad,) = torch.autograd.grad(value, logits, allow_unused=True)
    return float(value.detach()), torch.zeros_like(logits) if grad is None else grad


def texts_for(objective: Objective, pair: VocabularyPair, count: int = 6, seed: int = 1):
    """Texts of the kind that the objective counts."""
    texts = random_texts(pair, count, seed)
    return [replace(t, sampled=objective.name != "sft") for t in texts]


def test_every_objective_of_the_table_is_under_contract():
    assert {v.name for v in VARIANTS.values()} == set(OBJECTIVES)


# 1. Equal models on the same ids give loss 0 and gradient 0, whatever the text.


@over(sorted(name for name, o in WITH_TEACHER.items() if "1" not in OBJECTIVES[o.name].exceptions))
def test_equal_models_give_nothing_to_learn(name):
    objective = WITH_TEACHER[name]
    texts = texts_for(objective, SAME, 8)
    model = ToyModel(STUDENT, 3, extra=2)
    value, grad = gradient(objective, view_of(SAME, texts, model, model))
    assert abs(value) < 1e-12
    assert grad.abs().max() < 1e-12


# 2. The same tokenizer on both sides reproduces the plain token-level objective.


@pytest.mark.parametrize("kind", sorted(DIVERGENCES))
@pytest.mark.parametrize("extra", [(0, 0), (3, 1)])
def test_one_vocabulary_is_the_plain_token_level_divergence(kind, extra):
    texts = random_texts(SAME, 6, 2)
    student, teacher = ToyModel(STUDENT, 3, extra=extra[0]), ToyModel(STUDENT, 4, extra=extra[1])
    value, _ = gradient(OBJECTIVES[kind](support="tokens"), view_of(SAME, texts, student, teacher))
    size = STUDENT.size
    rows = zip(student_rows(student, texts), teacher_rows(teacher, texts), strict=True)
    expected = 0.0
    for row, row_T in rows:
        # Padding rows, of which the two sides may have different numbers, are one event.
        p, q = torch.softmax(row, -1), torch.softmax(row_T, -1)
        if max(extra):
            p, q = (torch.cat((x[:size], x[size:].sum()[None])) for x in (p, q))
        m = 0.5 * (p + q)
        unsure = float(-(q * q.log()).sum()) > 0.8
        expected += float(
            {
                "reverse_kl": oracle.kl(p, q),
                "forward_kl": oracle.kl(q, p),
                "jsd": 0.5 * (oracle.kl(p, m) + oracle.kl(q, m)),
                "skew_kl": oracle.kl(q, 0.1 * q + 0.9 * p),
                "skew_reverse_kl": oracle.kl(p, 0.1 * p + 0.9 * q),
                "entropy_aware_kl": oracle.kl(p, q) + unsure * oracle.kl(q, p),
            }[kind]
        )
    assert value == pytest.approx(expected, rel=1e-12)


def test_bytes_sum_up_to_the_token_level_divergence_where_no_token_begins_another(monkeypatch):
    """Chain rule of KL: over the sampled token, the expected sum over its bytes is the divergence of the tokens."""
    monkeypatch.setattr("gold.kernels.tables.LEAK", 1e-15)
    vocabulary = toy_vocabulary(["a+b", "b+b"], letters="ab", cut=None)
    pair = VocabularyPair(vocabulary, vocabulary)
    student, teacher = ToyModel(vocabulary, 1), ToyModel(vocabulary, 2)
    # Only tokens that are no prefix of another: ab, bb, stop.
    allowed = [vocabulary._tokenizer.token_to_id(t) for t in ("ab", "bb", "<eos>")]
    logits, logits_T = (torch.full((2, vocabulary.size), -torch.inf, dtype=torch.float64) for _ in range(2))
    for model, target in ((student, logits), (teacher, logits_T)):
        target[:, allowed] = model.states([allowed[0]], 2)[:, allowed]
    p, q = torch.softmax(logits[0], -1), torch.softmax(logits_T[0], -1)
    expected = oracle.kl(p[allowed], q[allowed])
    objective = OBJECTIVES["reverse_kl"]()
    total = 0.0
    for v in allowed[:2]:
        text = aligned(pair, [v])
        value, _ = gradient(objective, view_of(pair, [text], logits[:1], logits_T[:1]))
        total += float(p[v]) * value
    stop = aligned(pair, [allowed[2]])
    value, _ = gradient(objective, view_of(pair, [stop], logits[:1], logits_T[:1]))
    total += float(p[allowed[2]]) * value
    assert total == pytest.approx(float(expected), rel=1e-9)


def test_span_pg_with_one_vocabulary_is_per_token_on_policy_distillation():
    texts = random_texts(SAME, 5, 3)
    student, teacher = ToyModel(STUDENT, 3), ToyModel(STUDENT, 4)
    value, grad = gradient(OBJECTIVES["span_pg"](), view_of(SAME, texts, student, teacher))
    logits = student_rows(student, texts).requires_grad_(True)
    targets = torch.tensor([int(i) for t in texts for i in t.ids])
    logp = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    logq = torch.log_softmax(teacher_rows(teacher, texts), -1).gather(1, targets[:, None])[:, 0]
    expected = -((logq - logp).detach() * logp).sum()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0])


# 3. The gradient depends on the teacher.


@over(sorted(WITH_TEACHER))
def test_another_teacher_gives_another_gradient(name):
    objective = WITH_TEACHER[name]
    texts = [aligned(PAIR, [*STUDENT.encode(t).ids.tolist(), STUDENT.stop_ids[0]]) for t in ("ab a", "b ab")]
    student = ToyModel(STUDENT, 3)
    grads = [gradient(objective, view_of(PAIR, texts, student, ToyModel(TEACHER, s)))[1] for s in (4, 5)]
    assert (grads[0] - grads[1]).abs().max() > 1e-3


# 4. Renaming the ids of either vocabulary changes nothing.


@over(sorted(VARIANTS))
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_names_of_ids_do_not_matter(name, backend):
    objective = VARIANTS[name]
    results = []
    for shuffle in (0, 5):
        student = toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None, shuffle=shuffle)
        teacher = toy_vocabulary(["a+a", "b+a", "ba+a"], shuffle=2 * shuffle)
        pair = VocabularyPair(student, teacher)
        texts = []
        for t in texts_for(objective, PAIR):
            renamed = [_renamed(int(i), STUDENT, student) for i in t.ids]
            texts.append(aligned(pair, renamed, sampled=t.sampled, advantage=t.advantage))
        view = view_of(pair, texts, ToyModel(student, 3), ToyModel(teacher, 4), backend)
        value, grad = gradient(objective, view)
        order = [_renamed(i, STUDENT, student) for i in range(STUDENT.size)]
        results.append((value, grad[:, order]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1])


def _renamed(index, old, new):
    return new._tokenizer.token_to_id(old._tokenizer.id_to_token(index))


# 5. Padded positions, padding rows of the output matrix, and the order in a batch are inert.


@over(sorted(VARIANTS))
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_batch_is_the_sum_of_its_texts_in_any_order(name, backend):
    objective = VARIANTS[name]
    texts = texts_for(objective, PAIR)
    student, teacher = ToyModel(STUDENT, 3), ToyModel(TEACHER, 4)
    whole = float(objective(view_of(PAIR, texts, student, teacher, backend)).total)
    turned = float(objective(view_of(PAIR, texts[::-1], student, teacher, backend)).total)
    single = sum(float(objective(view_of(PAIR, [t], student, teacher, backend)).total) for t in texts)
    counts = [objective.count(batch_of(PAIR, [t])) for t in texts]
    assert whole == pytest.approx(turned, rel=1e-12)
    assert whole == pytest.approx(single, rel=1e-12)
    assert objective.count(batch_of(PAIR, texts)) == sum(counts)


@over(sorted(VARIANTS))
def test_padding_rows_without_mass_are_inert(name):
    objective = VARIANTS[name]
    texts = texts_for(objective, PAIR)
    student, teacher = student_rows(ToyModel(STUDENT, 3), texts), teacher_rows(ToyModel(TEACHER, 4), texts)
    value, grad = gradient(objective, view_of(PAIR, texts, student, teacher))
    padded = [torch.nn.functional.pad(x, (0, n), value=-torch.inf) for x, n in ((student, 3), (teacher, 5))]
    value_padded, grad_padded = gradient(objective, view_of(PAIR, texts, *padded))
    assert value_padded == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(grad_padded[:, : STUDENT.size], grad)
    assert grad_padded[:, STUDENT.size :].abs().max() == 0


@over(sorted(VARIANTS))
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_special_ids_without_a_row_are_inert(name, backend):
    """The last ids of a vocabulary are special, and the output matrix does not have them."""
    objective = VARIANTS[name]
    student, teacher = (
        toy_vocabulary(m, cut=c, unused=2) for m, c in ((["a+b", "b+ ", "ab+b"], None), (["b+a"], " "))
    )
    pair = VocabularyPair(student, teacher)
    texts = texts_for(objective, pair)
    rows = student_rows(ToyModel(student, 3), texts), teacher_rows(ToyModel(teacher, 4), texts)
    masked = [x.clone() for x in rows]
    for x in masked:
        x[:, -2:] = -torch.inf
    expected, grad = gradient(objective, view_of(pair, texts, *masked, backend))
    value, grad_cut = gradient(objective, view_of(pair, texts, *(x[:, :-2] for x in rows), backend))
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(grad_cut, grad[:, :-2])


@over(sorted(VARIANTS))
def test_texts_that_are_empty_or_cut_short(name):
    objective = VARIANTS[name]
    a = STUDENT.encode("a").ids.tolist()
    for ids in ([STUDENT.stop_ids[0]], a, [*a, STUDENT.stop_ids[0]]):
        text = aligned(PAIR, ids, sampled=objective.name != "sft", advantage=1.0)
        value, grad = gradient(objective, view_of(PAIR, [text], ToyModel(STUDENT, 3), ToyModel(TEACHER, 4)))
        assert np.isfinite(value)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", sorted(DIVERGENCES))
def test_a_token_whose_beginning_is_no_token_costs_no_infinity(kind):
    """Inside such a token its side has no rest at all, while the other side can stop there."""
    long = toy_vocabulary(["b+c", "a+bc"], letters="abc", cut=None)
    letters = toy_vocabulary([], letters="abc", cut=None)
    for student, teacher in ((long, letters), (letters, long)):
        pair = VocabularyPair(student, teacher)
        text = aligned(pair, [*student.encode("abcabc").ids.tolist(), student.stop_ids[0]])
        value, grad = gradient(
            OBJECTIVES[kind](), view_of(pair, [text], ToyModel(student, 1), ToyModel(teacher, 2))
        )
        assert 0 < value < 100
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("pair", [PAIR, SAME], ids=["two vocabularies", "one"])
def test_policy_gradients_ignore_what_nobody_sampled(pair):
    texts = [replace(t, sampled=False) for t in random_texts(pair, 3, 1)]
    for name in ("span_pg", "reward"):
        teacher = ToyModel(pair.teacher, 4)
        value, grad = gradient(VARIANTS[name], view_of(pair, texts, ToyModel(STUDENT, 3), teacher))
        assert value == 0
        assert grad.abs().max() == 0
        assert VARIANTS[name].count(batch_of(pair, texts)) == 0


def test_the_end_of_a_text_that_was_cut_off_is_not_supervised():
    a = STUDENT.encode("ab").ids.tolist()
    cut, ended = (batch_of(PAIR, [aligned(PAIR, ids)]) for ids in (a, [*a, STUDENT.stop_ids[0]]))
    for name in ("reverse_kl/bytes", "reverse_kl/shared/bucket"):
        assert VARIANTS[name].count(ended) == VARIANTS[name].count(cut) + 1


# 6. Chunk sums conserve log-probability, tables are distributions, divergences are proper.


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_chunk_sums_conserve_log_probability(backend):
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    chunk = torch.randint(-1, 9, (50,), generator=generator)
    sums = BACKENDS[backend].chunk_sums(logp, chunk, 9)
    for c in range(9):
        assert sums[c].item() == pytest.approx(logp[chunk == c].sum().item())
    assert sums.sum().item() == pytest.approx(logp[chunk >= 0].sum().item())
    (grad,) = torch.autograd.grad((sums * torch.arange(9.0)).sum(), logp)
    torch.testing.assert_close(grad, torch.where(chunk >= 0, chunk, 0).double())


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_byte_tables_are_the_definition(backend):
    for seed in range(5):
        texts = random_texts(PAIR, 5, seed)
        batch = batch_of(PAIR, texts)
        for model, layout, vocabulary, side in (
            (ToyModel(STUDENT, 3, extra=2), batch.layout_S, STUDENT, "student"),
            (ToyModel(TEACHER, 4), batch.layout_T, TEACHER, "teacher"),
        ):
            rows_of = student_rows if side == "student" else teacher_rows
            view = view_of(PAIR, texts, rows_of(model, texts), rows_of(model, texts), backend)
            table, _, _ = byte_tables(view.student, layout, BACKENDS[backend])
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


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jsd, partial(jsd, beta=0.1)])
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


# 7. Gradients agree with finite differences; sampled estimators agree with enumeration.


@over([*sorted(DISTRIBUTIONS), "sft", "reward"])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_gradients_agree_with_finite_differences(name, backend):
    objective = VARIANTS[name]
    texts = texts_for(objective, PAIR, 3, seed=7)
    view = view_of(PAIR, texts, ToyModel(STUDENT, 3, extra=1), ToyModel(TEACHER, 4), backend)

    def value(logits: Tensor) -> Tensor:
        return objective(replace(view, student=replace(view.student, hidden_ND=logits))).total

    logits = view.student.hidden_ND.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(value, (logits,), atol=1e-7, rtol=1e-5)


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
        sampled = sampled + logp.detach().exp() * objective(view_of(pair, [text], student, teacher)).total
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


def test_numbers_at_the_edge_give_no_nan():
    """−inf rows, probability-1 rows and ties, on every objective."""
    for name, objective in VARIANTS.items():
        texts = texts_for(objective, PAIR, 4, seed=11)
        student, teacher = (
            rows.clone()
            for rows in (student_rows(ToyModel(STUDENT, 3), texts), teacher_rows(ToyModel(TEACHER, 4), texts))
        )
        junk = STUDENT._tokenizer.token_to_id("<junk>")
        student[0] = 0.0
        student[1] = -60.0
        student[1, int(texts[0].ids[0])] = 60.0
        teacher[0] = 0.0
        student[:, junk] = -torch.inf
        teacher[:, TEACHER._tokenizer.token_to_id("<junk>")] = -torch.inf
        value, grad = gradient(objective, view_of(PAIR, texts, student, teacher))
        assert np.isfinite(value), name
        assert torch.isfinite(grad).all(), name


def test_an_objective_returns_what_it_says():
    loss = OBJECTIVES["reverse_kl"]()(
        view_of(PAIR, random_texts(PAIR, 3, 1), ToyModel(STUDENT, 3), ToyModel(TEACHER, 4))
    )
    assert isinstance(loss, Loss)
    assert set(loss.sequence_logp) == {"student_logp", "teacher_logp"}
    assert all(not part.requires_grad for part in (*loss.parts.values(), *loss.sequence_logp.values()))


# Blocks: no matrix of all rows by all tokens is ever made.


@over(sorted(VARIANTS))
@pytest.mark.parametrize("block_rows", [1, 3])
def test_rows_are_projected_a_block_at_a_time_with_the_same_result(name, block_rows, monkeypatch):
    objective = VARIANTS[name]
    texts = texts_for(objective, PAIR)
    view = view_of(PAIR, texts, ToyModel(STUDENT, 3), ToyModel(TEACHER, 4))
    value, grad = gradient(objective, view)
    widest = max(view.student.width, view.teacher.width)
    monkeypatch.setattr("gold.kernels.linear.BLOCK_BYTES", 4 * widest * block_rows)
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[0])
        return hidden

    counted = {side: replace(getattr(view, side), head=head) for side in ("student", "teacher")}
    value_blocks, grad_blocks = gradient(objective, replace(view, **counted))
    assert value_blocks == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(grad_blocks, grad)
    # The narrower side may take a row or two more than the wider one.
    assert max(seen) <= block_rows * widest // min(view.student.width, view.teacher.width)
