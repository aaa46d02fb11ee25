"""Part of the signal: selected positions of a text, and a teacher that tells a few of its tokens.

The first pair of `benchmarks.claims.pairs` (longer student tokens), with the same steps, prompts and seeds.
Selected are the bytes of a step at which the student is least sure, or is farthest from its teacher. The sparse
teacher tells its likeliest tokens, and draws some of the others: what is drawn stands for all mass that is left, so
that its distribution is right on average, though not in any one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.claims.cells import Given
from benchmarks.claims.pair_models import (
    Model,
    Sizes,
    heldout,
    loaded,
    make,
    measures,
    train_prompts,
)
from benchmarks.claims.pairs import (
    PAIRS,
    TUNING_SEED,
    Start,
    begin,
    draw,
    quality,
    recipe_of,
    row,
    table,
)
from gold.data import Prompt
from gold.demo.run import CpuSeconds
from gold.kernels.logits import GivenLogits, LazyLogits, TopKLogits
from gold.losses.divergences import Share, reverse_kl
from gold.losses.table import OBJECTIVES, DivergenceRow
from gold.models.language_model import LanguageModel
from gold.teachers.local import LocalTeacher
from gold.tokenize.vocabulary import TokenizedText
from gold.train.loop import Saving, distill
from gold.train.recipe import Term

__all__ = ["draw", "measure", "table"]

PAIR = next(iter(PAIRS))
SELECTED = "selected_kl"
RATES, WATCHED = (2e-4, 1e-3), 96


def selected_kl(
    logp: Tensor, logq: Tensor, share: Share = 0.5, by: Literal["entropy", "divergence"] = "divergence"
) -> Tensor:
    """Reverse KL of the ``share`` of rows at which the student's entropy or this divergence is largest, 0 elsewhere.

    Divided by the share that was kept, so that its mean over all rows is that of the kept ones. Rows are those given
    together: with models this small all bytes of a step.

    Source: 2610.11659 keeps the tokens with most disagreement, 2604.14084 those with most entropy; here they are bytes.
    """
    value = reverse_kl(logp, logq)
    score = value.detach()
    if by == "entropy":
        p = logp.detach()
        score = -(p.exp() * p.clamp(min=-1e4)).sum(-1)
    kept = max(1, round(share * len(value)))
    chosen = torch.zeros_like(value).index_fill(0, score.topk(kept).indices, len(value) / kept)
    return value * chosen


class SparseTeacher(LocalTeacher):
    """A teacher that tells the ``told`` likeliest tokens of each row, and ``drawn`` of the others.

    With 0 drawn it is what a served teacher tells: the likeliest tokens and the mass of the rest. Else the others are
    drawn with replacement from what is left, and each draw stands for an equal part of the mass that is left.

    Source: 2610.04882.
    """

    def __init__(self, model: LanguageModel, told: int, drawn: int, seed: int) -> None:
        super().__init__(model)
        self.told, self.drawn = told, drawn
        self._random = torch.Generator().manual_seed(seed)

    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """See ``Teacher.score``."""
        return [self._told(rows) for rows in super().score(prompts, tokenized_texts, stopped)]

    @torch.no_grad()
    def _told(self, rows: LazyLogits) -> LazyLogits:
        size = self.vocabulary.size
        logp = torch.log_softmax(rows.logits()[:, :size].double(), dim=-1)
        values, ids = logp.topk(self.told, dim=-1)
        if not self.drawn:
            return TopKLogits(ids, values, size)
        left = logp.exp().scatter(1, ids, 0.0)
        mass = left.sum(-1, keepdim=True)
        # A row without anything left draws nothing of any weight.
        draws = torch.multinomial(left + 1e-300, self.drawn, replacement=True, generator=self._random)
        part = torch.zeros_like(left).scatter_add(1, draws, (mass / self.drawn).expand_as(draws))
        return GivenLogits(part.scatter(1, ids, values.exp()).log().float())


@dataclass(frozen=True)
class Way:
    """A term, and how much the teacher tells: its likeliest tokens and so many others; all of them if 0."""

    term: Term
    told: int = 0
    drawn: int = 0


def _selected(share: float, by: str) -> Way:
    return Way(Term(SELECTED, share=share, by=by))


_FORWARD = Term("forward_kl")
WAYS: Mapping[str, Way] = {
    "reverse KL, all bytes": Way(Term("reverse_kl")),
    "reverse KL, the 40% farthest from the teacher": _selected(0.4, "divergence"),
    "reverse KL, the 20% farthest from the teacher": _selected(0.2, "divergence"),
    "reverse KL, the 50% least sure": _selected(0.5, "entropy"),
    "reverse KL, the 20% least sure": _selected(0.2, "entropy"),
    "forward KL, all tokens told": Way(_FORWARD),
    "forward KL, 4 told": Way(_FORWARD, 4),
    "forward KL, 4 told, 4 drawn": Way(_FORWARD, 4, 4),
    "forward KL, 1 told": Way(_FORWARD, 1),
    "forward KL, 1 told, 1 drawn": Way(_FORWARD, 1, 1),
}


@dataclass(frozen=True)
class Run:
    """A cell: a way, a learning rate, a seed, so many steps of ``batch`` completions."""

    way: str
    lr: float
    seed: int
    steps: int
    batch: int
    sizes: Sizes


def measure(given: Given) -> dict[str, Any]:
    """What each way made of the pair's student."""
    sizes, steps, tuning, batch = Sizes(20_000, 1600, 900, 400, 384), 30, 10, 48
    ways, rates, seeds = list(WAYS), list(RATES), given.seeds
    if given.small:
        sizes, steps, tuning, batch = Sizes(200, 4, 4, 16, 16), 2, 1, 4
        ways, rates, seeds = [ways[1], ways[-1]], rates[1:], 1
    mine, theirs = PAIRS[PAIR]
    models = [Model(mine, "student", sizes), Model(theirs, "teacher", sizes)]
    sides = dict(zip(("student", "teacher"), given.cells.all(make, models), strict=True))
    (sides["start"],) = given.cells.all(begin, [Start(PAIR, sizes)])
    tried = [Run(way, lr, TUNING_SEED, tuning, batch, sizes) for way in ways for lr in rates]
    tuned = list(zip(tried, given.cells.all(run, tried), strict=True))
    best = {way: max((quality(found), job.lr) for job, found in tuned if job.way == way)[1] for way in ways}
    last = [Run(way, best[way], seed, steps, batch, sizes) for seed in range(seeds) for way in ways]
    done = list(zip(last, given.cells.all(run, last), strict=True))
    rows = [row(way, PAIR, best[way], [found for job, found in done if job.way == way]) for way in ways]
    plan = {"steps": steps, "batch": batch, "tuning_steps": tuning, "rates": rates, **asdict(sizes)}
    return {"plan": plan, "pairs": {PAIR: sides}, "rows": rows}


def run(job: Run, made: Path) -> dict[str, Any]:
    """Trains the student, and measures it on all held-out prompts against the whole teacher."""
    OBJECTIVES[SELECTED] = DivergenceRow(SELECTED, selected_kl)  # for this run alone
    try:
        return _run(job, made)
    finally:
        del OBJECTIVES[SELECTED]


def _run(job: Run, made: Path) -> dict[str, Any]:
    way = WAYS[job.way]
    student, teacher = (
        loaded(f"{role}-{name}", made) for role, name in zip(("student", "teacher"), PAIRS[PAIR], strict=True)
    )
    recipe = recipe_of((way.term,), job.batch, job.steps, job.seed, job.lr)
    clock = CpuSeconds()
    grader = SparseTeacher(teacher, way.told, way.drawn, job.seed) if way.told else teacher
    distill(student, grader, train_prompts(job.sizes), recipe, saving=Saving(), progress=clock)
    watched = WATCHED if job.seed == TUNING_SEED else None
    found = measures(student, teacher, heldout(job.sizes)[:watched])
    return {**found, "cpu_s": round(clock.spent[-1], 2)}
