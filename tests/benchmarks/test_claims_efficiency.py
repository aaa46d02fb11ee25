"""What a run costs is counted once and as a person would, and the tables of prompts and efficiency read it rightly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.claims import main, prompts
from benchmarks.claims.curves import Curve, best, ends_by_rate
from benchmarks.claims.efficiency import WAYS, prices
from benchmarks.claims.efficiency import table as efficiency_table
from benchmarks.claims.gym import TASKS, Plain, tokenizer_of
from gold.data import Prompt
from gold.demo.models import tiny_model
from gold.models.language_model import LanguageModel
from gold.train.recipe import Recipe, Term

GIVEN = [Prompt(f"{n}", text=f" {n} =", completion=f" {n}{n}", reference=f" {n}{n}") for n in range(4)]
BEFORE = len(["<bos>", " ", "n", " ", "="])
WRITTEN = len([" ", "n", "n", "<eos>"])


class Never:
    """A verifier that finds everything wrong."""

    def score(self, prompt: Prompt, completion: str) -> float:
        return 0.0


def letters() -> LanguageModel:
    texts = [f"{p.text}{p.completion}" for p in GIVEN]
    return tiny_model(tokenizer_of(texts, 0), "letters", layers=1, width=16, seed=0, context=32)


def followed(recipe: Recipe, teacher: LanguageModel | None, **options: Any) -> list[dict[str, float]]:
    curve = Curve(letters(), GIVEN[:2], Never(), 1, 1, **options)
    curve.run(teacher, GIVEN, recipe, Never())
    return curve.points


def test_given_texts_pass_through_the_student_once_and_cost_their_teacher_once() -> None:
    recipe = Recipe((Term("sft"),), on_policy=0.0, num_generations=1, prompts_per_step=2, steps=4)
    recipe = recipe.replace(max_new_tokens=8)
    points = followed(recipe, None, text_s=100.0)
    assert [p["step"] for p in points] == [0, 1, 2, 3, 4]
    assert [p["prompts"] for p in points] == [0, 2, 4, 4, 4]
    assert [p["tokens"] for p in points] == [2 * n * (BEFORE + WRITTEN) for n in range(5)]
    assert [round(p["cpu_s"], -2) for p in points] == [0, 200, 400, 400, 400]


@pytest.mark.slow
def test_texts_of_the_student_pass_through_it_twice() -> None:
    recipe = Recipe(prompts_per_step=2, num_generations=3, steps=2, max_new_tokens=1)
    points = followed(recipe, letters(), text_s=100.0)
    assert [p["tokens"] for p in points] == [n * 2 * 3 * 2 * (BEFORE + 1) for n in range(3)]
    assert points[-1]["prompts"] == 4
    assert points[-1]["cpu_s"] < 50


def test_a_mix_counts_both_kinds_and_a_second_run_goes_on() -> None:
    curve = Curve(letters(), GIVEN[:2], Never(), 1, 1)
    mixed = Recipe((Term("sft"),), on_policy=0.5, num_generations=1, prompts_per_step=4, steps=1)
    recipe = mixed.replace(max_new_tokens=1)
    short = [Prompt(p.key, text=p.text, completion=" ") for p in GIVEN]
    curve.run(None, short, recipe)
    own = sum(recipe.student_writes(0, place) for place in range(4))
    assert 0 < own < 4
    assert curve.points[-1]["tokens"] == own * 2 * (BEFORE + 1) + (4 - own) * (BEFORE + 1)
    before = curve.points[-1]
    curve.run(letters(), GIVEN, Recipe(num_generations=1, prompts_per_step=2, steps=1, max_new_tokens=1))
    assert curve.points[-1]["step"] == 2
    assert curve.points[-1]["tokens"] == before["tokens"] + 2 * 2 * (BEFORE + 1)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_plain_task_scores_whole_answers_alone(task: Plain) -> None:
    train, heldout = task.prompts("train", 40, 0), task.prompts("heldout", 40, 0)
    assert not {p.text for p in train} & {p.text for p in heldout}
    for p in train:
        assert (p.text or "").startswith(" ")
        assert (p.text or "").endswith(" =")
        assert task.score(p, p.completion or "") == 1.0
        assert task.score(p, f"{p.completion}{p.completion}") == 0.0
        assert task.score(p, (p.completion or "")[:-1]) == 0.0


def test_a_worked_sum_needs_a_value_for_every_term() -> None:
    task = TASKS["worked_sum"]
    (p,) = task.prompts("train", 1, 0)
    values = (p.completion or "").split()
    assert len(values) == 3
    assert task.score(p, f" {values[-1]}") == 0.0
    assert task.score(p, f" 0 0 {values[-1]}") == 1.0
    assert task.score(p, f" {values[0]} {values[1]} 99") == 0.0


def columns(*accuracies: float) -> dict[str, list[float]]:
    steps = [10.0 * n for n in range(len(accuracies))]
    return {
        "step": steps,
        "prompts": steps,
        "tokens": steps,
        "cpu_s": [2 * s for s in steps],
        "accuracy": list(accuracies),
    }


def test_prices_are_read_between_points_and_a_seed_that_fails_leaves_no_mean() -> None:
    rows = [
        {"task": "t", "way": "opd", "curves": [columns(0.0, 0.4, 0.8), columns(0.0, 0.8, 0.8)]},
        {"task": "t", "way": "sft", "curves": [columns(0.0, 0.2, 0.8), columns(0.0, 0.1, 0.2)]},
        {"task": "t", "way": "reward", "curves": [columns(0.0, 0.1, 0.1), columns(0.0, 0.1, 0.2)]},
    ]
    data = {"sizes": {"tasks": ["t"]}, "made": {"t": {"teacher": 1.0, "start": 0.0}}, "rows": rows}
    assert prices(data, "t", 0.8)["opd"]["cpu_s"] == [40.0, 20.0]
    assert prices(data, "t", 0.8)["sft"]["step"] == [20.0, None]
    shown = efficiency_table(data)
    assert f"{WAYS['opd'].title} | 15 (×1.00)" in shown
    assert f"{WAYS['sft'].title} | 1 of 2 seeds" in shown
    assert f"{WAYS['reward'].title} | – |" in shown


def test_a_run_is_stopped_where_other_prompts_are_answered_best() -> None:
    curve = {
        "cpu_s": [0.0, 4.0, 8.0],
        "accuracy": [0.1, 0.6, 0.7],
        "watched": [0.2, 0.5, 0.5],
        "own": [0.0, 0.5, 1.0],
    }
    row: dict[str, list[dict[str, Any]]] = {
        "curves": [curve],
        "after": [{"known": 0.9, "new": 0.3, "share": 0.5}],
    }
    found = {name: value["mean"] for name, value in prompts.summed(row).items()}
    assert found == {"cpu_s": 8.0, "end": 0.7, "stopped": 0.6, "own": 1.0, "known": 0.9, "new": 0.3}
    row["after"][0]["share"] = 0.995
    assert "new" not in prompts.summed(row)


def test_additions_count_up_to_the_first_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def prompt(text: str, answer: str) -> Prompt:
        return Prompt(text, text=f"{text} =", completion=answer, reference=answer)

    heldout = [prompt(" 20 +1 +2", " 21 23"), prompt(" 30 +1 -1", " 31 30")]
    own = [prompt(" 20 +1 -1", " 21 20"), prompt(" 29 +1 +1", " 30 31")]
    written = {" 20 +1 +2 =": " 21 24", " 30 +1 -1 =": " 99 30"}
    monkeypatch.setattr(prompts, "answers", lambda _, asked, __: [written[p.text or ""] for p in asked])
    found = prompts.additions(letters(), heldout, own)
    # 20 +1 and 30 +1 are known, 21 +2 is new; 31 -1 comes after a wrong value.
    assert found == {"known": 0.5, "new": 0.0, "share": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["prompts", "efficiency"])
def test_the_small_form_runs_and_its_picture_is_drawn(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([part, "--small", "--seeds", "1", "--folder", str(tmp_path)]) == 0
    assert "| way |" in capsys.readouterr().out


def test_of_rates_that_end_equally_the_lowest_is_taken() -> None:
    assert best({"1e-05": 0.5, "0.001": 0.7, "0.0001": 0.7, "0.01": 0.6}) == 1e-4


def test_ends_are_told_by_way_and_rate() -> None:
    jobs = [SimpleNamespace(way=way, lr=lr) for way in ("a", "b") for lr in (1e-3, 3e-5)]
    ends = [{"curve": [{"accuracy": 0.9}, {"accuracy": n / 10}]} for n in range(4)]
    assert ends_by_rate(jobs, ends) == {"a": {"0.001": 0.0, "3e-05": 0.1}, "b": {"0.001": 0.2, "3e-05": 0.3}}
