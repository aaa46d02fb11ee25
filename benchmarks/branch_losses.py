"""Objectives on byte tables with branches, which no run of gold has: for the experiment `claims branches`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.branch_tables import Behind, BranchTable, SideTexts, branch_table, reading
from gold.align.batch import AlignedBatch, BatchSide
from gold.data import Prompt
from gold.kernels import chunk_sums
from gold.kernels.logits import LazyLogits
from gold.kernels.reference import finite_where_either_is
from gold.kernels.tables import common_events
from gold.losses import OBJECTIVES, Divergence, Loss, LossInputs, Row
from gold.losses.policy import Baseline, Credit, policy_loss, reward_to_go
from gold.losses.supports import byte_positions
from gold.losses.table import observed_tokens, supervised_bytes
from gold.losses.types import possible, student_target_logp
from gold.models.language_model import LanguageModel
from gold.teachers.local import LocalTeacher
from gold.tokenize.vocabulary import TokenizedText

Readers = Callable[[LossInputs], tuple[Behind, Behind]]
"""The student's and the teacher's states behind tokens off the path, for the texts of some inputs."""


class Remembering(LocalTeacher):
    """A teacher that knows the prompts of the texts that it scored last."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        self._last: list[tuple[TokenizedText, Prompt]] = []

    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """See ``Teacher.score``."""
        self._last = list(zip(tokenized_texts, prompts, strict=True))
        return super().score(prompts, tokenized_texts, stopped)

    def prompts_of(self, texts: Sequence[TokenizedText]) -> list[Prompt | None]:
        """The prompt of each text; None for one that it did not score last."""
        known = {id(text): prompt for text, prompt in self._last}
        return [known.get(id(text)) for text in texts]


@dataclass
class Branched:
    """The objectives of a pair of models with branches above ``least``; ``branches``: how many each step's student and
    teacher had."""

    student: LanguageModel
    teacher: Remembering
    least: float
    branches: list[tuple[int, int]] = field(default_factory=list)

    def readers(self, inputs: LossInputs) -> tuple[Behind, Behind]:
        """See ``Readers``. The text that warms kernels up has no prompt."""
        prompts = self.teacher.prompts_of([t.teacher for t in inputs.batch.texts])
        sides = (self.student, self.student.prompt_ids), (self.teacher.model, self.teacher.prompt_ids)
        student, teacher = (
            reading(model, [[model.pad_id] if p is None else ids_of(p) for p in prompts])
            for model, ids_of in sides
        )
        return student, teacher

    def add(self, name: str, divergence: Divergence) -> None:
        """Adds a divergence to the table of objectives."""

        def loss(inputs: LossInputs) -> Loss:
            return branched_divergence(inputs, divergence, self.readers, self.least, self.branches)

        OBJECTIVES[name] = Row(name, loss, needs="rows", unit="byte", count=supervised_bytes)

    def add_policy(self, name: str, clip: float) -> None:
        """Adds ``token_pg`` to the table of objectives."""

        def loss(inputs: LossInputs) -> Loss:
            return branched_token_pg(inputs, self.readers, self.least, clip, self.branches)

        OBJECTIVES[name] = Row(
            name, loss, needs="rows", unit="token", count=observed_tokens, on_policy=True, weighted=False
        )


def branched_divergence(
    inputs: LossInputs,
    divergence: Divergence,
    readers: Readers,
    least: float | None,
    count: list[tuple[int, int]] | None = None,
) -> Loss:
    """A divergence on bytes as ``gold.losses.supports.bytes_divergence`` compares them, of tables with branches; the
    gradient goes through the student's branches too."""
    return compared(inputs.batch, *_tables(inputs, readers, least, count), divergence)


def compared(batch: AlignedBatch, mine: BranchTable, theirs: BranchTable, divergence: Divergence) -> Loss:
    """A divergence of two tables on the events that both sides resolve, with all other mass as one more event."""
    at = byte_positions(batch)
    resolved = mine.resolved[at], theirs.resolved[at]
    logp = common_events(mine.logp[at], *resolved)
    logq = common_events(theirs.logp[at].to(logp), *resolved[::-1])
    logp, logq = finite_where_either_is(logp, logq)
    rest = {"unresolved_mass": mine.logp, "teacher_unresolved_mass": theirs.logp}
    parts = {name: table[at, -1].detach().exp().sum() for name, table in rest.items()}
    return Loss(divergence(logp, logq).sum(), parts)


def clipped_reverse_kl(logp: Tensor, logq: Tensor, clip: float) -> Tensor:
    """Reverse KL, [N, events] → [N], whose log-ratios are at most ``clip`` nats in size.

    An event beyond it still has a gradient, as if its reward were the clip: one that is rare and far from the teacher
    no longer makes most of a step.
    """
    nowhere = torch.isneginf(logp) & torch.isneginf(logq)
    ratio = torch.where(nowhere, 0.0, logp - logq)
    return (logp.exp() * ratio.clamp(-clip, clip)).sum(-1)


def branched_token_pg(
    inputs: LossInputs,
    readers: Readers,
    least: float | None,
    clip: float | None = None,
    count: list[tuple[int, int]] | None = None,
) -> Loss:
    """``token_pg`` whose rewards are log-ratios of the probabilities that both models give to the bytes of a token,
    over all ways to write the text that were followed, on both sides.

    With all of them, an advantage is ``log P(text) − log π(text)`` from its token on, both given the bytes before: the
    expected gradient is that of the KL divergence between the models' texts, and between models of one source every
    advantage is 0. No gradient goes through tables. ``clip`` and a baseline of the other texts as in ``policy_loss``.
    """
    batch = inputs.batch
    with torch.no_grad():
        tables = _tables(inputs, readers, least, count)
        position, row, event = batch.path
        mine, theirs = (possible(table.logp[position, event]) for table in tables)
        ratio = torch.where(batch.observed_path, theirs - mine, 0.0)
        gained = chunk_sums(ratio, row, len(inputs.student))
        covered = torch.where(batch.sampled_row_mask, batch.row_text, -1)
        reward = torch.where(batch.observed_rows & (covered >= 0), gained, 0.0)
        credit = Credit(reward_to_go(reward, covered), reward, covered)
    target = student_target_logp(inputs)
    baseline: Baseline = "others" if len(batch.texts) > 1 else "none"
    total = policy_loss(inputs, target, credit, "token_pg", clip, baseline, None, 0.0)
    return Loss(total, {"span_reverse_kl": -reward.sum()})


def _tables(
    inputs: LossInputs, readers: Readers, least: float | None, count: list[tuple[int, int]] | None
) -> tuple[BranchTable, BranchTable]:
    """Both sides' tables, the teacher's without gradient."""
    batch = inputs.batch
    behind_S, behind_T = readers(inputs)
    stopped = [t.stopped for t in batch.texts]

    def side(own: BatchSide, texts: list[TokenizedText]) -> SideTexts:
        return SideTexts(own.vocabulary, own.layout, texts, stopped)

    mine = partial(branch_table, side(batch.student, [t.student for t in batch.texts]))
    theirs = partial(branch_table, side(batch.teacher, [t.teacher for t in batch.texts]))
    with torch.no_grad():
        other = theirs(inputs.teacher_rows, behind_T, least)
    own = mine(inputs.student, behind_S, least)
    if count is not None:
        count.append((own.branches, other.branches))
    return own, other
