"""`gold data` shows what a run reads: the same ids, every column accounted for, in any width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
from rich.cells import cell_len
from support.command import Ended, run_gold
from support.tokenizers import byte_level_bpe, sentencepiece_bpe

from gold.data import load_prompts
from gold.demo.calculator import multiply
from gold.demo.talk import talking_student, talking_teacher
from gold.environments import ToolEnvironment
from gold.models.load import load_model, save_model
from gold.rollout.conversations import as_turn

Gold = Callable[..., Ended]
ROWS = [
    {"question": "24 +7 =", "answer": "31", "level": 1, "teacher_context": "Add. "},
    {"question": "1 +1 =", "answer": "", "level": 2},
    {"question": "a" * 3000, "answer": None, "level": 2},
]


@pytest.fixture
def gold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Gold:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    byte_level_bpe().save(str(tmp_path / "a.json"))
    sentencepiece_bpe().save(str(tmp_path / "b.json"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Ended:
        return run_gold(monkeypatch, capfd, "data", *arguments)

    return run


def test_the_columns_and_rows_of_a_file(gold: Gold) -> None:
    done = gold("rows.json")
    assert (done.code, done.err) == (0, "")
    assert "rows.json: JSON array, 3 rows, 3 of question" in done.out
    assert "columns read: question, answer, teacher_context" in done.out
    assert "columns not read: level" in done.out
    assert "1 prompts with one, 2 without" in done.out
    assert done.out.count("row ") >= 3
    plain = gold("rows.json", "--map", "prompt=question", "--map", "completion=answer", "--rows", "0")
    assert "3 rows, 3 of prompt" in plain.out


@pytest.mark.parametrize("columns", ["60", "100"])
def test_each_model_s_reading_fits_the_terminal(
    gold: Gold, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = gold("rows.json", "--student", "a.json", "--teacher", "b.json")
    lines = done.out.splitlines()
    together = [line for line in lines if "student reads" in line and "teacher reads" in line]
    assert bool(together) == (columns == "100")
    shown = lines[next(n for n, line in enumerate(lines) if line.startswith("tokens")) :]
    assert max(map(cell_len, shown)) <= int(columns)
    assert "tokens ⋯" in done.out  # of the long prompt


def test_a_run_s_prompts_have_the_ids_that_the_run_reads(gold: Gold, tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    settings = tiny.run_settings(tmp_path, tmp_path / "run")
    settings["data"] = {"prompts": str(tmp_path / "rows.json")}
    file = tiny.write_settings(tmp_path / "run.yaml", settings)
    found = json.loads(gold(file, "--json", "--rows", "2").out)
    (source,) = found["sources"]
    assert (source["read"], source["not_read"]) == (["question", "answer", "teacher_context"], ["level"])
    prompts = load_prompts(tmp_path / "rows.json")
    for name, adapt in (("student", lambda p: p), ("teacher", lambda p: p.for_teacher)):
        model = load_model(tmp_path / name)
        sizes = sorted(len(model.prompt_ids(adapt(p))) for p in prompts)
        told = source["tokens"][name]["prompt"]
        assert [told["least"], told["median"], told["most"]] == sizes
        for prompt, row in zip(prompts, found["rows"], strict=False):
            assert row["reads"][name]["ids"] == model.prompt_ids(adapt(prompt))


def test_a_run_with_an_environment_shows_its_tools(gold: Gold, tmp_path: Path) -> None:
    save_model(talking_student(), tmp_path / "student")
    save_model(talking_teacher(), tmp_path / "teacher")
    settings = tiny.run_settings(tmp_path, tmp_path / "run")
    settings["data"] = {"prompts": str(tmp_path / "talk.jsonl")}
    settings["environment"] = {"tools": ["gold.demo.calculator:multiply"]}
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "6 * 7"}]}\n')
    file = tiny.write_settings(tmp_path / "run.yaml", settings)
    (row,) = json.loads(gold(file, "--json").out)["rows"]
    asked = as_turn(load_prompts(tmp_path / "talk.jsonl")[0], ToolEnvironment([multiply]).tools)
    for name in ("student", "teacher"):
        assert row["reads"][name]["ids"] == load_model(tmp_path / name).prompt_ids(asked)


def test_arguments_that_do_not_go_together(gold: Gold, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    for arguments in (
        ["run.yaml", "--student", "a.json"],
        ["rows.json", "train.steps=3"],
        ["rows.json", "--map", "x"],
    ):
        done = gold(*arguments)
        assert (done.code, len(done.err.splitlines())) == (1, 1)
