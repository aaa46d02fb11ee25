"""Tables with branches beside those of evaluations and sums over every segmentation; the gradients of their
objectives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import oracle
from support import tiny_models as tiny
from torch import Tensor

from benchmarks.branch_losses import branched_divergence, branched_token_pg, clipped_reverse_kl
from benchmarks.branch_tables import Behind, SideTexts, branch_table, reading, table_of
from gold.exact.marginals import marginals
from gold.kernels.tables import byte_tables
from gold.losses import OBJECTIVES, LossInputs, reverse_kl
from tests.contract.source import pair_of
from tests.contract.toys import BranchStates, ToyModel, aligned, batch_of, inputs_of

ALL = 1e-12


def behind(model: ToyModel) -> Behind:
    return lambda text, ids: torch.stack([model.row(own) for own in ids])


def models(name: str, longest: int = 3) -> tuple[ToyModel, ToyModel]:
    pair = pair_of(name)
    student = ToyModel(pair.student, 1, longest=longest, requires_grad=True, never=("<junk>",))
    return student, ToyModel(pair.teacher, 2, never=("<junk>",))


def texts_of(student: ToyModel, longest: int = 3) -> list[tuple[tuple[int, ...], Tensor]]:
    return list(oracle.sequences(student.logp, student.vocabulary.stop_ids, longest + 1))


@pytest.mark.parametrize("name", ["overlapping", "byte fallback", "a space cut off"])
@pytest.mark.parametrize("least", [None, 0.1, ALL])
def test_a_batch_has_the_named_masses_of_each_text(name: str, least: float | None) -> None:
    pair, (student, teacher) = pair_of(name), models(name)
    drawn = texts_of(student)[::101]
    batch = batch_of(pair, [aligned(pair, list(ids)) for ids, _ in drawn])
    inputs = inputs_of(pair, batch.texts, student, teacher)
    stopped = [t.stopped for t in batch.texts]
    side = SideTexts(pair.teacher, batch.teacher.layout, [t.teacher for t in batch.texts], stopped)
    table = branch_table(side, inputs.teacher_rows, behind(teacher), least)
    if least is None:
        plain, _, _ = byte_tables(inputs.teacher_rows, batch.teacher.layout)
        torch.testing.assert_close(table.logp, plain)
    starts = batch.teacher.position_starts
    for number, text in enumerate(batch.texts):
        states = BranchStates(teacher.row, text.teacher.ids, text.teacher.ids.size + text.stopped)
        own = marginals(pair.teacher, pair.kernel_tries[1], text.teacher, text.stopped, states, least, 10**6)
        rest = np.logaddexp(own.local_rest, own.named[:, 257])
        whole = np.concatenate((own.named[:, :257], rest[:, None]), 1)
        share = np.exp(whole - np.logaddexp.reduce(whole, 1)[:, None])
        np.testing.assert_allclose(table_of([own]).logp.exp().numpy(), share, atol=1e-9)
        found = table.logp[starts[number] : starts[number + 1]].exp().detach().numpy()
        # A chain of ``marginals`` follows a few tokens more.
        np.testing.assert_allclose(found, share, atol=1e-9 if least != 0.1 else 0.05)


def true_logp(model: ToyModel) -> Callable[[bytes], Tensor]:
    """The log-probability that a model writes a text and stops, over all its token sequences."""
    spelled = [model.vocabulary.token_bytes(i) for i in range(model.vocabulary.size)]
    stop = model.vocabulary.stop_ids[0]

    def of(context: tuple[int, ...], left: bytes) -> Tensor:
        row = model.logp(context).exp()
        total = row.new_zeros(()) if left else row[stop]
        for v, own in enumerate(spelled):
            if own and left.startswith(own) and float(row[v].detach()) > 0:
                total = total + row[v] * of((*context, v), left[len(own) :])
        return total

    return lambda text: of((), text).log()


def gradient(total: Tensor, model: ToyModel) -> Tensor:
    leaves = list(model.rows.values())
    grads = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)])


@pytest.mark.parametrize("name", [pytest.param("other merges", marks=pytest.mark.slow), "overlapping"])
def test_the_expected_gradient_of_a_policy_on_exact_marginals_is_that_of_the_texts_divergence(
    name: str,
) -> None:
    pair, (student, teacher) = pair_of(name), models(name, 2)
    drawn = texts_of(student, 2)
    mine, theirs = true_logp(student), true_logp(teacher)
    seen: dict[bytes, Tensor] = {}
    exact, today, true = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for ids, logp in drawn:
        text = aligned(pair, list(ids))
        inputs = inputs_of(pair, [text], student, teacher)
        share = logp.detach().exp()
        exact = exact + share * branched_token_pg(inputs, readers(student, teacher), ALL).total
        today = today + share * OBJECTIVES["token_pg"]()(inputs).total
        data = text.student.data
        if data not in seen:
            seen[data] = mine(data)
            true = true + seen[data].exp() * (seen[data] - theirs(data).detach())
    wanted = gradient(true, student)
    torch.testing.assert_close(gradient(exact, student), wanted, rtol=1e-6, atol=1e-8)
    assert (gradient(today, student) - wanted).norm() > 0.05 * wanted.norm()


def readers(student: ToyModel, teacher: ToyModel) -> Callable[[LossInputs], tuple[Behind, Behind]]:
    return lambda inputs: (behind(student), behind(teacher))


def test_between_models_of_one_source_every_advantage_is_zero() -> None:
    """A student that writes letters and pairs, and a teacher of letters with the same distribution over texts."""
    pair = pair_of("merges and letters")
    student = ToyModel(pair.student, 1, longest=2, requires_grad=True, never=("<junk>",))
    mine = true_logp(student)
    texts = {aligned(pair, list(ids)).student.data for ids, _ in texts_of(student, 2)}
    probability = {text: float(mine(text).exp().detach()) for text in texts}
    letters = pair.teacher

    class Same(ToyModel):
        def row(self, context: tuple[int, ...]) -> Tensor:  # type: ignore[override]
            read = b"".join(letters.token_bytes(i) for i in context)
            row = torch.full((letters.size,), -60.0, dtype=torch.float64)
            whole = sum(p for x, p in probability.items() if x.startswith(read))
            for v in range(letters.size):
                more = letters.token_bytes(v)
                share = sum(p for x, p in probability.items() if more and x.startswith(read + more))
                if v in letters.stop_ids:
                    share = probability.get(read, 0.0)
                if share > 0 and whole > 0:
                    row[v] = np.log(share / whole)
            return row

    teacher, today = Same(letters, 2), []
    for ids, _ in texts_of(student, 2)[::5]:
        inputs = inputs_of(pair, [aligned(pair, list(ids))], student, teacher)
        found = branched_token_pg(inputs, readers(student, teacher), ALL)
        assert gradient(found.total, student).norm() < 1e-6
        today.append(float(gradient(OBJECTIVES["token_pg"]()(inputs).total, student).norm()))
    assert max(today) > 1e-2


def test_the_divergence_of_exact_tables_is_that_of_the_next_bytes_with_its_gradient() -> None:
    """At every byte of a text: sums over all segmentations, differentiated through them."""
    name = "other merges"
    pair, (student, teacher) = pair_of(name), models(name, 10**6)
    text = aligned(pair, [*pair.student.encode("ab").ids.tolist(), pair.student.stop_ids[0]])
    inputs = inputs_of(pair, [text], student, teacher)
    found = branched_divergence(inputs, reverse_kl, readers(student, teacher), ALL).total
    data, total = text.student.data, torch.zeros((), dtype=torch.float64)
    for e in range(len(data) + 1):
        p, q = (next_event(model, data[:e]) for model in (student, teacher))
        total = total + (p * (p / q).log()).sum()
    torch.testing.assert_close(found, total, rtol=1e-3, atol=1e-3)  # smoothed by 1e-5
    wanted = gradient(total, student)
    assert (gradient(found, student) - wanted).norm() < 2e-3 * wanted.norm()


def next_event(model: ToyModel, read: bytes) -> Tensor:
    """The distribution of the next byte, the stop last, over all token sequences."""
    vocabulary = model.vocabulary
    found: dict[int, list[Tensor]] = {}

    def grow(context: tuple[int, ...], weight: Tensor, left: bytes) -> None:
        row = model.logp(context).exp()
        for v in range(vocabulary.size):
            token = vocabulary.token_bytes(v)
            if v in vocabulary.stop_ids:
                if not left:
                    found.setdefault(256, []).append(weight * row[v])
            elif token and len(token) > len(left) and token.startswith(left):
                found.setdefault(token[len(left)], []).append(weight * row[v])
            elif token and left.startswith(token):
                grow((*context, v), weight * row[v], left[len(token) :])

    grow((), torch.ones((), dtype=torch.float64), read)
    whole = torch.stack([torch.stack(found[event]).sum() for event in sorted(found)])
    return whole / whole.sum()


def test_states_behind_tokens_of_several_texts_are_read_in_one_pass() -> None:
    model = tiny.tiny_student()
    prompts = [[3, 9, 4], [5]]
    text, ids = np.array([0, 1, 0, 0, 1]), [[7], [7, 8], [7, 9], [], [6, 8, 10]]
    found = reading(model, prompts)(text, ids)
    for t, own, row in zip(text.tolist(), ids, found, strict=True):
        whole = torch.tensor([[*prompts[t], *own]])
        torch.testing.assert_close(row, model.lm(whole).logits[0, -1], atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None for p in model.lm.parameters())


def test_clipped_ratios_are_reverse_kl_where_no_ratio_is_large_and_bound_the_rest() -> None:
    logp = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]]).log().requires_grad_(True)
    logq = torch.tensor([[0.4, 0.6, 0.0], [1.0 - 1e-9, 1e-9, 0.0]]).log()
    mild, steep = clipped_reverse_kl(logp, logq, 3.0)
    torch.testing.assert_close(mild, reverse_kl(logp[:1], logq[:1])[0])
    torch.testing.assert_close(steep, 0.9 * (logp[1, 0] - logq[1, 0]) + 0.1 * 3.0)
    (grad,) = torch.autograd.grad(steep, logp)
    torch.testing.assert_close(grad[1, 1], torch.tensor(0.3))  # its probability times the clip
    assert grad.isfinite().all()
