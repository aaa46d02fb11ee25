"""`gold eval --tasks`: lm-eval's tasks on a run's student before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import support.tiny_models as tiny
from support.command import Ended, run_gold

from gold.config import Config
from gold.demo.running_sums import RunningSums
from gold.inspect.measures import task_lines
from gold.run import train

Gold = Callable[..., Ended]

TASKS = {
    "sums": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["{{answer}}", "{{wrong}}"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def gold(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Gold:
    return lambda *arguments: run_gold(monkeypatch, capfd, *arguments)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of tasks with their data, as a user writes them."""
    folder = tmp_path / "own tasks"
    folder.mkdir()
    documents = [
        {"question": p.text, "answer": p.completion, "wrong": f" {n}"}
        for n, p in enumerate(RunningSums(shortest=2, longest=2).prompts("heldout", 12, seed=3))
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    for name, text in TASKS.items():
        head = f"task: own_{name}\ndataset_path: json\ntest_split: test\n"
        data = f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / 'data.jsonl'))}}}}}"
        (folder / f"{name}.yaml").write_text(f"{head}{data}{text}metadata: {{version: 1.0}}\n")
    return folder


def test_scores_of_models_stand_beside_each_other() -> None:
    def of(value: float, stderr: float | None) -> dict[str, dict[str, dict[str, float | None]]]:
        return {"gsm8k": {"exact_match, strict-match": {"value": value, "stderr": stderr}}}

    head, row = task_lines({"before": of(0.25, 0.0125), "after": of(0.5, None)})
    assert head.split() == ["task", "metric", "before", "after"]
    assert row.split() == ["gsm8k", "exact_match,", "strict-match", "0.2500", "±", "0.0125", "0.5000"]


def test_without_the_extra_one_line_says_how_to_get_it(
    tmp_path: Path, gold: Gold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gold.harness.find_spec", lambda name: None)
    done = gold("eval", tmp_path, "--tasks", "gsm8k")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "gold-distill[lm-eval]" in line


@pytest.mark.slow
def test_a_run_is_scored_before_and_after(tmp_path: Path, gold: Gold, tasks: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval (gold-distill[lm-eval])")
    tiny.save_pair(tmp_path)
    few = {"train__steps": 2, "evaluate__prompts": 1, "data__task__heldout": 2, "data__task__train": 8}
    train(Config.model_validate(tiny.run_settings(tmp_path, tmp_path / "run", **few)))
    chosen = ["--tasks", "own_sums,own_choices", "--task-path", tasks]
    done = gold("eval", tmp_path / "run", *chosen, "--json")
    assert done.code == 0, done.err
    scores = json.loads(done.out.splitlines()[-1])
    assert list(scores) == ["before", "after"]
    for found in scores.values():
        assert found.keys() == {"own_sums", "own_choices"}
        (right,) = found["own_choices"].values()
        # The standard error of a mean of 12 zeros and ones.
        assert right["stderr"] == pytest.approx(math.sqrt(right["value"] * (1 - right["value"]) / 11))
    table = gold("eval", tmp_path / "run", *chosen).out
    assert "before" in table
    assert "±" in table
    alone = json.loads(gold("eval", tmp_path / "run" / "student", *chosen, "--json").out.splitlines()[-1])
    assert alone["student"]["own_choices"] == scores["after"]["own_choices"]
    unknown = gold("eval", tmp_path / "run", "--tasks", "own_summs", "--task-path", tasks)
    assert (unknown.code, "own_summs" in unknown.err) == (1, True)
    untemplated = gold("eval", tmp_path / "run", *chosen, "--apply-chat-template")
    assert (untemplated.code, untemplated.err.count("error: ")) == (1, 1)
