"""Runs beside each other: the table, its JSON, and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.html import Reader

from gold.errors import CheckpointError, ConfigError
from gold.inspect.compare import Comparison, compare_page, run_compare
from gold.train.run_folder import RunFolder


def a_run(folder: Path, steps: int, lr: float, kl: float, **config: Any) -> Path:
    settings = {"optimizer": {"lr": lr}, "train": {"steps": 8}, "output": str(folder), **config}
    with RunFolder.create(folder, settings) as run:
        for step in range(steps + 1):
            if step:
                run.log(
                    "train", {"step": step, "loss": kl / step, "step_s": 2.0, "tokens_per_s": 10.0 * step}
                )
            if step in (0, steps):
                now = kl / (1 + step)
                ends = {"reverse_kl_per_byte_low": now / 2, "reverse_kl_per_byte_high": now * 2}
                run.log("eval", {"step": step, "reverse_kl_per_byte": now, **ends, "evaluate_s": 1.0})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    other = [{"name": "reverse_kl"}]
    return [
        a_run(tmp_path / "a" / "one", 8, 1e-3, 0.9),
        a_run(tmp_path / "b" / "one", 4, 1e-4, 0.5, objectives=other),
    ]


def test_the_table_has_measures_costs_and_differences(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run_compare(runs)
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["a/one", "b/one"],
        ["steps", "8", "4 of 8"],
        ["time in steps and evaluations", "18.0 s", "10.0 s"],
        ["tokens per s", "45", "25"],
        [""],
        ["last evaluation"],
        ["step", "8", "4"],
        ["reverse KL, nats per byte", "0.1 (0.05 – 0.2)", "0.1 (0.05 – 0.2)"],
        [""],
        ["configuration"],
        ["optimizer.lr", "0.001", "0.0001"],
        ["objectives[0].name", "–", "reverse_kl"],
    ]
    monkeypatch.setenv("COLUMNS", "40")
    run_compare(runs)
    out = capsys.readouterr().out
    assert "optimizer.lr\n  a/one: 0.001\n  b/one: 0.0001\n" in out
    assert max(map(len, out.splitlines())) <= 40


def test_json_has_plain_values(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    run_compare(runs, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["a/one", "b/one"]
    assert found["runs"][1]["last_evaluation"]["reverse_kl_per_byte"] == pytest.approx(0.1)
    assert found["configuration"]["optimizer.lr"] == [1e-3, 1e-4]


def test_the_page_lays_the_curves_over_one_another(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_compare(runs, html=tmp_path / "page.html")
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert content == compare_page(Comparison.load(runs))
    read = Reader(content)
    charts = json.loads(read.within("data"))["charts"]
    assert [[line["label"] for line in chart["lines"]] for chart in charts] == [["a/one", "b/one"]] * 3
    assert len(re.findall(r'class="band c[01]"', content)) == 2
    assert "0.1 (0.05 – 0.2)" in read.within("wide")


def test_what_cannot_be_compared_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two run folders"):
        run_compare(runs[:1])
    with pytest.raises(ConfigError, match="is given twice"):
        run_compare([runs[0], runs[0].parent / "." / "one"])
    with pytest.raises(CheckpointError, match="holds no run"):
        run_compare([runs[0], tmp_path])
    with pytest.raises(ConfigError, match=r"cannot write .*: Is a directory"):
        run_compare(runs, html=tmp_path)
