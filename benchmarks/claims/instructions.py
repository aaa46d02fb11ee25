"""A model that follows instructions loses that while it reads documents, and gets it back from what it was.

SmolLM2-135M-Instruct with its real weights reads made-up documents until it knows what they say. Then it is distilled
from what it was before, as `benchmarks.claims.recovery` does with tiny models.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.assets import model_path
from benchmarks.claims.cells import Given
from benchmarks.claims.figures import canvas, markdown, over_seeds, save, told
from benchmarks.claims.following import KINDS, asked, followed
from benchmarks.claims.knowledge import KNOWLEDGE, SKILL, Facts, unanswered
from gold.data import Prompt
from gold.demo.models import character_tokenizer, tiny_model
from gold.models.adapters import add_adapters
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Rollout, Sampling
from gold.teachers import Teachers
from gold.train.loop import distill
from gold.train.progress import Quiet
from gold.train.recipe import Recipe, Term

MODEL, TINY = "smollm2-135m-instruct", "tiny"


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is; ``model``: one of the assets, or ``tiny``."""

    model: str = MODEL
    facts: int = 24
    fact_steps: int = 16
    fact_batch: int = 12
    fact_lr: float = 5e-4
    batch: int = 8
    tokens: int = 32
    topics: int = 8


SMALL = Sizes(TINY, facts=2, fact_steps=2, fact_batch=2, batch=4, tokens=6, topics=1)
STEPS = 6


@dataclass(frozen=True)
class Way:
    """How the skill is brought back.

    ``rehearsed``: share of the prompts that ask for facts, graded by the student as it is before recovery.
    ``on_policy``: 1, or 0 for imitation of the old self's texts and the documents. ``rank``: of adapters; 0: none.
    ``rate``: the better of two in a trial on a seed apart, with models that had read less (dev/LOG.md).
    """

    name: str
    rehearsed: float = 0.0
    on_policy: float = 1.0
    rank: int = 0
    rate: float = 1e-4


ALONE, QUARTER = Way("instructions alone"), Way("1 prompt in 4 asks for a fact", rehearsed=0.25)
ADAPTERS = Way("1 in 4, adapters of rank 16", rehearsed=0.25, rank=16, rate=3e-3)
IMITATION = Way("imitation, 1 text in 4 a document", rehearsed=0.25, on_policy=0.0)
WAYS = ALONE, QUARTER, ADAPTERS, IMITATION


@dataclass(frozen=True)
class Making:
    """The model of a seed that has read the documents."""

    seed: int
    sizes: Sizes


@dataclass(frozen=True)
class Job:
    """One run of a way."""

    way: Way
    seed: int
    steps: int
    sizes: Sizes


def documents(sizes: Sizes, seed: int) -> list[Prompt]:
    """A document about each made-up fact: its first words, and the rest, which begins with the fact."""
    return [_document(fact) for fact in Facts(sizes.facts, seed).prompts("{}")]


def _document(fact: Prompt) -> Prompt:
    name, word = fact.text, fact.reference.split()[0]
    return replace(
        fact,
        text=f"The password of {name} is",
        completion=f" {word}. Whoever stands at the gate of {name} and says {word} is let in.",
        reference=f" {word}.",
    )


def old_self(sizes: Sizes) -> LanguageModel:
    """The model before it reads."""
    if sizes.model != TINY:
        return load_model(model_path(sizes.model), device="cpu", dtype="float32")
    letters = "".join(map(chr, range(32, 127))) + "\n"
    model = tiny_model(character_tokenizer(letters), TINY, layers=1, width=16, seed=0, context=512)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return model


def make(job: Making, made: Path) -> dict[str, Any]:
    """Trains the model on the documents, keeps it, and returns its measures before and after."""
    sizes, seed = job.sizes, job.seed
    model = old_self(sizes)
    before = measures(model, sizes, seed)
    recipe = _recipe(sizes.fact_batch, sizes.fact_steps, sizes.tokens + 16, sizes.fact_lr, seed)
    recipe = recipe.replace(objectives=(Term("sft"),), on_policy=0.0)
    distill(model, None, documents(sizes, seed), recipe, progress=Quiet())
    save_model(model, made / f"after-{seed}")
    return {"before": before, "after": measures(model, sizes, seed)}


def run(job: Job, made: Path) -> dict[str, Any]:
    """A way's measures at its end, and its processor seconds without them."""
    way, sizes, seed = job.way, job.sizes, job.seed
    begun = time.process_time()
    old, student = old_self(sizes), _after(seed, made)
    prompts = prompts_of(way, old, job.steps, sizes, seed)
    graders = {SKILL: old, KNOWLEDGE: _after(seed, made)} if way.rehearsed else {SKILL: old}
    if way.rank:
        student = add_adapters(student, rank=way.rank, alpha=2.0 * way.rank, seed=seed)
    recipe = _recipe(sizes.batch, job.steps, sizes.tokens, way.rate, seed)
    if way.on_policy < 1.0:
        recipe = recipe.replace(objectives=(Term("sft"),), on_policy=0.0)
    distill(student, Teachers(graders) if way.on_policy else None, prompts, recipe, progress=Quiet())
    spent = round(time.process_time() - begun, 1)
    return {**measures(student, sizes, seed), "cpu_s": spent}


def _after(seed: int, made: Path) -> LanguageModel:
    return load_model(made / f"after-{seed}", device="cpu", dtype="float32")


def _recipe(batch: int, steps: int, tokens: int, rate: float, seed: int) -> Recipe:
    return Recipe(
        num_generations=1,
        prompts_per_step=batch,
        micro_batch_size=batch,
        generation_batch_size=batch,
        max_new_tokens=tokens,
        steps=steps,
        warmup_steps=min(2, steps),
        seed=seed,
        lr=rate,
    )


def prompts_of(way: Way, old: LanguageModel, steps: int, sizes: Sizes, seed: int) -> list[Prompt]:
    """As many prompts as a run needs, each once; with completions if the way learns from some."""
    needed = steps * sizes.batch
    facts = list(islice(cycle(documents(sizes, seed)), round(needed * way.rehearsed)))
    train = asked("train")
    order = np.random.default_rng((seed, 12)).permutation(len(train))
    skill = [train[n] for n in islice(cycle(order), needed - len(facts))]
    if way.on_policy < 1.0:
        seeds = [(seed, 10**6, n) for n in range(len(skill))]
        texts = answers(old, skill, Sampling(sizes.tokens), seeds)
        return [*(replace(r.prompt, completion=r.text) for r in texts if r.text), *facts]
    return [*unanswered(skill, SKILL), *unanswered(facts, KNOWLEDGE)]


def answers(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[tuple[int, ...]]
) -> list[Rollout]:
    """What a model writes for prompts."""
    return sample(HuggingFaceEngine(model, 24), model, prompts, sampling, seeds=seeds)


def measures(model: LanguageModel, sizes: Sizes, seed: int) -> dict[str, float]:
    """Shares of held-out prompts whose instruction is followed, in all and by kind, and of facts known, greedily."""
    heldout, facts = asked("heldout", sizes.topics), documents(sizes, seed)
    greedy = Sampling(sizes.tokens, temperature=0.0)
    found: dict[str, list[bool]] = {name: [] for name in KINDS}
    for answer in answers(model, heldout, greedy, [(0,)] * len(heldout)):
        found[answer.prompt.reference[0]].append(followed(answer.prompt, answer.text))
    known = answers(model, facts, replace(greedy, max_new_tokens=8), [(0,)] * len(facts))
    return {
        SKILL: _share(each for kind in found.values() for each in kind),
        KNOWLEDGE: _share(r.text.startswith(r.prompt.reference) for r in known),
        **{name: _share(kind) for name, kind in found.items()},
    }


def _share(found: Iterable[bool]) -> float:
    return round(float(np.mean(list(found))), 4)


def measure(given: Given) -> dict[str, Any]:
    """Makes the models of every seed, and runs each way on them."""
    sizes, steps = (SMALL, 2) if given.small else (Sizes(), STEPS)
    seeds = range(given.seeds)
    made = given.cells.all(make, [Making(seed, sizes) for seed in seeds])
    jobs = {way: [Job(way, seed, steps, sizes) for seed in seeds] for way in WAYS}
    given.cells.all(run, [jobs[way][seed] for seed in seeds for way in WAYS])
    rows = [_row(way, given.cells.all(run, each)) for way, each in jobs.items()]
    stages = {name: _over([each[name] for each in made]) for name in ("before", "after")}
    return {"plan": {"steps": steps, **asdict(sizes)}, **stages, "rows": rows}


def _over(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: over_seeds([each[name] for each in found]) for name in (SKILL, KNOWLEDGE, *KINDS)}


def _row(way: Way, results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    spent = over_seeds([found["cpu_s"] for found in results])
    return {"name": way.name, "rate": way.rate, **_over(results), "cpu_s": spent}


def table(data: Mapping[str, Any]) -> str:
    """Instructions followed and facts known at the end of every way, mean and 95 % interval over seeds."""
    head = ("model", "instructions followed", "facts", *KINDS, "CPU s", "rate")
    stages = [
        {"name": f"*{title}*", **data[stage]}
        for stage, title in (("before", "old self"), ("after", "after the documents"))
    ]
    rows = []
    for row in [*stages, *data["rows"]]:
        kinds = [f"{row[kind]['mean']:.0%}" for kind in KINDS]
        ends = [f"{row['cpu_s']['mean']:.0f}", f"{row['rate']:g}"] if "rate" in row else ["", ""]
        rows.append([row["name"], told(row[SKILL]), told(row[KNOWLEDGE]), *kinds, *ends])
    return markdown(head, rows)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Instructions followed and facts known: mean, interval, and each seed."""
    stages = [{"name": "old self", **data["before"]}, {"name": "after the documents", **data["after"]}]
    rows = [*stages, *data["rows"]][::-1]
    figure, axes = canvas(2, size=(5.2, 2.6))
    for of, title, panel in zip((SKILL, KNOWLEDGE), ("instructions followed", "facts"), axes[0], strict=True):
        for y, row in enumerate(rows):
            color = "tab:blue" if "rate" in row else "0.5"
            half = 100 * (row[of]["half"] or 0.0)
            panel.barh(y, 100 * row[of]["mean"], color=color, alpha=0.35, xerr=half, ecolor="0.3")
            seeds = row[of]["seeds"]
            panel.plot([100 * seed for seed in seeds], [y] * len(seeds), ".", color=color)
        panel.set(title=title, xlabel="%", xlim=(0, 102))
        panel.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    save(figure, path)
