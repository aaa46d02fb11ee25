"""`python -m benchmarks bits FILE`: whether the code still computes what it computed when FILE was written.

A run of every objective on tiny models (each metric and a hash of the trained weights), evaluations, a teacher cache
and alignments of odd texts. Where FILE is not there, it is written; where it is, every value that differs is printed,
and the exit status is 1 if there are any. Metrics are held by name where both have the name, the others by value, so
that one may get another name. For changes that should change nothing, on one machine: processors round differently.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.objectives import WAYS
from benchmarks.texts import odd_text
from gold.cli import app
from gold.data import Prompt
from gold.demo.models import character_tokenizer, learn_answers, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.evaluate import EvaluationPlan
from gold.models.language_model import LanguageModel
from gold.models.load import save_model
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term

TASK = RunningSums(shortest=2, longest=4)
CLOCKED = ("_s", "_per_s")
"""How names of metrics end that depend on the clock."""
OWN_VOCABULARY = ("reverse_kl", "forward_kl", "jsd", "skew_kl", "entropy_aware_kl", "gkd", "opd", "span_pg")


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks bits", description=__doc__)
    parser.add_argument("file", type=Path, help="what is written, or held against")
    parser.add_argument(
        "--texts", type=int, default=300, help="texts of each pair of tokenizers (%(default)s)"
    )
    parser.add_argument("--only", help="runs whose names hold this, and nothing else")
    given = parser.parse_args(list(arguments))
    torch.set_num_threads(1)
    found = dict(measured(given.texts, given.only))
    if not given.file.exists():
        given.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} results written to {given.file}")
        return 0
    before = json.loads(given.file.read_text(encoding="utf-8"))
    if given.only:
        before = {name: value for name, value in before.items() if given.only in name}
    lines = differences(before, json.loads(json.dumps(found)))
    print("\n".join(lines) or f"{len(found)} results, every bit as before")
    return 1 if lines else 0


def measured(texts: int, only: str | None = None) -> Iterator[tuple[str, Any]]:
    """What is computed, by name."""
    student, teacher, twin = _student(), _taught(), _student(seed=4)
    jobs = [(f"train {name}", way.terms, way.on_policy, teacher) for name, way in WAYS.items()]
    jobs += [(f"train {name}, one vocabulary", (Term(name),), 1.0, twin) for name in OWN_VOCABULARY]
    jobs += [("train reverse_kl, data and samples", (Term("reverse_kl"),), 0.5, teacher)]
    for name, terms, on_policy, graded_by in jobs:
        if only is None or only in name:
            yield name, _trained(terms, on_policy, graded_by)
    if only is None:
        with tempfile.TemporaryDirectory() as folder:
            yield from _aligned(Path(folder), texts)
            save_model(student, Path(folder) / "student")
            save_model(teacher, Path(folder) / "teacher")
            yield "cache", _cached(Path(folder))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each result that is not what it was."""
    lines = [f"{name}: is no longer there" for name in before if name not in now]
    lines += [f"{name}: was not there before" for name in now if name not in before]
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [
                f"{name}: {key} was {old[key]}, is {new[key]}"
                for key in old.keys() & new.keys()
                if old[key] != new[key]
            ]
            gone = sorted(repr(old[key]) for key in old.keys() - new.keys())
            come = sorted(repr(new[key]) for key in new.keys() - old.keys())
            if gone != come:
                names = sorted(old.keys() ^ new.keys())
                lines.append(f"{name}: {', '.join(names)}: were {', '.join(gone)}, are {', '.join(come)}")
        elif old != new:
            lines.append(f"{name}: was {old}, is {new}")
    return sorted(lines)


def _student(seed: int = 1) -> LanguageModel:
    given = [f"{p.text}{p.completion}" for p in TASK.prompts("train", 300, 3)]
    model = tiny_model(word_tokenizer(given, 120), "student", layers=2, width=32, seed=seed)
    learn_answers(model, TASK.prompts("train", 64, seed), steps=20, batch=16)
    return model


def _taught() -> LanguageModel:
    model = tiny_model(character_tokenizer(), "teacher", layers=2, width=32, seed=2)
    learn_answers(model, TASK.prompts("train", 200, 7), steps=60, batch=32)
    return model


def _trained(terms: tuple[Term, ...], on_policy: float, teacher: LanguageModel) -> dict[str, Any]:
    """Metrics and measures by step, and the trained weights."""
    student = _student()
    recipe = Recipe(
        objectives=terms,
        max_new_tokens=12,
        num_generations=2,
        on_policy=on_policy,
        steps=3,
        prompts_per_step=4,
        micro_batch_size=4,
        lr=1e-3,
        warmup_steps=1,
    )
    run = distill(
        student,
        teacher,
        TASK.prompts("train", 24, 5),
        recipe,
        heldout=TASK.prompts("heldout", 6, 5),
        verifier=TASK,
        evaluation=EvaluationPlan(max_new_tokens=12, samples=1),
    )
    result = {
        f"{kind} {record['step']} {name}": value
        for kind, records in (("step", run.steps), ("evaluation", run.evaluations))
        for record in records
        for name, value in record.items()
        if not name.endswith(CLOCKED)
    }
    weights = hashlib.sha256()
    for name, weight in sorted(student.lm.state_dict().items()):
        weights.update(name.encode() + weight.numpy().tobytes())
    return {**result, "weights": weights.hexdigest()}


def _aligned(folder: Path, count: int) -> Iterator[tuple[str, str]]:
    """What `gold align --json` prints of odd texts, hashed, for pairs of tokenizers of every family."""
    from benchmarks.fuzz import subjects

    files = {}
    for number, subject in enumerate(subjects(trained_only=True)):
        files[subject.name] = folder / f"{number}.json"
        subject.tokenizer.save(str(files[subject.name]))
    rng = random.Random(0)
    names = list(files)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        texts = [t for t in (odd_text(rng) for _ in range(2 * count)) if isinstance(t, str)][:count]
        lines = folder / "texts.jsonl"
        lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        printed = _printed(
            "align", "--student", files[name], "--teacher", files[other], "--jsonl", lines, "--json"
        )
        yield f"align {name} beside {other}", hashlib.sha256(printed.encode()).hexdigest()


def _cached(folder: Path) -> dict[str, str]:
    """Hashes of the records in a teacher cache; before them a shard names the teacher by its folder."""
    prompts = folder / "prompts.jsonl"
    given: list[Prompt] = TASK.prompts("train", 40, 5)
    lines = [{"prompt": p.text, "completion": p.completion, "id": p.key} for p in given]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = folder / "run.yaml"
    kept = folder / "cache"
    told = {
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher"), "cache": {"path": str(kept)}},
        "data": {"prompts": str(prompts)},
        "output": str(folder / "run"),
    }
    settings.write_text(json.dumps(told), encoding="utf-8")
    _printed("cache", "build", settings)
    return {
        file.relative_to(kept).as_posix(): hashlib.sha256(
            file.read_bytes().partition(b"\xf6row")[2]
        ).hexdigest()
        for file in sorted(kept.rglob("*"))
        if file.is_file() and file.suffix not in (".json", ".lock") and not file.name.startswith(".")
    }


def _printed(*arguments: str | Path) -> str:
    """What a command prints, run in this process."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        app([str(a) for a in arguments], standalone_mode=False)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
