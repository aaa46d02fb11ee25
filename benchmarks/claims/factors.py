"""Whether distillation or imitation is ahead, by what the teacher says after a mistake of the student.

The tasks, models and prompts are those of the parts `prompts` and `efficiency`. Their teachers have read right answers
alone; others here have learned further, half from answers and half from the rests of answers that begin wrong.
Imitation has twice the steps of distillation, about as much processor time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims import efficiency, prompts
from benchmarks.claims.cells import Given
from benchmarks.claims.curves import Curve, accuracy, answers, best, ends_by_rate, written
from benchmarks.claims.figures import canvas, markdown, over_seeds, save, told
from benchmarks.claims.gym import TASKS, asked
from benchmarks.claims.mistakes import VALUE, Rest, first_mistake, spoiled
from gold.demo.models import learn_answers
from gold.demo.run import TASK
from gold.models.load import load_model, save_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.train.recipe import Term

TUNING_SEED = 9
PROMPTS = 2000
TEXTS = 4
"""Texts that the teacher samples for each prompt."""

_DISTILLED, _IMITATED = efficiency.WAYS["opd"], efficiency.WAYS["sft"]
WAYS = {
    "distilled": _DISTILLED,
    "forward": replace(
        _DISTILLED,
        title="forward KL on its own texts",
        recipe=_DISTILLED.recipe.replace(objectives=(Term("forward_kl"),)),
    ),
    "imitated": _IMITATED,
}
"""Forward KL has distillation's rates."""


@dataclass(frozen=True)
class Kind:
    """A task; ``name`` is that of its models, which other parts make."""

    title: str
    task: Any
    max_new_tokens: int
    teacher: str
    start: str


KINDS = {
    "running": Kind("running sums", TASK, 20, "teacher", "student-start"),
    "worked": Kind("worked sums", TASKS["worked_sum"], 16, "worked_sum-teacher", "worked_sum-start"),
}


@dataclass(frozen=True)
class Setting:
    """A kind, what its teacher has seen after mistakes (None: no mistakes), and the ways that are run."""

    kind: str
    seen: Rest | None = None
    ways: tuple[str, ...] = ("distilled", "imitated")

    @property
    def title(self) -> str:
        """What the table calls it."""
        seen = {None: "", "right": ", has seen the right rest", "follows": ", has seen what follows"}
        return f"{KINDS[self.kind].title}{seen[self.seen]}"

    @property
    def teacher(self) -> str:
        """The folder of its teacher."""
        return f"{KINDS[self.kind].teacher}-{self.seen}" if self.seen else KINDS[self.kind].teacher


SETTINGS = {
    "running": Setting("running"),
    "running_follows": Setting("running", "follows"),
    "worked": Setting("worked", ways=tuple(WAYS)),
    "worked_seen": Setting("worked", "right", ("distilled",)),
    "worked_follows": Setting("worked", "follows", tuple(WAYS)),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything is spent; ``steps`` are those of distillation."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    rates: tuple[float, ...] = (1e-3, 3e-3)
    answers: tuple[int, int] = (20000, 5000)
    teacher_steps: tuple[int, int] = (1600, 1500)
    start_steps: tuple[int, int] = (900, 400)
    seen_steps: int = 800
    steps: int = 250
    looks: int = 5
    heldout: int = 256
    graded: int = 500


SMALL = Sizes(("worked", "worked_follows"), (1e-3,), (100, 100), (4, 4), (4, 4), 4, 2, 2, 16, 16)


@dataclass(frozen=True)
class Teacher:
    """A teacher that learns further from answers, and from rests of answers after mistakes."""

    setting: str
    answers: int
    steps: int
    heldout: int


@dataclass(frozen=True)
class Grades:
    """What a teacher says after the first mistake of the start's samples."""

    setting: str
    graded: int


@dataclass(frozen=True)
class Job:
    """One run."""

    setting: str
    way: str
    lr: float
    seed: int
    steps: int
    looks: int
    heldout: int


def teach(job: Teacher, made: Path) -> dict[str, Any]:
    """Makes a teacher that has seen mistakes; returns its accuracy."""
    setting, kind = SETTINGS[job.setting], KINDS[SETTINGS[job.setting].kind]
    model = load_model(made / kind.teacher)
    given = kind.task.prompts("train", job.answers, 0)
    lessons = [*given, *spoiled(given, 0, setting.seen or "right")]
    learn_answers(model, lessons, steps=job.steps, batch=64, lr=1e-3)
    save_model(model, made / setting.teacher)
    heldout = asked(kind.task.prompts("heldout", job.heldout, 0))
    return {"accuracy": accuracy(model, heldout, kind.task, kind.max_new_tokens)}


def grade(job: Grades, made: Path) -> dict[str, float]:
    """How many of the start's samples (temperature 1) are right; in how many the first wrong value is not the last,
    and of these the shares where the teacher's next value is right, or follows from the wrong one."""
    setting, kind = SETTINGS[job.setting], KINDS[SETTINGS[job.setting].kind]
    student, teacher = load_model(made / kind.start), load_model(made / setting.teacher)
    own = kind.task.prompts("train", job.graded, 100 + TUNING_SEED)
    right = {p.key: p.completion for p in own}
    seeds = [(TUNING_SEED, n) for n in range(len(own))]
    engine = HuggingFaceEngine(student, 256)
    texts = list(sample(engine, student, asked(own), Sampling(kind.max_new_tokens), seeds=seeds))
    found = [(t.prompt, first_mistake(t.text, right[t.prompt.key] or "")) for t in texts]
    mistakes = [(replace(p, text=f"{p.text}{m[0]}"), m[1:]) for p, m in found if m]
    rests = answers(teacher, [p for p, _ in mistakes], kind.max_new_tokens)
    said = [VALUE.match(rest) for rest in rests]
    pairs = [(value[0] if value else "", wanted) for value, (_, wanted) in zip(said, mistakes, strict=True)]
    return {
        "sampled": sum(kind.task.score(t.prompt, t.text) == 1.0 for t in texts if t.stopped) / len(texts),
        "mistakes": len(pairs),
        "right": mean(value == right for value, (right, _) in pairs) if pairs else 0.0,
        "follows": mean(value == follows for value, (_, follows) in pairs) if pairs else 0.0,
    }


def work(job: Job, made: Path) -> Mapping[str, Any]:
    """The curve of one run, and its accuracy on its own prompts in the end; a seed has its own prompts."""
    setting, kind, way = SETTINGS[job.setting], KINDS[SETTINGS[job.setting].kind], WAYS[job.way]
    student, teacher = load_model(made / kind.start), load_model(made / setting.teacher)
    own = asked(kind.task.prompts("train", PROMPTS, 100 + job.seed))
    taught, text_s = own, 0.0
    if way.has_texts:
        most = job.steps * efficiency.COMPLETIONS
        sampling = Sampling(kind.max_new_tokens)
        taught, text_s = written(teacher, own, sampling, job.seed, each=TEXTS, most=most)
    heldout = asked(kind.task.prompts("heldout", job.heldout, 0))
    every = max(1, job.steps // job.looks)
    curve = Curve(student, heldout, kind.task, kind.max_new_tokens, every, text_s)
    recipe = way.recipe.replace(max_new_tokens=kind.max_new_tokens, seed=job.seed, lr=job.lr, steps=job.steps)
    curve.run(teacher if way.has_teacher else None, taught, recipe, kind.task)
    known = accuracy(student, own[: job.heldout], kind.task, kind.max_new_tokens)
    return {"curve": curve.points, "own": round(known, 4)}


def measure(given: Given) -> dict[str, Any]:
    """Models, what the teachers say after mistakes, rates on a seed apart, then every setting."""
    sizes = SMALL if given.small else Sizes()
    kinds = {SETTINGS[name].kind: name for name in reversed(sizes.settings) if not SETTINGS[name].seen}
    made = _made(given, sizes, kinds)
    graded = given.cells.all(grade, [Grades(name, sizes.graded) for name in sizes.settings])
    tried = {kind: _tried(given, sizes, name) for kind, name in kinds.items()}
    rates = {kind: {way: best(ends) for way, ends in ways.items()} for kind, ways in tried.items()}
    jobs = [
        _job(
            name,
            way,
            rates[SETTINGS[name].kind]["imitated" if way == "imitated" else "distilled"],
            seed,
            sizes,
        )
        for seed in range(given.seeds)
        for name in sizes.settings
        for way in SETTINGS[name].ways
    ]
    found = list(zip(jobs, given.cells.all(work, jobs), strict=True))
    rows = [
        {
            "setting": name,
            "way": way,
            "lr": mine[0][0].lr,
            "steps": mine[0][0].steps,
            "cpu_s": [r["curve"][-1]["cpu_s"] for _, r in mine],
            "accuracy": [[p["accuracy"] for p in r["curve"]] for _, r in mine],
            "own": [r["own"] for _, r in mine],
        }
        for name in sizes.settings
        for way in SETTINGS[name].ways
        if (mine := [pair for pair in found if (pair[0].setting, pair[0].way) == (name, way)])
    ]
    grades = dict(zip(sizes.settings, graded, strict=True))
    return {"sizes": asdict(sizes), "made": made, "grades": grades, "tried": tried, "rows": rows}


def _made(given: Given, sizes: Sizes, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Makes the models of the settings; returns their accuracies."""
    found: dict[str, Any] = {}
    given_answers = dict(zip(KINDS, sizes.answers, strict=True))
    if "running" in kinds:
        running = prompts.Models(
            sizes.answers[0], sizes.teacher_steps[0], sizes.start_steps[0], 2 * sizes.heldout
        )
        found["running"] = given.cells.all(prompts.make, [running])[0]
    if "worked" in kinds:
        steps = sizes.teacher_steps[1], sizes.start_steps[1]
        worked = efficiency.Models("worked_sum", sizes.answers[1], sizes.heldout, *steps, 0.98, 0.25)
        found["worked"] = given.cells.all(efficiency.make, [worked])[0]
    teachers = [
        Teacher(name, given_answers[SETTINGS[name].kind], sizes.seen_steps, sizes.heldout)
        for name in sizes.settings
        if SETTINGS[name].seen
    ]
    return found | {j.setting: r for j, r in zip(teachers, given.cells.all(teach, teachers), strict=True)}


def _tried(given: Given, sizes: Sizes, name: str) -> dict[str, dict[str, float]]:
    """For distillation and imitation and each rate where a run of a setting ends, on a seed apart."""
    jobs = [
        _job(name, way, lr, TUNING_SEED, sizes) for way in ("distilled", "imitated") for lr in sizes.rates
    ]
    return ends_by_rate(jobs, given.cells.all(work, jobs))


def _job(name: str, way: str, lr: float, seed: int, sizes: Sizes) -> Job:
    steps = round(WAYS[way].length * sizes.steps)
    return Job(name, way, lr, seed, steps, sizes.looks, sizes.heldout)


def summed(data: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Where each way ends in a setting, over seeds, and how far distillation is ``ahead`` of imitation if both ran."""
    ends = {r["way"]: [c[-1] for c in r["accuracy"]] for r in data["rows"] if r["setting"] == name}
    if "imitated" in ends:
        pairs = zip(ends["distilled"], ends["imitated"], strict=True)
        ends["ahead"] = [mine - theirs for mine, theirs in pairs]
    return {way: over_seeds(values) for way, values in ends.items()}


def table(data: Mapping[str, Any]) -> str:
    """A setting a line: what its teacher says after a mistake, where each way ends, how far distillation is ahead."""
    head = (
        "task, its teacher",
        "after a mistake right",
        "follows",
        *(way.title for way in WAYS.values()),
        "distillation ahead by",
    )
    lines = []
    for name in data["sizes"]["settings"]:
        found = summed(data, name)
        lines.append(
            (
                SETTINGS[name].title,
                *(f"{data['grades'][name][kind]:.0%}" for kind in ("right", "follows")),
                *(told(found[way]) if way in found else "–" for way in (*WAYS, "ahead")),
            )
        )
    return markdown(head, lines)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """By how much distillation ends ahead of imitation, a setting a line."""
    figure, axes = canvas(1, 1, (6.4, 3.0))
    ax, names = axes[0][0], [n for n in reversed(data["sizes"]["settings"]) if "ahead" in summed(data, n)]
    found = [summed(data, name)["ahead"] for name in names]
    ax.errorbar(
        [100 * value["mean"] for value in found],
        range(len(names)),
        xerr=[100 * (value["half"] or 0.0) for value in found],
        fmt="o",
        ms=4,
        capsize=3,
    )
    ax.axvline(0, color="0.3", lw=1)
    ax.set_yticks(range(len(names)), [SETTINGS[name].title for name in names])
    ax.set(xlabel="distillation ahead of SFT at the end of runs, points")
    ax.grid(alpha=0.3)
    save(figure, path)
