"""Mistakes are put into answers and found in them as a person would, and the table tells who is ahead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import main
from benchmarks.claims.cells import Cells
from benchmarks.claims.factors import WAYS, summed, table
from benchmarks.claims.mistakes import VALUE, Rest, first_mistake, spoiled
from gold.data import Prompt

ANSWER = " 31 28 -36"
GIVEN = [Prompt(f"{n}", text=f" {n} =", completion=ANSWER, reference=ANSWER) for n in range(40)]


@pytest.mark.parametrize("rest", ["right", "follows"])
def test_a_spoiled_answer_begins_wrong_and_goes_on_as_asked(rest: Rest) -> None:
    right = [31, 28, -36]
    made = spoiled(GIVEN, 0, rest)
    assert len({p.text for p in made}) == len(made)
    lengths = set()
    for before, p in zip(GIVEN, made, strict=True):
        text = p.text or ""
        assert text.startswith(before.text or "")
        begun = [int(v) for v in VALUE.findall(text.removeprefix(before.text or ""))]
        left = [int(v) for v in VALUE.findall(p.completion or "")]
        lengths.add(len(begun))
        assert len(begun) + len(left) == 3
        assert begun != right[: len(begun)]
        assert all(abs(v - r) <= 5 for v, r in zip(begun, right, strict=False))
        shift = begun[-1] - right[len(begun) - 1] if rest == "follows" else 0
        assert left == [r + shift for r in right[len(begun) :]]
    assert lengths == {1, 2}


def test_the_first_mistake_is_found_with_what_belongs_after_it() -> None:
    assert first_mistake(" 31 27 -99", ANSWER) == (" 31 27", " -36", " -37")
    assert first_mistake(" -31 28 -36", ANSWER) == (" -31", " 28", " -34")
    assert first_mistake(ANSWER, ANSWER) is None
    assert first_mistake(" 31 28 99", ANSWER) is None  # nothing belongs after it
    assert first_mistake(" x 30 28", ANSWER) is None  # cannot be read
    assert first_mistake(" 31", ANSWER) is None


def data() -> dict[str, Any]:
    def row(way: str, *ends: float, setting: str = "worked") -> dict[str, Any]:
        return {"setting": setting, "way": way, "accuracy": [[0.0, end] for end in ends]}

    rows = [row("distilled", 0.5, 0.7), row("forward", 0.1, 0.1), row("imitated", 0.25, 0.45)]
    rows.append(row("distilled", 0.9, 0.9, setting="worked_seen"))
    grades = {"worked": {"right": 0.66, "follows": 0.11}, "worked_seen": {"right": 0.98, "follows": 0.0}}
    return {"sizes": {"settings": ["worked", "worked_seen"]}, "grades": grades, "rows": rows}


def test_the_lead_is_told_seed_by_seed_and_only_where_both_ran() -> None:
    found = summed(data(), "worked")
    assert set(found) == {*WAYS, "ahead"}
    assert found["ahead"]["seeds"] == pytest.approx([0.25, 0.25])
    assert "ahead" not in summed(data(), "worked_seen")
    lines = table(data()).splitlines()
    assert lines[2].startswith(
        "| worked sums | 66% | 11% | 60.0% ± 127.1 | 10.0% ± 0.0 | 35.0% ± 127.1 | 25.0% ±"
    )
    assert lines[3].endswith("| 98% | 0% | 90.0% ± 0.0 | – | – | – |")


@dataclass(frozen=True)
class Number:
    """A job."""

    n: int


def test_cells_without_a_time_leave_no_sum(tmp_path: Path) -> None:
    row = '{{"job": {{"kind": "Number", "n": {}}}, "cpu_s": {}, "result": {{"n": {}}}}}\n'
    put_back = row.format(1, "2.5", 10) + row.format(2, "null", 20)
    (tmp_path / "cells.jsonl").write_text(put_back, encoding="utf-8")
    cells = Cells(tmp_path, 0)
    assert cells.all(lambda job, made: {}, [Number(1)]) == [{"n": 10}]
    assert cells.spent() == {"cells_s": 2.5}
    assert cells.all(lambda job, made: {}, [Number(2), Number(1)]) == [{"n": 20}, {"n": 10}]
    assert cells.spent() == {}


@pytest.mark.slow
def test_the_small_form_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["factors", "--small", "--seeds", "1", "--folder", str(tmp_path)]) == 0
    assert "| worked sums, has seen what follows |" in capsys.readouterr().out
