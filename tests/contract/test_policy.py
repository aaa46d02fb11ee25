"""Policy gradients against full enumeration, and what their options do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import oracle
from support.tokenizers import byte_level_bpe, sentencepiece_bpe
from torch import Tensor

from gold.align.texts import AlignedText, canonical_tokens
from gold.align.vocabularies import VocabularyPair
from gold.losses import OBJECTIVES
from gold.losses.policy import means_of_others, returns_of_texts, sampled_credit
from gold.tokenize.vocabulary import Vocabulary
from tests.contract.toys import (
    ToyModel,
    aligned,
    batch_of,
    inputs_of,
    random_texts,
    student_rows,
    teacher_rows,
    toy_vocabulary,
)

STUDENT = toy_vocabulary(["a+b"], letters="ab ", cut=None)
TEACHER = toy_vocabulary(["b+a"], letters="ab ")
PAIR = VocabularyPair(STUDENT, TEACHER)
SAME = VocabularyPair(STUDENT, STUDENT)


def log_prob_of_bytes(model: ToyModel, text: object) -> Tensor:
    """The teacher's log-probability of a text's bytes and its stop, along its byte table."""
    vocabulary = model.vocabulary
    table = oracle.byte_table(
        [vocabulary.token_bytes(i) or None for i in range(vocabulary.size)],
        vocabulary.stop_ids,
        teacher_rows(model, [text]),
        text.teacher.ids.tolist(),
        text.student.data,
        text.stopped,
    )
    events = [*text.student.data, oracle.STOP]
    return torch.log(table[torch.arange(len(events)), events]).sum()


def test_the_expected_gradient_of_token_pg_is_exact():
    """Over all sequences: the gradient of E[log π(ids) − log P(bytes)], P the teacher's probability of the bytes."""
    student = ToyModel(STUDENT, 1, longest=3, requires_grad=True, never=("<junk>",))
    teacher = ToyModel(TEACHER, 2)
    objective = OBJECTIVES["token_pg"]()
    sampled, exact = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for ids, logp in oracle.sequences(student.logp, STUDENT.stop_ids, 4):
        text = aligned(PAIR, list(ids))
        sampled = sampled + logp.detach().exp() * objective(inputs_of(PAIR, [text], student, teacher)).total
        exact = exact + logp.exp() * (logp - log_prob_of_bytes(teacher, text))
    leaves = list(student.rows.values())
    pairs = zip(
        torch.autograd.grad(sampled, leaves, allow_unused=True),
        torch.autograd.grad(exact, leaves, allow_unused=True),
        strict=True,
    )
    compared = [torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs if a is not None]
    assert len(compared) > 10


def test_the_expected_gradient_over_two_turns_is_exact_with_the_conversation_as_horizon():
    """Over all conversations of two turns, where the second depends on the text of the first: the gradient of E[log π −
    log P] summed over the turns. Without the return of the second turn the first lacks its share of it."""
    first = ToyModel(STUDENT, 1, longest=2, requires_grad=True, never=("<junk>",))
    second = [ToyModel(STUDENT, n, longest=2, requires_grad=True, never=("<junk>",)) for n in (3, 4)]
    teacher, later_teacher = ToyModel(TEACHER, 2), ToyModel(TEACHER, 5)
    turns = {
        n: [
            (aligned(PAIR, list(ids)), logp)
            for ids, logp in oracle.sequences(model.logp, STUDENT.stop_ids, 3)
        ]
        for n, model in enumerate((*second, first))
    }
    # Rows of a toy are made when they are asked for, here by the enumeration above.
    leaves = [leaf for model in (first, *second) for leaf in model.rows.values()]

    def expected(horizon: str, with_later: bool) -> list[Tensor]:
        objective, total = OBJECTIVES["token_pg"](horizon=horizon), torch.zeros((), dtype=torch.float64)
        replies: list[list[tuple[Tensor, Tensor, Tensor | None]]] = [[], []]
        for branch, model in enumerate(second):
            for reply, logp in turns[branch]:
                after = objective(inputs_of(PAIR, [reply], model, later_teacher)).total
                drawn = replace(reply, sampling_logprobs=logp_of(model, reply))
                later = returns_of_texts(inputs_of(PAIR, [drawn], model, later_teacher))
                replies[branch].append((logp, after, later if with_later else None))
        for text, logp in turns[2]:
            inputs = inputs_of(PAIR, [text], first, teacher)
            for reply_logp, after, later in replies[b"b" in text.student.data]:
                share = (logp + reply_logp).detach().exp()
                total = total + share * (objective(replace(inputs, later=later)).total + after)
        return list(torch.autograd.grad(total, leaves, allow_unused=True))

    exact = torch.zeros((), dtype=torch.float64)
    gaps = [
        [(logp, logp - log_prob_of_bytes(later_teacher, reply)) for reply, logp in turns[branch]]
        for branch in (0, 1)
    ]
    for text, logp in turns[2]:
        gap = logp - log_prob_of_bytes(teacher, text)
        for reply_logp, reply_gap in gaps[b"b" in text.student.data]:
            exact = exact + (logp + reply_logp).exp() * (gap + reply_gap)
    found = expected("conversation", with_later=True)
    wanted = torch.autograd.grad(exact, leaves, allow_unused=True)
    compared = [
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        for a, b in zip(found, wanted, strict=True)
        if a is not None
    ]
    assert len(compared) > 10
    alone = expected("text", with_later=False)
    assert max((a - b).abs().max() for a, b in zip(alone, wanted, strict=True) if a is not None) > 1e-3


def logp_of(model: ToyModel, text: AlignedText) -> np.ndarray:
    """The log-probability of each id of a text."""
    rows = torch.log_softmax(student_rows(model, [text]), -1).detach()
    return rows[torch.arange(len(text.ids)), torch.tensor(text.ids.tolist())].numpy()


def test_for_equal_models_the_expected_gradient_of_token_pg_is_zero():
    """Models of single letters: one segmentation for every text, so that ids and bytes are equally likely."""
    letters = toy_vocabulary([], letters="ab", cut=None)
    pair = VocabularyPair(letters, letters)
    student = ToyModel(letters, 1, longest=3, requires_grad=True, never=("<junk>",))
    teacher = ToyModel(letters, 1, longest=3, never=("<junk>",))
    objective = OBJECTIVES["token_pg"]()
    total = torch.zeros((), dtype=torch.float64)
    for ids, logp in oracle.sequences(student.logp, letters.stop_ids, 4):
        text = aligned(pair, list(ids))
        total = total + logp.detach().exp() * objective(inputs_of(pair, [text], student, teacher)).total
    grads = torch.autograd.grad(total, list(student.rows.values()), allow_unused=True)
    assert max(g.abs().max() for g in grads if g is not None) < 1e-12


def test_a_clipped_advantage_bounds_every_token():
    texts = random_texts(PAIR, 6, 1)
    student, teacher = ToyModel(STUDENT, 3), ToyModel(TEACHER, 4)
    rows = student_rows(student, texts).requires_grad_(True)
    for name in ("span_pg", "token_pg"):
        free, tight = (
            torch.autograd.grad(
                OBJECTIVES[name](clip=clip)(inputs_of(PAIR, texts, rows, teacher)).total, rows
            )[0]
            for clip in (None, 0.1)
        )
        # A token's gradient is its advantage times (onehot − softmax), whose entries are below 1.
        assert tight.abs().max() <= 0.1 < free.abs().max()


def test_the_baseline_is_the_mean_of_the_other_texts_at_the_same_token():
    texts = [aligned(SAME, [*STUDENT.encode(t).ids.tolist(), STUDENT.stop_ids[0]]) for t in ("a a", "b", "a")]
    student, teacher = ToyModel(STUDENT, 3), ToyModel(STUDENT, 4)
    rows, rows_T = student_rows(student, texts).requires_grad_(True), teacher_rows(teacher, texts)
    targets = torch.tensor([int(i) for t in texts for i in t.ids])
    logp = torch.log_softmax(rows, -1).gather(1, targets[:, None])[:, 0]
    logq = torch.log_softmax(rows_T, -1).gather(1, targets[:, None])[:, 0]
    gap = (logq - logp).detach()
    number = [k for t in texts for k in range(len(t.ids))]
    owner = [b for b, t in enumerate(texts) for _ in t.ids]
    advantage = []
    for i in range(len(number)):
        others = [gap[j] for j in range(len(number)) if number[j] == number[i] and owner[j] != owner[i]]
        advantage.append(gap[i] - (sum(others) / len(others) if others else 0.0))
    expected = -(torch.stack([torch.as_tensor(a) for a in advantage]) * logp).sum()
    found = OBJECTIVES["span_pg"](baseline="others")(inputs_of(SAME, texts, rows, teacher)).total
    torch.testing.assert_close(found, expected)


def test_importance_weights_are_ratios_up_to_the_cap():
    text = aligned(SAME, [*STUDENT.encode("a b").ids.tolist(), STUDENT.stop_ids[0]])
    student, teacher = ToyModel(STUDENT, 3), ToyModel(STUDENT, 4)
    rows = student_rows(student, [text]).requires_grad_(True)
    targets = torch.tensor(text.ids.tolist())
    logp = torch.log_softmax(rows, -1).gather(1, targets[:, None])[:, 0]
    logq = torch.log_softmax(teacher_rows(teacher, [text]), -1).gather(1, targets[:, None])[:, 0]
    drawn = (logp.detach() + torch.linspace(-1.0, 1.0, len(targets))).numpy().astype(np.float32)
    text = replace(text, sampling_logprobs=drawn)
    ratio = torch.exp(logp.detach() - torch.from_numpy(drawn).double()).clamp(max=1.5)
    assert (ratio == 1.5).any()
    assert (ratio < 1.0).any()
    expected = -(ratio * (logq - logp).detach() * logp).sum()
    found = OBJECTIVES["span_pg"](importance_cap=1.5)(inputs_of(SAME, [text], rows, teacher)).total
    torch.testing.assert_close(found, expected)
    lost = replace(text, sampling_logprobs=None)
    with pytest.raises(ValueError, match="log-probabilities that the ids were drawn with"):
        OBJECTIVES["span_pg"](importance_cap=1.5)(inputs_of(SAME, [lost], rows, teacher))


def test_a_weight_is_the_product_over_the_span():
    """One weight for all tokens of a span, and none for what lies before it."""
    text = aligned(PAIR, [*STUDENT.encode("ab a b").ids.tolist(), STUDENT.stop_ids[0]])
    student, teacher = ToyModel(STUDENT, 3), ToyModel(TEACHER, 4)
    rows = student_rows(student, [text]).requires_grad_(True)
    logp = torch.log_softmax(rows, -1).gather(1, torch.tensor(text.ids.tolist())[:, None])[:, 0]
    drawn = logp.detach() + torch.linspace(-0.3, 0.5, len(logp), dtype=torch.float64)
    text = replace(text, sampling_logprobs=drawn.numpy())
    span = batch_of(PAIR, [text]).spans[0]
    assert 1 < len(set(span.tolist())) < len(span)
    inputs = inputs_of(PAIR, [text], rows, teacher)
    plain, weighed = (
        torch.autograd.grad(OBJECTIVES["span_pg"](importance_cap=cap)(inputs).total, rows)[0]
        for cap in (None, 9.0)
    )
    for c in set(span.tolist()):
        ratio = torch.exp((logp.detach() - drawn)[span == c].sum())
        torch.testing.assert_close(weighed[span == c], ratio * plain[span == c])


def tempered(student: ToyModel, temperature: float, ids: tuple[int, ...]) -> np.ndarray:
    """The log-probability that each id is drawn with."""
    rows = (torch.log_softmax(student.row(ids[:k]).detach() / temperature, -1)[v] for k, v in enumerate(ids))
    return np.array([float(x) for x in rows])


@pytest.mark.parametrize(("name", "options"), [("span_pg", {}), ("token_pg", {}), ("reward", {})])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_expected_gradient_at_another_temperature_is_that_at_temperature_1(name, options, temperature):
    """By enumeration, with a cap that is never reached; the teacher cuts nowhere, so that a text is one span."""
    pair = VocabularyPair(STUDENT, toy_vocabulary(["b+a"], letters="ab ", cut=None))
    student = ToyModel(STUDENT, 1, longest=2, requires_grad=True, never=("<junk>",))
    teacher = ToyModel(pair.teacher, 2)
    totals = []
    for drawn_at, cap in ((1.0, None), (temperature, 1e9)):
        total = torch.zeros((), dtype=torch.float64)
        for number, (ids, _) in enumerate(oracle.sequences(student.logp, STUDENT.stop_ids, 3)):
            drawn = tempered(student, drawn_at, ids)
            text = aligned(pair, list(ids), sampling_logprobs=drawn, advantage=float(number % 3) - 1.0)
            objective = OBJECTIVES[name](importance_cap=cap, **options)
            total = total + np.exp(drawn.sum()) * objective(inputs_of(pair, [text], student, teacher)).total
        grads = torch.autograd.grad(total, list(student.rows.values()), allow_unused=True)
        totals.append(torch.cat([g for g in grads if g is not None]))
    assert totals[0].norm() > 0.1
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["span_pg", "token_pg"])
def test_the_baseline_of_a_step_changes_no_expected_gradient(name):
    """By enumeration of all steps of three texts, whatever microbatches they are in."""
    pair = VocabularyPair(STUDENT, toy_vocabulary(["b+a"], letters="ab ", cut=None))
    student = ToyModel(STUDENT, 1, longest=1, requires_grad=True, never=("<junk>",))
    teacher = ToyModel(pair.teacher, 2)
    drawn = list(oracle.sequences(student.logp, STUDENT.stop_ids, 2))
    texts = [aligned(pair, list(ids), sampling_logprobs=tempered(student, 1.0, ids)) for ids, _ in drawn]
    probability = [float(logp.detach().exp()) for _, logp in drawn]
    inputs_list = [inputs_of(pair, [text], student, teacher) for text in texts]
    leaves = list(student.rows.values())

    def gradient(total: Tensor) -> Tensor:
        grads = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        return torch.cat(
            [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
        )

    plain = sum(
        p * gradient(OBJECTIVES[name]()(inputs).total)
        for p, inputs in zip(probability, inputs_list, strict=True)
    )
    objective = OBJECTIVES[name](baseline="others")
    credits = [sampled_credit(inputs, name, objective.options) for inputs in inputs_list]
    expected = torch.zeros_like(plain)
    for step in itertools.product(range(len(texts)), repeat=3):
        # The loss is linear in the advantages: of a step the first text's share is enough, the three are alike.
        numbers = [inputs_list[i].batch.row_number for i in step]
        mean, *_ = means_of_others([credits[i] for i in step], numbers, 4, lambda sums: sums)
        weight = np.prod([probability[i] for i in step])
        inputs = replace(inputs_list[step[0]], baselines={name: mean})
        expected = expected + weight * gradient(objective(inputs).total)
    torch.testing.assert_close(expected, plain, rtol=1e-9, atol=1e-9)
    assert float(mean.abs().max()) > 0.01


def test_a_canonical_text_is_one_wherever_it_begins_and_ends():
    """Behind a prompt no space is put before a text; a character that the length limit has cut off is not judged."""
    spaced = Vocabulary.load(sentencepiece_bpe(prefix="prepend"), stop_ids=[1])
    for text, at_start in (("lo world", False), (" is it", False), ("Yes, it", True)):
        tokenized = spaced.decode(spaced.encode(text, at_start=at_start).ids, at_start=at_start)
        assert canonical_tokens(spaced, tokenized, at_start).all()
        row = AlignedText(tokenized.ids, tokenized, tokenized, False, at_start=at_start)
        assert batch_of(VocabularyPair(spaced, spaced), [row]).canonical_rows.all()
    assert not canonical_tokens(
        spaced, spaced.decode(spaced.encode("lo world", at_start=False).ids), True
    ).all()
    bytewise = Vocabulary.load(byte_level_bpe(), stop_ids=[1])
    ids = bytewise.encode("ok \U00050000").ids
    for kept in range(1, len(ids) + 1):
        assert canonical_tokens(bytewise, bytewise.decode(ids[:kept]), True).all()


def test_only_tokens_that_the_tokenizer_would_not_give_pay_the_penalty():
    a, b = (STUDENT.tokenizer.token_to_id(t) for t in "ab")
    own, other = STUDENT.encode("ab").ids.tolist(), [a, b]
    assert own != other
    assert batch_of(SAME, [aligned(SAME, [*own, 0]), aligned(SAME, other)]).canonical_rows.tolist() == [
        True,
        True,
        False,
        False,
    ]
    teacher = ToyModel(STUDENT, 4)
    for ids, changes in ((own, False), (other, True)):
        text = aligned(SAME, ids)
        rows = student_rows(ToyModel(STUDENT, 3), [text]).requires_grad_(True)
        without, beside = (
            OBJECTIVES["span_pg"](noncanonical_penalty=p)(inputs_of(SAME, [text], rows, teacher)).total
            for p in (0.0, 2.0)
        )
        logp = torch.log_softmax(rows, -1).gather(1, torch.tensor(ids)[:, None]).sum()
        torch.testing.assert_close(beside - without, 2.0 * logp if changes else torch.zeros_like(logp))
