"""A skill that was lost while facts were learned comes back from the old self, and the facts stay.

A model that has the skill is trained on facts until it has lost it. Then it is distilled from what it was before, in
several ways; each has the best of a few rates on a seed that is used for nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.cells import Given
from benchmarks.claims.figures import canvas, markdown, over_seeds, save, told
from benchmarks.claims.knowledge import (
    KNOWLEDGE,
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
from gold.demo.models import learn_answers
from gold.demo.run import SAMPLING
from gold.models.adapters import add_adapters
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.teachers import Teachers
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term

TUNING_SEED = 9


@dataclass(frozen=True)
class Sizes:
    """How much of everything is spent."""

    facts: int = 200
    answers: int = 20000
    old_steps: int = 1200
    other_steps: int = 1800
    enough: float = 0.97
    fact_steps: int = 250
    fact_lr: float = 3e-3
    prompts: int = 400
    steps: int = 100
    batch: int = 64
    every: int = 25
    heldout: int = 200


SMALL = Sizes(
    facts=12,
    answers=40,
    old_steps=4,
    other_steps=4,
    fact_steps=4,
    prompts=12,
    steps=2,
    batch=4,
    every=1,
    heldout=8,
)


@dataclass(frozen=True)
class Way:
    """How the skill is brought back, or kept.

    ``kind``: ``distil``; or ``mix``, supervised training of the old self on answers of the skill and the facts
    together; or ``average`` of the weights before and after the facts. ``rehearsed``: share of the prompts that ask
    for facts, graded by the student as it is before recovery. ``asked``: share of the facts that are asked at all.
    ``on_policy``: below 1, the rest are the old self's answers and the facts' own, also learned from as they are.
    ``rates``: learning rates that are tried; one alone was chosen before, in a trial on the tuning seed
    (dev/LOG.md). Of an average, the old self's shares.
    """

    name: str
    kind: str = "distil"
    teacher: str = "old"
    rehearsed: float = 0.0
    asked: float = 1.0
    on_policy: float = 1.0
    reference: float = 0.0
    rank: int = 0
    rates: tuple[float, ...] = (1e-3,)


ALONE, GENTLE = "skill prompts alone", "skill prompts alone, gentle"
HALF, QUARTER, ACROSS = (
    "1 prompt in 2 asks for a fact",
    "1 prompt in 4 asks for a fact",
    "1 in 2, another old model",
)
WAYS = (
    Way(ALONE, rates=(2e-3,)),
    Way(GENTLE, rates=(3e-4,)),
    Way("the same + 0.5 KL to the start", reference=0.5, rates=(3e-4,)),
    Way("skill prompts alone, adapters of rank 4", rank=4, rates=(3e-3, 1e-2)),
    Way("weights averaged, no training", kind="average", rates=(0.3, 0.4, 0.5, 0.6, 0.7)),
    Way(HALF, rehearsed=0.5),
    Way(QUARTER, rehearsed=0.25),
    Way("1 in 2, for a quarter of the facts", rehearsed=0.5, asked=0.25),
    Way(ACROSS, rehearsed=0.5, teacher="other"),
    Way("imitation: all texts given", rehearsed=0.5, on_policy=0.0, rates=(1e-3, 2e-3)),
    Way("never lost: facts and skill mixed", kind="mix", rates=(1e-3, 3e-3)),
)
SMALL_WAYS = (WAYS[3], WAYS[4], WAYS[8], WAYS[9], WAYS[10])
"""Ways that between them use everything."""
SHOWN = (ALONE, GENTLE, QUARTER, ACROSS, "imitation: all texts given")
"""Ways whose curves are drawn."""


@dataclass(frozen=True)
class Making:
    """The models of a seed: with the skill alone, and after the facts; or one model with another tokenizer."""

    seed: int
    sizes: Sizes
    other: bool = False


@dataclass(frozen=True)
class Job:
    """One run of a way."""

    way: Way
    rate: float
    seed: int
    sizes: Sizes


def make(job: Making, made: Path) -> dict[str, Any]:
    """Trains the models of a seed, keeps them, and returns their measures; those of learning the facts over steps."""
    sizes, seed = job.sizes, job.seed
    asked = sums("train", sizes.answers, seed)
    heldout = sums("heldout", sizes.heldout, seed)
    if job.other:
        other = characters(seed)
        learn_until(other, asked, heldout, sizes.enough, sizes.other_steps, seed)
        save_model(other, made / "other")
        return {"other": {SKILL: right(other, heldout)}}
    model = whole_numbers(seed + 100)
    learn_until(model, asked, heldout, sizes.enough, sizes.old_steps, seed)
    save_model(model, made / f"old-{seed}")
    measure = _measures(model, sizes, seed)
    curve = [{"step": 0, **measure()}]

    def watch(step: int) -> bool:
        curve.append({"step": step, **measure()})
        return False

    every = max(1, sizes.fact_steps // 10)
    facts = Facts(sizes.facts, seed).prompts()
    learn_answers(
        model,
        facts,
        steps=sizes.fact_steps,
        lr=sizes.fact_lr,
        batch=sizes.batch,
        seed=seed,
        every=every,
        watch=watch,
    )
    save_model(model, made / f"after-{seed}")
    return {"before": curve[0], "after": {"step": sizes.fact_steps, **measure()}, "curve": curve}


def run(job: Job, made: Path) -> dict[str, Any]:
    """A way's measures over its steps; the last are those of its end."""
    way, sizes, seed = job.way, job.sizes, job.seed
    old, after = (load_model(made / f"{name}-{seed}") for name in ("old", "after"))
    if way.kind == "average":
        return {"curve": [_measures(averaged(old, after, job.rate), sizes, seed)()]}
    if way.kind == "mix":
        return {"curve": _mixed(old, job)}
    student = add_adapters(after, rank=way.rank, alpha=2.0 * way.rank, seed=seed) if way.rank else after
    graders = {
        SKILL: old if way.teacher == "old" else load_model(made / way.teacher),
        KNOWLEDGE: load_model(made / f"after-{seed}"),
    }
    prompts = prompts_of(way, old, sizes, seed)
    graders = {name: model for name, model in graders.items() if any(p.route == name for p in prompts)}
    terms = [Term("reverse_kl")] if way.on_policy else []
    terms += [Term("sft")] if way.on_policy < 1.0 else []
    terms += [Term("reference_kl", weight=way.reference)] if way.reference else []
    recipe = Recipe(
        tuple(terms),
        num_generations=1,
        prompts_per_step=sizes.batch,
        micro_batch_size=sizes.batch,
        generation_batch_size=sizes.batch,
        max_new_tokens=SAMPLING.max_new_tokens,
        on_policy=way.on_policy,
        steps=sizes.steps,
        seed=seed,
        lr=job.rate,
    )
    watching = Watching(_measures(student, sizes, seed, way.asked), sizes.every)
    distill(student, Teachers(graders) if way.on_policy else None, prompts, recipe, progress=watching)
    return {"curve": watching.curve}


def prompts_of(way: Way, old: LanguageModel, sizes: Sizes, seed: int) -> list[Prompt]:
    """The prompts of a way, ``way.rehearsed`` of them questions for facts; with completions if it learns from some.

    Each question occurs as often as any other, prompts of the skill once.
    """
    skill = unanswered(sums("train", sizes.prompts, seed), SKILL)
    facts = Facts(sizes.facts, seed).prompts(known=slice(round(way.asked * sizes.facts)))
    if way.on_policy < 1.0:
        skill = answers_of(old, skill, seed)
        facts = [replace(p, route=KNOWLEDGE) for p in facts]
    else:
        facts = unanswered(facts, KNOWLEDGE)
    asked = round(sizes.prompts * way.rehearsed / (1.0 - way.rehearsed))
    return [*skill, *itertools.islice(itertools.cycle(facts), asked)]


def averaged(one: LanguageModel, other: LanguageModel, share: float) -> LanguageModel:
    """The second model with weights that are the mean of both, ``share`` of the first."""
    with torch.no_grad():
        for mine, theirs in zip(other.lm.parameters(), one.lm.parameters(), strict=True):
            mine.lerp_(theirs, share)
    return other


def _mixed(model: LanguageModel, job: Job) -> list[dict[str, float]]:
    """Measures over the steps of supervised training on facts and on answers of the skill, as many of each."""
    sizes, seed = job.sizes, job.seed
    measure = _measures(model, sizes, seed)
    curve = [{"step": 0, **measure()}]

    def watch(step: int) -> bool:
        curve.append({"step": step, **measure()})
        return False

    facts = Facts(sizes.facts, seed).prompts()
    skill = sums("train", sizes.prompts, seed)
    both = [*skill, *itertools.islice(itertools.cycle(facts), len(skill))]
    steps = 2 * sizes.fact_steps  # as many facts as without the skill
    learn_answers(
        model,
        both,
        steps=steps,
        lr=job.rate,
        batch=sizes.batch,
        seed=seed,
        every=steps // 10 or 1,
        watch=watch,
    )
    return curve


def _measures(
    model: LanguageModel, sizes: Sizes, seed: int, asked: float = 1.0
) -> Callable[[], dict[str, float]]:
    """Measures the model: shares of held-out sums and of all facts that are right, and of facts that are not asked."""
    heldout = sums("heldout", sizes.heldout, seed)
    facts = Facts(sizes.facts, seed)
    parts = {SKILL: heldout, KNOWLEDGE: facts.prompts()}
    if asked < 1.0:
        parts["not asked"] = facts.prompts(known=slice(round(asked * sizes.facts), None))
    return lambda: {name: round(right(model, prompts), 4) for name, prompts in parts.items()}


def measure(given: Given) -> dict[str, Any]:
    """Trains the models of every seed, chooses each way's rate on its own seed, and runs it on the others."""
    sizes, ways = (SMALL, SMALL_WAYS) if given.small else (Sizes(), WAYS)
    seeds = range(given.seeds)
    makings = [Making(seed, sizes) for seed in (*seeds, TUNING_SEED)]
    made = dict(zip((*seeds, TUNING_SEED), given.cells.all(make, makings), strict=True))
    other = given.cells.all(make, [Making(0, sizes, other=True)])[0]
    best = {way.name: way.rates[0] if given.small else _best_rate(way, sizes, given) for way in ways}
    jobs = {way.name: [Job(way, best[way.name], seed, sizes) for seed in seeds] for way in ways}
    given.cells.all(run, [job for each in jobs.values() for job in each])
    rows = [_row(name, each[0].rate, given.cells.all(run, each)) for name, each in jobs.items()]
    stages = {
        name: {of: over_seeds([made[seed][name][of] for seed in seeds]) for of in (SKILL, KNOWLEDGE)}
        for name in ("before", "after")
    }
    lost = mean_curve([made[seed]["curve"] for seed in seeds])
    return {"sizes": asdict(sizes), "other": other["other"], **stages, "losing": lost, "rows": rows}


def _best_rate(way: Way, sizes: Sizes, given: Given) -> float:
    """The rate with the best mean of skill and knowledge on the tuning seed."""
    if len(way.rates) == 1:
        return way.rates[0]
    found = given.cells.all(run, [Job(way, rate, TUNING_SEED, sizes) for rate in way.rates])
    ends = [result["curve"][-1] for result in found]
    return max(zip(ends, way.rates, strict=True), key=lambda each: each[0][SKILL] + each[0][KNOWLEDGE])[1]


def _row(name: str, rate: float, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ends = [result["curve"][-1] for result in results]
    found = {of: over_seeds([end[of] for end in ends]) for of in ends[0] if of != "step"}
    return {"name": name, "rate": rate, **found, "curve": mean_curve([r["curve"] for r in results])}


def table(data: Mapping[str, Any]) -> str:
    """Skill and knowledge at the end of every way, mean and 95 % interval over seeds."""
    head = ("model", "skill", "facts", "facts not asked", "rate")
    rows = [
        [f"*{title}*", told(data[stage][SKILL]), told(data[stage][KNOWLEDGE]), "", ""]
        for stage, title in (("before", "old self"), ("after", "after the facts"))
    ]
    for row in data["rows"]:
        unasked = told(row["not asked"]) if "not asked" in row else ""
        rows.append([row["name"], told(row[SKILL]), told(row[KNOWLEDGE]), unasked, f"{row['rate']:g}"])
    return markdown(head, rows)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Skill and facts over steps, first while facts are learned, then while the skill is brought back."""
    figure, axes = canvas(3)
    losing, *panels = axes[0]
    for of, color in ((SKILL, "tab:blue"), (KNOWLEDGE, "tab:orange")):
        losing.plot(
            [p["step"] for p in data["losing"]], [100 * p[of] for p in data["losing"]], color=color, label=of
        )
    losing.set(title="facts are learned", ylabel="right, %")
    rows = {row["name"]: row for row in data["rows"]}
    for of, panel in zip((SKILL, KNOWLEDGE), panels, strict=True):
        for name in SHOWN:
            if name in rows:
                curve = rows[name]["curve"]
                panel.plot(
                    [p["step"] for p in curve], [100 * p[of] for p in curve], marker="o", ms=3, label=name
                )
        panel.set(title=f"recovery: {of}")
    for panel in (losing, *panels):
        panel.set(xlabel="steps", ylim=(-2, 102))
        panel.grid(alpha=0.3)
    losing.legend(fontsize=7)
    panels[1].legend(fontsize=7)
    save(figure, path)
