"""How much of its teacher a student recovers on Countdown, where one tokenizer cuts numbers into digits.

The task is reasoning-gym's (`benchmarks.claims.countdown_task`), with tiny models made for it: like Qwen3 and Llama-3
the two sides differ in numbers alone, which are digits on one side and one token on the other. A question has several
right texts, and the teacher has learned from ones drawn at random. Every way begins with the same weak student; the
rate of each is the best of a few on a seed apart. With a CUDA device all models are on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims.cells import Given
from benchmarks.claims.countdown_task import TOKENIZERS, Countdown, texts_a_question, write_questions
from benchmarks.claims.curves import Curve, accuracy, best, ends_by_rate, written
from benchmarks.claims.figures import canvas, markdown, over_seeds, save, told
from benchmarks.claims.ways import TEACHERS_TEXTS
from gold.demo.models import learn_answers, tiny_model
from gold.models.load import load_model, save_model
from gold.models.pretrained import pick_device
from gold.rollout.types import Sampling
from gold.train.recipe import Recipe, Term

TUNING_SEED = 9
COMPLETIONS = 48
MAX_NEW_TOKENS = 24
"""More than any right text has, of whichever tokens."""
CLAIMED = 0.6, 0.1
"""Shares of the teacher that GOLD's authors tell of GOLD and of ULD."""
PAIRS = {
    "digits split by the teacher": ("numbers", "digits"),
    "digits split by the student": ("digits", "numbers"),
}
"""Tokenizers of student and teacher."""

_EACH = Recipe(
    num_generations=1,
    prompts_per_step=COMPLETIONS,
    micro_batch_size=COMPLETIONS,
    generation_batch_size=64,
    max_new_tokens=MAX_NEW_TOKENS,
)
_GROUPS = _EACH.replace(prompts_per_step=COMPLETIONS // 8, num_generations=8)
RATES = 3e-4, 1e-3, 3e-3, 1e-2
LOW_RATES = 1e-5, 3e-5, 1e-4, 3e-4
"""Those that are tried, the lower ones of ways that do harm at 1e-4 already."""


@dataclass(frozen=True)
class Way:
    """One way: its title, its recipe, the rates that are tried, and its steps for one of distillation."""

    title: str
    recipe: Recipe
    rates: tuple[float, ...] = RATES
    length: float = 1.0

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher grades."""
        return any(term.name not in ("sft", "reward") for term in self.recipe.objectives)


def _way(title: str, objective: str, rates: tuple[float, ...] = RATES) -> Way:
    return Way(title, _EACH.replace(objectives=(Term(objective),)), rates)


def _published(title: str, rates: tuple[float, ...]) -> Way:
    way = TEACHERS_TEXTS[title]
    return Way(title, _EACH.replace(objectives=way.terms, on_policy=way.own, top_p=way.top_p), rates)


WAYS = {
    "reverse": _way("reverse KL on bytes", "reverse_kl"),
    "forward": _way("forward KL on bytes", "forward_kl"),
    "gkd": Way(
        "GKD, λ = 0.5, forward KL on bytes",
        _EACH.replace(objectives=(Term("forward_kl"),), on_policy=0.5),
    ),
    "alm": _way("ALM", "alm", LOW_RATES),
    "gold": _way("GOLD", "gold", LOW_RATES),
    "uld": _way("ULD", "uld", LOW_RATES),
    "gold_published": _published("GOLD as published, λ 0.25", LOW_RATES),
    "uld_published": _published("ULD as published, λ 0", (1e-4, *RATES[:3])),
    "sft": Way(
        "SFT on the teacher's texts, about as much time",
        _EACH.replace(objectives=(Term("sft"),), on_policy=0.0),
        length=2.5,
    ),
    "reward": Way(
        "reward only (groups of 8)", _GROUPS.replace(objectives=(Term("reward"),)), (1e-4, 3e-4, 1e-3)
    ),
}


@dataclass(frozen=True)
class Sizes:
    """What the models are made of and with, and on how many held-out questions everything is measured."""

    drawn: int = 6000
    lessons: int = 100_000
    heldout: int = 256
    teacher_width: int = 96
    width: int = 64
    teacher_steps: int = 3000
    start_steps: int = 600
    teacher_accuracy: float = 0.9
    start_accuracy: float = 0.1


@dataclass(frozen=True)
class Plan:
    """What is run; ``steps`` are those of distillation."""

    sizes: Sizes = Sizes()
    pairs: tuple[str, ...] = tuple(PAIRS)[:1]
    ways: tuple[str, ...] = tuple(WAYS)
    prompts: int = 2000
    steps: int = 400
    tuning_steps: int = 100


SMALL = Plan(Sizes(60, 40, 4, 16, 16, 3, 3), tuple(PAIRS)[:1], ("reverse", "gold", "sft", "reward"), 16, 2, 1)


@dataclass(frozen=True)
class Asked:
    """A cell: the questions."""

    drawn: int


@dataclass(frozen=True)
class Made:
    """A cell: a teacher, or a student before distillation, with one of ``TOKENIZERS``."""

    role: str
    tokenizer: str
    sizes: Sizes


@dataclass(frozen=True)
class Run:
    """A cell: a way of training a pair's student."""

    pair: str
    way: str
    lr: float
    seed: int
    steps: int
    prompts: int
    sizes: Sizes


def ask(job: Asked, made: Path) -> dict[str, Any]:
    """Writes the questions; returns how many there are, and how many right texts one has."""
    path = made / QUESTIONS
    write_questions(path, job.drawn)
    task = Countdown(path)
    return {
        "train": task.count("train"),
        "heldout": task.count("heldout"),
        "right_texts": round(texts_a_question(path), 1),
    }


QUESTIONS = "questions.json"


def make(job: Made, made: Path) -> dict[str, Any]:
    """Trains a model on right texts until it is good enough, saves it, and returns its accuracy and sizes."""
    teacher, sizes = job.role == "teacher", job.sizes
    task = Countdown(made / QUESTIONS)
    layers, width, seed = (3, sizes.teacher_width, 0) if teacher else (2, sizes.width, 1)
    tokenizer = TOKENIZERS[job.tokenizer]()
    model = tiny_model(tokenizer, job.role, layers=layers, width=width, seed=seed, context=64)
    model.lm.to(pick_device("auto"))
    heldout = task.prompts("heldout", sizes.heldout, 0)
    enough = sizes.teacher_accuracy if teacher else sizes.start_accuracy

    def right() -> float:
        return accuracy(model, heldout, task, MAX_NEW_TOKENS)

    steps = learn_answers(
        model,
        task.lessons(sizes.lessons, seed),
        steps=sizes.teacher_steps if teacher else sizes.start_steps,
        lr=2e-3,
        batch=64,
        every=200 if teacher else 25,
        watch=lambda _: right() >= enough,
    )
    model.lm.eval()
    save_model(model, made / f"{job.role}-{job.tokenizer}")
    ids = model.vocabulary.encode("12+9=21").ids.tolist()
    return {
        "accuracy": round(right(), 4),
        "steps": steps,
        "tokens": model.vocabulary.size,
        "parameters": sum(p.numel() for p in model.lm.parameters()),
        "reads": "·".join(model.vocabulary.token_bytes(i).decode() for i in ids),
    }


def run(job: Run, made: Path) -> dict[str, Any]:
    """The curve of one run; a seed has its own prompts, their order and samples."""
    way, sizes = WAYS[job.way], job.sizes
    mine, theirs = PAIRS[job.pair]
    student, teacher = load_model(made / f"student-{mine}"), load_model(made / f"teacher-{theirs}")
    task = Countdown(made / QUESTIONS)
    prompts, text_s = task.prompts("train", job.prompts, 100 + job.seed), 0.0
    recipe = way.recipe.replace(steps=job.steps, seed=job.seed, lr=job.lr)
    if recipe.on_policy < 1.0:
        most = round(job.steps * COMPLETIONS * (1.0 - recipe.on_policy))
        prompts, text_s = written(
            teacher, prompts, Sampling(MAX_NEW_TOKENS), job.seed, each=TEXTS, most=max(most, len(prompts))
        )
    heldout = task.prompts("heldout", sizes.heldout, 0)
    looks = 1 if job.seed == TUNING_SEED else LOOKS
    curve = Curve(student, heldout, task, MAX_NEW_TOKENS, max(1, job.steps // looks), text_s)
    curve.run(teacher if way.has_teacher else None, prompts, recipe, task)
    return {"curve": curve.points}


LOOKS = 3
"""Looks at a student in a run, besides the one at its start; a run that chooses a rate is looked at when it ends."""
TEXTS = 4
"""Texts that the teacher samples for a prompt, at most, for the ways that learn from them."""


def measure(given: Given) -> dict[str, Any]:
    """Models of every pair, rates on a seed apart, then every way on every pair."""
    plan = SMALL if given.small else Plan()
    sizes = plan.sizes
    (asked,) = given.cells.all(ask, [Asked(sizes.drawn)])
    sides = {}
    for pair in plan.pairs:
        models = [Made(role, of, sizes) for role, of in zip(("student", "teacher"), PAIRS[pair], strict=True)]
        sides[pair] = dict(zip(("student", "teacher"), given.cells.all(make, models), strict=True))
    tried = {pair: _tried(given, plan, pair) for pair in plan.pairs}
    rates = {(pair, way): best(ends) for pair, ways in tried.items() for way, ends in ways.items()}
    jobs = [
        Run(pair, way, lr, seed, _steps(way, plan.steps), plan.prompts, sizes)
        for seed in range(given.seeds)
        for (pair, way), lr in rates.items()
    ]
    found = list(zip(jobs, given.cells.all(run, jobs), strict=True))
    rows = [
        {
            "pair": pair,
            "way": way,
            "lr": lr,
            "tried": tried[pair][way],
            "curves": [
                {name: [p[name] for p in result["curve"]] for name in ("step", "cpu_s", "accuracy")}
                for job, result in found
                if (job.pair, job.way) == (pair, way)
            ],
        }
        for (pair, way), lr in rates.items()
    ]
    return {"plan": asdict(plan), "questions": asked, "pairs": sides, "rows": rows}


def _steps(way: str, steps: int) -> int:
    return round(WAYS[way].length * steps)


def _tried(given: Given, plan: Plan, pair: str) -> dict[str, dict[str, float]]:
    """For each way and each rate where a shorter run ends, on a seed apart."""
    jobs = [
        Run(pair, way, lr, TUNING_SEED, _steps(way, plan.tuning_steps), plan.prompts, plan.sizes)
        for way in plan.ways
        for lr in WAYS[way].rates
    ]
    return ends_by_rate(jobs, given.cells.all(run, jobs))


def table(data: Mapping[str, Any]) -> str:
    """A table for each pair, best first: accuracy at the end, also as a share of the teacher's."""
    parts = []
    for pair, sides in data["pairs"].items():
        teacher, start = max(1e-9, sides["teacher"]["accuracy"]), sides["student"]["accuracy"]
        rows = [row for row in data["rows"] if row["pair"] == pair]
        rows.sort(key=lambda row: -sum(_ends(row)))
        lines = [["*teacher*", f"{teacher:.1%}", "100%", *[""] * 5]]
        for row in rows:
            ends = over_seeds(_ends(row))
            share = over_seeds([end / teacher for end in ends["seeds"]])
            met = [sum(s >= claimed for s in share["seeds"]) for claimed in CLAIMED]
            lines.append(
                [
                    WAYS[row["way"]].title,
                    told(ends),
                    told(share, ".0%"),
                    *(f"{n} of {len(ends['seeds'])}" for n in met),
                    f"{row['curves'][0]['step'][-1]:,}",
                    f"{sum(c['cpu_s'][-1] for c in row['curves']) / len(row['curves']):.0f}",
                    f"{row['lr']:g}",
                ]
            )
        lines.append(["*start*", f"{start:.1%}", f"{start / teacher:.0%}", *[""] * 5])
        title = f"{pair}: `{sides['student']['reads']}` ← `{sides['teacher']['reads']}`"
        reached = (f"seeds at {claimed:.0%}" for claimed in CLAIMED)
        head = (title, "right", "of the teacher", *reached, "steps", "CPU s", "rate")
        parts.append(markdown(head, lines))
    return "\n\n".join(parts)


def _ends(row: Mapping[str, Any]) -> list[float]:
    return [curve["accuracy"][-1] for curve in row["curves"]]


def draw(data: Mapping[str, Any], path: Path) -> None:
    """For each pair the share of the teacher that every way recovers over processor time, the mean over seeds."""
    figure, axes = canvas(len(data["pairs"]), size=(5.6, 4.0))
    for ax, (pair, sides) in zip(axes[0], data["pairs"].items(), strict=True):
        teacher = sides["teacher"]["accuracy"]
        for n, row in enumerate(r for r in data["rows"] if r["pair"] == pair):
            ends = over_seeds(_ends(row))
            ax.errorbar(
                [sum(c["cpu_s"][-1] for c in row["curves"]) / len(row["curves"])],
                [100 * ends["mean"] / teacher],
                yerr=[100 * (ends["half"] or 0.0) / teacher],
                fmt="os^D"[n // 10] if n < 40 else "o",
                color=f"C{n % 10}",
                label=WAYS[row["way"]].title,
                capsize=3,
            )
        for share in (1.0, *CLAIMED):
            ax.axhline(100 * share, color="0.4", ls="--", lw=1)
        ax.axhline(100 * sides["student"]["accuracy"] / teacher, color="0.7", ls=":", lw=1)
        ax.set(xlabel="processor seconds", ylim=(-3, 105), title=pair)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, % of the teacher's")
    axes[0][-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)
    save(figure, path)
