"""ALM with debiasing, beside a program that goes along a text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.claims import pairs, ways
from benchmarks.claims.debiased import ROW, alm_debiased, bernoulli_kl
from benchmarks.claims.pair_models import keep, kept
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt
from gold.losses import OBJECTIVES
from gold.tokenize.vocabulary import Vocabulary
from tests.contract.toys import ToyModel, inputs_of, random_texts, toy_vocabulary

PAIR = VocabularyPair(
    toy_vocabulary(["a+b", " +a"], cut=None), toy_vocabulary(["b+a", "b+ "], cut=None, shuffle=3)
)


def word_ends(model: ToyModel, vocabulary: Vocabulary, context: tuple[int, ...]) -> float:
    """The log-probability that the next token begins with a space, or is special."""
    logp = model.logp(context)
    spelled = [vocabulary.token_bytes(i) for i in range(vocabulary.size)]
    return float(torch.logsumexp(logp[[not s or s.startswith(b" ") for s in spelled]], 0))


def along(text: AlignedText, models: tuple[ToyModel, ToyModel], threshold: float) -> float:
    """The loss of one text: chunks as they end, joined until the teacher's word may end."""
    sides = text.student, text.teacher
    value, read, total = 0.0, [0, 0], [0.0, 0.0]
    for end in sorted({*sides[0].ends.tolist()} & {*sides[1].ends.tolist()}):
        after = []
        for n, (side, model) in enumerate(zip(sides, models, strict=True)):
            ids = tuple(side.ids.tolist())
            while read[n] < len(ids) and side.ends[read[n]] <= end:
                total[n] += float(model.logp(ids[: read[n]])[ids[read[n]]])
                read[n] += 1
            after.append(word_ends(model, model.vocabulary, ids[: read[n]]))
        last = end == len(text.student.data) and not text.stopped
        if last:
            after = [0.0, 0.0]
        if last or math.exp(after[1]) > threshold:
            value += coin(*(t + a for t, a in zip(total, after, strict=True)))
            total = [0.0, 0.0]
    if text.stopped:
        stops = (
            float(model.logp(tuple(side.ids.tolist()))[model.vocabulary.stop_ids[0]])
            for side, model in zip(sides, models, strict=True)
        )
        value += coin(*(t + stop for t, stop in zip(total, stops, strict=True)))
    return value


def coin(logp: float, logq: float) -> float:
    """KL(teacher ‖ student) of two coins at temperature 100."""
    b, a = (math.exp(x / 100 - 1e-6) for x in (logp, logq))
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_debiased_chunks_are_those_of_a_walk_along_the_text(threshold: float) -> None:
    texts = random_texts(PAIR, 12, seed=4)
    models = ToyModel(PAIR.student, 1), ToyModel(PAIR.teacher, 2)
    inputs = inputs_of(PAIR, texts, *models)
    loss = alm_debiased(inputs, threshold=threshold)
    assert float(loss.total) == pytest.approx(sum(along(t, models, threshold) for t in texts), rel=1e-4)


def test_a_student_that_is_the_teacher_is_at_the_minimum() -> None:
    pair = VocabularyPair(PAIR.student, PAIR.student)
    texts = random_texts(pair, 6, seed=5)
    model = ToyModel(pair.student, 1, requires_grad=True)
    inputs = inputs_of(pair, texts, model, ToyModel(pair.student, 1))
    alm_debiased(inputs).total.backward()
    assert all(row.grad is None or row.grad.abs().max() < 1e-4 for row in model.rows.values())
    assert bernoulli_kl(torch.tensor([-1.0]), torch.tensor([-2.0]), 100.0) > 0.0


def test_every_way_is_one_that_gold_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, ROW.name, ROW)
    for way in ways.WAYS.values():
        recipe = pairs.recipe_of(way.terms, 4, 2, 0, 1e-3).replace(on_policy=way.own, top_p=way.top_p)
        assert [term.resolved().name for term in recipe.objectives] == [term.name for term in way.terms]
    texts = [Prompt("a 0", "1+1=", completion=" 2"), Prompt("a 1", "1+1=", completion=" 3")]
    keep(texts, tmp_path / "texts.json")
    assert kept(tmp_path / "texts.json") == texts
