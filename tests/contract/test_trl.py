"""Against TRL, where it is installed: the same numbers where it is right, and the fault where it is not."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gold.losses import OBJECTIVES, LossInputs
from tests.contract.test_published import (
    PAIR,
    SAME,
    SEEDS,
    STUDENT,
    TEACHER,
    certain_inputs,
    slow_chunks,
    value_of,
)
from tests.contract.toys import ToyModel, inputs_of, random_texts, student_rows, teacher_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gold_trainer = pytest.importorskip("trl.experimental.gold.gold_trainer", exc_type=ImportError)
    gkd_trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer", exc_type=ImportError)


def trl_uld(inputs: LossInputs, student: Tensor, teacher: Tensor, strategy: str, **config: object) -> float:
    """What TRL's GOLD loss is on these rows, whole completions behind one prompt token, stop event included."""
    settings = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy=strategy,
        **config,
    )
    loss = gold_trainer.ULDLoss(settings)
    (text,) = inputs.batch.texts
    pair = inputs.batch.vocabularies
    if getattr(settings, "uld_use_hybrid_loss", False):
        ids_V, ids_W = (x.tolist() for x in pair.shared_ids)
        ids_V, ids_W = [*ids_V, pair.student.stop_ids[0]], [*ids_W, pair.teacher.stop_ids[0]]
        loss._vocab_mapping = dict(zip(ids_W, ids_V, strict=True))
        loss._teacher_matched_ids, loss._student_matched_ids = set(ids_W), set(ids_V)
        loss.mapping_tensor = torch.tensor([loss._vocab_mapping.get(w, -1) for w in range(max(ids_W) + 1)])
    sides = []
    for rows, side, vocabulary in (
        (student, text.student, pair.student),
        (teacher, text.teacher, pair.teacher),
    ):
        ids = [*side.ids.tolist(), vocabulary.stop_ids[0]]
        ends = [*side.ends.tolist(), len(side.data)]
        # Behind a prompt token; the position after the last token is what the late strategy reads.
        logits = torch.cat((rows, rows[-1:]))[None]
        labels = torch.tensor([[-100, *ids]])
        offsets = torch.tensor([[[0, 0], *([0, e] for e in ends)]])
        sides.append((logits, labels, torch.tensor([[0, *ids]]), offsets))
    (ls, labels_S, in_S, off_S), (lt, labels_T, in_T, off_T) = sides
    value = loss(
        ls, lt, labels_S, labels_T, in_S, in_T, student_byte_offsets=off_S, teacher_byte_offsets=off_T
    )
    return float(value) * len(slow_chunks(text))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("beta", "share"), [(0.5, None), (0.1, 0.3), (0.0, 0.6), (1.0, 0.6)])
def test_gold_is_trl_s_with_rows_that_predict_the_chunk(seed, beta, share):
    # TRL takes no probability for less than 1e-8; a long chunk has smaller ones.
    text = next(
        t
        for t in random_texts(PAIR, 40, seed)
        if t.stopped and 4 <= max(len(mine) + len(theirs) for mine, theirs in slow_chunks(t)) <= 7
    )
    student = student_rows(ToyModel(STUDENT, 3), [text])
    teacher = teacher_rows(ToyModel(TEACHER, 4), [text])
    inputs = inputs_of(PAIR, [text], student, teacher)
    weights = (None, None) if share is None else (share, 1 - share)
    theirs = trl_uld(
        inputs,
        student,
        teacher,
        "bayesian",
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=weights[0],
        uld_hybrid_unmatched_weight=weights[1],
        beta=beta,
    )
    mine = value_of(
        OBJECTIVES["gold"](beta=beta, **({} if share is None else {"matched_share": share})), inputs
    )
    assert mine == pytest.approx(theirs, rel=1e-9)


def test_trl_s_default_rows_are_late():
    inputs, *rows = certain_inputs()
    assert trl_uld(inputs, *rows, "bayesian") == pytest.approx(0.0, abs=1e-9)
    # One of the three chunks of the text has two tokens.
    assert trl_uld(inputs, *rows, "observed") == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_gkd_is_trl_s_generalised_jsd(beta):
    texts = random_texts(SAME, 6, 2)
    student, teacher = student_rows(ToyModel(STUDENT, 3), texts), teacher_rows(ToyModel(STUDENT, 4), texts)
    theirs = gkd_trainer.GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, reduction="sum"
    )
    mine = value_of(OBJECTIVES["gkd"](beta=beta), inputs_of(SAME, texts, student, teacher))
    assert mine == pytest.approx(float(theirs), rel=1e-9)
