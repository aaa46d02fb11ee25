"""Countdown in plain text: its right texts are those that reasoning-gym scores 1, and shares are of the teacher."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import main
from benchmarks.claims.countdown import WAYS, table
from benchmarks.claims.countdown_task import (
    TOKENIZERS,
    Countdown,
    all_questions,
    expression,
    right_texts,
    write_questions,
)
from gold.data import Prompt


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Countdown:
    path = tmp_path_factory.mktemp("countdown") / "questions.json"
    write_questions(path, 200)
    return Countdown(path)


def test_all_right_texts_of_a_question() -> None:
    assert right_texts(((5, 9), 14)) == (" 5+9=14", " 9+5=14")
    assert right_texts(((1, 1), 0)) == (" 1-1=0",)
    assert not right_texts(((1, 1), 7))
    assert not right_texts(((60, 60), 120))
    hand = (" 3+9=12 12-5=7", " 5-3=2 9-2=7", " 9+3=12 12-5=7", " 9-5=4 3+4=7", " 9-5=4 4+3=7")
    assert right_texts(((3, 5, 9), 7)) == hand


def test_steps_make_an_expression() -> None:
    assert expression(" 7-5=2 2+10=12") == "((7-5)+10)"
    assert expression(" 7-5=2 10-2=8") == "(10-(7-5))"
    assert expression(" 5-5=0 5+5=10") == "(5+5)"
    assert expression(" 7-5=2 3+4=7") == "(3+4)"
    assert expression(" 7-5=2 2+10") is None
    assert expression(" 7-5=2 2*10=20") is None
    assert expression(" (7-5)+10") is None
    assert expression("") is None


def test_the_verifier_finds_right_texts_right_and_others_wrong(task: Countdown) -> None:
    for p in task.lessons(60, 0):
        assert task.score(p, p.completion or "") == 1.0
        first, second = (p.completion or "").split()
        assert task.score(p, f" {first}") == 0.0
        assert task.score(p, f" {second}") == 0.0
    (a, b, c), target = p.reference["metadata"]["numbers"], p.reference["metadata"]["target"]
    # The result that a step tells does not count, only what its expression is worth.
    assert task.score(p, f" {a}+{b}=99 99+{c}={target}") == float(a + b + c == target)


def test_no_question_is_in_both_splits_whatever_the_order_of_its_numbers(task: Countdown) -> None:
    def of(split: str, seed: int) -> set[tuple[Any, ...]]:
        found = [p.reference["metadata"] for p in task.prompts(split, 10**6, seed)]
        return {(*sorted(m["numbers"]), m["target"]) for m in found}

    assert len(of("train", 0)) == task.count("train") > 4 * task.count("heldout") > 0
    assert of("train", 0) == of("train", 1)
    assert not of("train", 0) & of("heldout", 1)


def test_lessons_are_all_questions_but_those_held_out(task: Countdown) -> None:
    asked = {(tuple(sorted(m["numbers"])), m["target"]) for m in _facts(task.prompts("train", 10**6, 0))}
    held = {(tuple(sorted(m["numbers"])), m["target"]) for m in _facts(task.prompts("heldout", 10**6, 0))}
    assert asked < set(all_questions())
    assert not held & set(all_questions())
    lessons = {(tuple(sorted(m["numbers"])), m["target"]) for m in _facts(task.lessons(3000, 3))}
    assert lessons < set(all_questions())
    assert len(lessons) > 2000


def _facts(prompts: list[Prompt]) -> list[dict[str, Any]]:
    return [p.reference["metadata"] for p in prompts]


def test_the_right_text_of_a_lesson_is_drawn_at_random(task: Countdown) -> None:
    lessons = task.lessons(40_000, 0)
    by_question: dict[Any, Counter[str]] = {}
    for p in lessons:
        m = p.reference["metadata"]
        key = tuple(sorted(m["numbers"])), m["target"]
        by_question.setdefault(key, Counter())[p.completion or ""] += 1
    question, texts = max(
        ((q, t) for q, t in by_question.items() if len(right_texts(q)) <= 6), key=lambda qt: len(qt[1])
    )
    assert tuple(sorted(texts)) == right_texts(question)
    assert max(texts.values()) < 6 * min(texts.values())
    assert len({p.text for p in lessons if p.reference["metadata"]["target"] == question[1]}) > 1


def test_tokenizers_differ_in_numbers_alone() -> None:
    text = "12 4 1=16 12+4=16"
    cut = {name: make().encode(text).tokens[1:] for name, make in TOKENIZERS.items()}
    assert cut["digits"] == ["Ġ" if c == " " else c for c in text]
    assert cut["numbers"] == ["12", "Ġ", "4", "Ġ", "1", "=", "16", "Ġ", "12", "+", "4", "=", "16"]


def test_shares_are_of_the_teacher() -> None:
    curves = [{"step": [0, 5], "cpu_s": [0, n], "accuracy": [0.1, end]} for n, end in ((2, 0.3), (4, 0.5))]
    rows = [{"pair": "p", "way": way, "lr": 0.001, "curves": curves} for way in ("reverse", "gold")]
    sides = {name: {"accuracy": a, "reads": "1"} for name, a in (("teacher", 0.8), ("student", 0.1))}
    shown = table({"pairs": {"p": sides}, "rows": rows})
    assert f"| {WAYS['gold'].title} | 40.0% ± 127.1 | 50% ± 159 | 1 of 2 | 2 of 2 | 5 | 3 | 0.001 |" in shown
    assert "| *teacher* | 80.0% | 100% |" in shown
    assert "| *start* | 10.0% | 12% |" in shown


@pytest.mark.slow
def test_the_small_form_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["countdown", "--small", "--seeds", "1", "--folder", str(tmp_path)]) == 0
    assert "| GOLD |" in capsys.readouterr().out
