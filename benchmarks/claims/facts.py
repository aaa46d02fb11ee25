"""Which divergence moves a skill, and which moves facts: a teacher knows both, its student little of either.

The teacher's tokens are characters, the student's numbers and syllables; both are compared on bytes. Prompts ask for
sums and for some facts that the student lacks. Every objective has the same prompts and steps, with half of the
texts the teacher's; reverse and forward KL also on the student's own alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.cells import Given
from benchmarks.claims.figures import canvas, markdown, over_seeds, save, told
from benchmarks.claims.knowledge import (
    SKILL,
    Facts,
    Watching,
    answers_of,
    characters,
    learn_until,
    mean_curve,
    right,
    sums,
    unanswered,
    whole_numbers,
)
from gold.data import Prompt
from gold.demo.run import SAMPLING
from gold.losses import OBJECTIVES, DivergenceRow
from gold.models.load import load_model, save_model
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term

TUNING_SEED = 9
RATES = 1e-3, 2e-3
REVERSE, FORWARD = "reverse_kl", "forward_kl"
FORMS = " {} is", " tell {}"
KNOWN, ASKED, OTHERWISE, UNASKED = "known", "asked", "asked otherwise", "not asked"


def steeper_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Forward KL where the teacher has more mass, reverse KL where the student has: ``Σ_{q>p} (q log q/p + p − q) +
    Σ_{p>q} (p log p/q + q − p)``.

    It is the f-divergence ``Σ q f(p/q)`` with ``f(t) = t − 1 − log t`` below 1 and ``t log t − t + 1`` above. Both
    pieces are 0 with slope 0 at 1 and have there the curvature 1; ``f'' = max(1/t², 1/t)``, the larger of those of
    forward and reverse KL. So f is convex, and the divergence is at least either KL and at most their sum.
    """
    p, q = logp.exp(), logq.exp()
    more = q > p
    gap = torch.where((p == 0) & (q == 0), 0.0, logp - logq)
    forward = torch.where(more, q * -torch.where(more, gap, 0.0) + p - q, 0.0)
    reverse = torch.where(more, 0.0, p * torch.where(more | (p == 0), 0.0, gap) + q - p)
    return (forward + reverse).sum(-1)


@dataclass(frozen=True)
class Sizes:
    """How much of everything is spent."""

    facts: int = 180
    answers: int = 20000
    teacher_steps: int = 2400
    start_steps: int = 1500
    start_skill: float = 0.2
    prompts: int = 400
    steps: int = 100
    tuning_steps: int = 50
    batch: int = 48
    every: int = 25
    heldout: int = 200

    @property
    def parts(self) -> dict[str, slice]:
        """The third of the facts that the student knows, a sixth that prompts ask, and the rest."""
        third, sixth = self.facts // 3, self.facts // 6
        return {KNOWN: slice(third), ASKED: slice(third, third + sixth), UNASKED: slice(third + sixth, None)}


SMALL = Sizes(
    facts=12, answers=40, teacher_steps=4, start_steps=4, prompts=12, steps=2, batch=4, every=1, heldout=8
)


@dataclass(frozen=True)
class Way:
    """Objectives with their weights, the share of texts that the student writes, and the learning rates tried."""

    name: str
    terms: tuple[tuple[str, float], ...]
    on_policy: float = 1.0
    rate_of: str = ""
    """the objective whose rate it has; default: its own, the best of ``RATES`` on the tuning seed"""


_KINDS: dict[str, tuple[tuple[str, float], ...]] = {
    REVERSE: ((REVERSE, 1.0),),
    FORWARD: ((FORWARD, 1.0),),
    "jsd": (("jsd", 1.0),),
    "reverse_kl + forward_kl": ((REVERSE, 1.0), (FORWARD, 1.0)),
    "steeper of both": (("steeper_kl", 1.0),),
    "skew_reverse_kl": (("skew_reverse_kl", 1.0),),
}
WAYS = (
    *(Way(name, _KINDS[name]) for name in (REVERSE, FORWARD)),
    *(Way(name, terms, 0.5, FORWARD if name == FORWARD else REVERSE) for name, terms in _KINDS.items()),
    Way("sft", (("sft", 1.0),), 0.0),
)
SMALL_WAYS = (WAYS[0], WAYS[6], WAYS[-1])


@dataclass(frozen=True)
class Making:
    """The teacher, which all seeds share; or the student of a seed as it starts."""

    seed: int | None
    sizes: Sizes


@dataclass(frozen=True)
class Job:
    """One run of a way."""

    way: Way
    lr: float
    seed: int
    sizes: Sizes


def make(job: Making, made: Path) -> dict[str, Any]:
    """Trains the teacher or a student's start on answers, keeps it, and returns its measures."""
    sizes, seed = job.sizes, job.seed or 0
    if job.seed is None:
        model, name, steps, enough, known = (
            characters(seed),
            "teacher",
            sizes.teacher_steps,
            0.97,
            slice(None),
        )
    else:
        model, name, steps, enough = (
            whole_numbers(seed + 100),
            f"start-{seed}",
            sizes.start_steps,
            sizes.start_skill,
        )
        known = sizes.parts[KNOWN]
    asked = sums("train", sizes.answers, seed + 50)
    facts = [p for form in FORMS for p in Facts(sizes.facts, 0).prompts(form, known)]
    both = [*asked, *itertools.islice(itertools.cycle(facts), sizes.answers // 3)]
    every = 100 if job.seed is None else 25
    learn_until(model, both, sums("heldout", sizes.heldout, 0), enough, steps, seed, every)
    save_model(model, made / name)
    return measures(model, sizes)


def measures(model: Any, sizes: Sizes) -> dict[str, float]:
    """Shares of held-out sums, and of the facts of each part, that are right; asked ones in the other form too."""
    facts = Facts(sizes.facts, 0)
    parts = {
        SKILL: sums("heldout", sizes.heldout, 0),
        **{name: facts.prompts(FORMS[0], part) for name, part in sizes.parts.items()},
        OTHERWISE: facts.prompts(FORMS[1], sizes.parts[ASKED]),
    }
    return {name: round(right(model, prompts), 4) for name, prompts in parts.items()}


def prompts_of(sizes: Sizes, seed: int) -> list[Prompt]:
    """Prompts without answers, half of them sums, half questions for the facts to be learned."""
    asked = Facts(sizes.facts, 0).prompts(FORMS[0], sizes.parts[ASKED])
    return unanswered(
        [*sums("train", sizes.prompts, seed), *itertools.islice(itertools.cycle(asked), sizes.prompts)]
    )


def run(job: Job, made: Path) -> dict[str, Any]:
    """Measures over the steps of a way."""
    OBJECTIVES["steeper_kl"] = DivergenceRow("steeper_kl", steeper_kl)  # for this run alone
    try:
        return _run(job, made)
    finally:
        del OBJECTIVES["steeper_kl"]


def _run(job: Job, made: Path) -> dict[str, Any]:
    way, sizes, seed = job.way, job.sizes, job.seed
    student, teacher = load_model(made / f"start-{seed}"), load_model(made / "teacher")
    prompts = prompts_of(sizes, seed)
    if way.on_policy < 1.0:
        prompts = answers_of(teacher, prompts, seed)
    recipe = Recipe(
        tuple(Term(name, weight=weight) for name, weight in way.terms),
        num_generations=1,
        prompts_per_step=sizes.batch,
        micro_batch_size=sizes.batch,
        generation_batch_size=sizes.batch,
        max_new_tokens=SAMPLING.max_new_tokens,
        on_policy=way.on_policy,
        steps=sizes.steps,
        seed=seed,
        lr=job.lr,
    )
    watching = Watching(lambda: measures(student, sizes), sizes.every)
    needs_teacher = any(name != "sft" for name, _ in way.terms)
    distill(student, teacher if needs_teacher else None, prompts, recipe, progress=watching)
    return {"curve": watching.curve}


def measure(given: Given) -> dict[str, Any]:
    """Trains teacher and starts, chooses each objective's rate on a seed apart, and runs every way on the others.

    Reverse KL, forward KL and supervised training have their own rate, the others that of one of them.
    """
    sizes, ways = (SMALL, SMALL_WAYS) if given.small else (Sizes(), WAYS)
    seeds = range(given.seeds)
    teacher, _, *starts = given.cells.all(make, [Making(seed, sizes) for seed in (None, TUNING_SEED, *seeds)])
    own = {way.rate_of or way.name: way for way in reversed(ways)}
    rates = {name: RATES[0] if given.small else _best_rate(way, sizes, given) for name, way in own.items()}
    jobs = [Job(way, rates[way.rate_of or way.name], seed, sizes) for way in ways for seed in seeds]
    given.cells.all(run, jobs)
    rows = []
    for way in ways:
        mine = [job for job in jobs if job.way == way]
        curves = [result["curve"] for result in given.cells.all(run, mine)]
        found = {of: over_seeds([curve[-1][of] for curve in curves]) for of in starts[0]}
        row = {"name": way.name, "on_policy": way.on_policy, "rate": mine[0].lr, **found}
        rows.append(row | {"curve": mean_curve(curves)})
    start = {of: over_seeds([each[of] for each in starts]) for of in starts[0]}
    return {"sizes": asdict(sizes), "teacher": teacher, "start": start, "rows": rows}


def _best_rate(way: Way, sizes: Sizes, given: Given) -> float:
    shorter = replace(sizes, steps=sizes.tuning_steps, every=sizes.tuning_steps)
    found = given.cells.all(run, [Job(way, rate, TUNING_SEED, shorter) for rate in RATES])
    ends = [result["curve"][-1] for result in found]
    return max(zip(ends, RATES, strict=True), key=lambda each: each[0][SKILL] + each[0][ASKED])[1]


def table(data: Mapping[str, Any]) -> str:
    """Skill and facts at the end of every way, mean and 95 % interval over seeds."""
    columns = SKILL, ASKED, OTHERWISE, KNOWN, UNASKED
    lines = [["*teacher*", "", *(f"{data['teacher'][of]:.1%}" for of in columns), ""]]
    lines.append(["*start*", "", *(told(data["start"][of]) for of in columns), ""])
    lines += [
        [row["name"], f"{row['on_policy']:g}", *(told(row[of]) for of in columns), f"{row['rate']:g}"]
        for row in data["rows"]
    ]
    return markdown(
        (
            "objective",
            "λ",
            "skill",
            "facts asked",
            "the same, asked otherwise",
            "facts known before",
            "facts not asked",
            "rate",
        ),
        lines,
    )


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Skill against asked facts at the end, and both over steps where half of the texts are the teacher's."""
    figure, axes = canvas(3)
    ends, *panels = axes[0]
    markers = {1.0: "o", 0.5: "s", 0.0: "^"}
    names = list(dict.fromkeys(row["name"] for row in data["rows"]))
    for row in data["rows"]:
        color = f"C{names.index(row['name'])}"
        label = row["name"] if row["on_policy"] < 1.0 else None
        x, y = 100 * row[SKILL]["mean"], 100 * row[ASKED]["mean"]
        ends.plot([x], [y], markers[row["on_policy"]], color=color, label=label)
        if row["on_policy"] == 0.5:
            for of, panel in zip((SKILL, ASKED), panels, strict=True):
                curve = row["curve"]
                panel.plot([p["step"] for p in curve], [100 * p[of] for p in curve], color=color)
    ends.set(xlabel="skill, %", ylabel="facts asked, %", title="circle: λ 1, square: ½, triangle: 0")
    ends.legend(fontsize=6)
    for of, panel in zip((SKILL, ASKED), panels, strict=True):
        panel.set(xlabel="steps, λ ½", ylabel=f"{of}, %", ylim=(-2, 102))
    for panel in (ends, *panels):
        panel.grid(alpha=0.3)
    save(figure, path)
