"""What README.md shows is what happens: its marked blocks are run, its commands and files exist."""

from __future__ import annotations

import json
import math
import re
import runpy
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
from typer.testing import CliRunner

from gold import Prompt, Recipe, distill, losses, tasks
from gold.cli import app
from gold.config import Config
from gold.demo.models import character_tokenizer, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.environments import Conversation
from gold.errors import ConfigError
from gold.models.load import save_model
from gold.turns import read_turn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block that is marked as tested, and the heading above it."""

    heading: str
    language: str
    text: str


def marked_blocks() -> list[Block]:
    """The marked blocks, in order."""
    found = []
    for match in re.finditer(r"^<!-- tested -->\n```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        heading = re.findall(r"^## (.*)$", README[: match.start()], re.MULTILINE)[-1]
        found.append(Block(heading, match[1], match[2]))
    return found


def blocks(language: str) -> list[Block]:
    return [b for b in marked_blocks() if b.language == language]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A working directory with what the README speaks of: the examples, two models, prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    task = RunningSums().prompts("train", 16, seed=0)
    words = word_tokenizer([f"{p.text}{p.completion}" for p in task])
    for name, model in (
        ("smollm2-135m-instruct", tiny_model(words, "student", layers=1, width=32, seed=0)),
        ("gemma3-270m", tiny_model(character_tokenizer(), "teacher", layers=1, width=32, seed=1)),
    ):
        model.lm.config.max_position_embeddings = 1024
        save_model(model, tmp_path / "assets" / name)
    lines = [json.dumps({"prompt": p.text, "reference": p.reference}) for p in task]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "openings.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_every_python_block_is_tested():
    assert len(re.findall(r"^```python$", README, re.MULTILINE)) == len(blocks("python")) == 4


def test_commands_print_what_is_shown(workplace):
    (block,) = blocks("console")
    shown = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)[1:]
    for command, output in zip(shown[::2], shown[1::2], strict=True):
        program, *arguments = shlex.split(command)
        if program == "gold":
            result = CliRunner().invoke(app, arguments)
            assert (result.exit_code, result.output) == (0, output), command
        else:
            assert program == "python", command
            before, sys.argv = sys.argv, arguments
            try:
                runpy.run_path(arguments[0], run_name="__main__")
            finally:
                sys.argv = before


def test_the_configuration_is_one(tmp_path):
    (block,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(block.text)
    config = Config.load(tmp_path / "mine.yaml")
    assert config.output == "runs/mine"


def test_python_blocks_run_one_after_the_other(workplace):
    table = dict(losses.OBJECTIVES)
    namespace: dict[str, object] = {}
    try:
        for block in blocks("python"):
            before = namespace.get("run")
            # The README's runs are long enough to learn something; here one step shows that they work.
            exec(compile(block.text.replace("steps=200", "steps=1"), block.heading, "exec"), namespace)
            run = namespace["run"]
            assert run is not before
            assert len(run.steps) == 1, block.heading  # type: ignore[attr-defined]
            assert run.steps[0]["applied"], block.heading  # type: ignore[attr-defined]
    finally:
        losses.OBJECTIVES.clear()  # type: ignore[attr-defined]
        losses.OBJECTIVES.update(table)  # type: ignore[attr-defined]


@pytest.mark.parametrize("heading", ["Adding a loss", "Adding a teacher", "Adding a task"])
def test_extensions_are_short(heading):
    (block,) = (b for b in blocks("python") if b.heading == heading)
    # What is added, without imports and the call that uses it.
    own = block.text[: block.text.index("\nrun = ")]
    lines = [
        x
        for x in own.splitlines()
        if x.strip() and not x.startswith(("import", "from", "task =", "recipe ="))
    ]
    assert len(lines) <= 10


def test_files_and_make_targets_exist():
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / link).exists(), link
    folders = {"gold/align", "gold"}
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (ROOT / name).exists() or any((ROOT / f / name).exists() for f in folders), name
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_the_maps_of_the_code_name_what_exists():
    maps = [(ROOT / name).read_text(encoding="utf-8") for name in ("docs/architecture.md", "CONTRIBUTING.md")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "gold").rglob("*.py"))
    changes = maps[1].split("## Where would I change")[1].split("\n## ")[0]
    for path in re.findall(r"`(gold/[\w/]+(?:\.py|/))`", "".join(maps)):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(?:\w+\.)*(\w+)`", changes):
        assert re.search(rf"^\s*(def|class) {name}\b|^\s*{name}\b.*[=:]", source, re.MULTILINE), name


def test_method_names_tests_that_exist():
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    files = (ROOT / "tests").rglob("test_*.py")
    tests = "\n".join(file.read_text(encoding="utf-8") for file in files)
    named = set(re.findall(r"`(test_\w+)`", method))
    assert len(named) > 10
    assert named <= set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    for link in re.findall(r"\]\((\.\./[^)#]+)\)", method):
        assert (ROOT / "docs" / link).exists(), link


RECORDS = ROOT / "benchmarks" / "results"


def record(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))["data"]


@pytest.mark.parametrize("name", ["smollm2-from-gemma3", "gemma3-from-smollm2"])
def test_the_numbers_of_the_real_runs_are_those_of_their_records(name):
    evaluations = record(name)["evaluations"]
    first, last = evaluations[0], evaluations[-1]
    key = "reverse_kl_per_byte"
    cells = [f"{e[key]:.3f} ({e[f'{key}_low']:.3f} – {e[f'{key}_high']:.3f})" for e in (first, last)]
    cells += [f"{first[k]:.3f} → {last[k]:.3f}" for k in ("forward_kl_per_byte", "bits_per_byte")]
    assert f"| {last['step']} | {' | '.join(cells)} |" in README
    assert last[key] < first[key]


def test_the_table_of_the_demonstration_is_its_record():
    from benchmarks.demo import table
    from gold.demo.run import AHEAD, SHARE, WAYS, DemoPlan, Entry, check

    rows = [{name: Entry(**entry) for name, entry in seed.items()} for seed in record("demo")["seeds"]]
    plan = record("demo")["plan"]
    told = " ".join(README.split("## Demo")[1].split("\n## ")[0].split())
    assert table(rows) in README
    assert plan == asdict(DemoPlan())
    assert f"on {plan['prompts']:,} prompts without answers" in told
    assert f"Share of {plan['heldout']:,} held-out prompts" in told
    assert f"fails unless distillation reaches {100 * SHARE:.0f} % of its teacher's accuracy" in told
    assert f"is {100 * AHEAD:.0f} points ahead of every baseline" in told
    for seed in rows:
        check(seed)
        assert len({(seed[way].prompts, seed[way].sequences) for way in WAYS}) == 1


def test_the_table_of_objectives_is_its_record():
    record = (RECORDS / "objectives.md").read_text(encoding="utf-8")
    recorded = [[c.strip() for c in line.split("|")[1:-1]] for line in record.splitlines()[2:]]
    section = README.split("## Which objective")[1].split("\n## ")[0]
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")
    ]
    for name, *shown in rows[1:]:
        assert [shown] == [[r[1], r[2], r[3], r[5]] for r in recorded if r[1:4] == shown[:3]], name
    assert f"All {len(recorded) - 2} variants" in section
    assert len(json.loads((RECORDS / "objectives.json").read_text())["data"]["rows"]) == len(recorded) - 2


def cells(text):
    """The cells of all lines of Markdown tables, without dividers."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if set("".join(row)) - set("-:")]


def test_the_tables_of_several_teachers_are_their_record():
    recorded = {
        (len(row) // 2, row[0]): row[1::2] for row in cells((RECORDS / "informed.md").read_text("utf-8"))
    }
    page = (ROOT / "docs" / "teachers.md").read_text("utf-8")
    section = page.split("## What it brought, measured")[1].split("\n## ")[0]
    shown = cells(section)
    assert len(shown) == 14
    for name, *values in shown:
        assert recorded[len(values), name] == values, name


def in_cells(evaluations):
    """Before and after, as the tables show them."""
    first, last = evaluations
    key = "reverse_kl_per_byte"
    shown = [f"{e[key]:.3f} ({e[f'{key}_low']:.3f} – {e[f'{key}_high']:.3f})" for e in evaluations]
    return [*shown, *(f"{first[k]:.3f} → {last[k]:.3f}" for k in ("forward_kl_per_byte", "bits_per_byte"))]


def test_the_run_through_a_server_is_its_record():
    page = (ROOT / "docs" / "served-teacher.md").read_text("utf-8")
    served, local = record("served"), record("smollm2-from-gemma3")["evaluations"]
    shown = cells(page.split("## A run, measured")[1].split("\n## ")[0])
    assert [row[1:] for row in shown[1:]] == [in_cells(e) for e in (served["judged_locally"], local[::2])]
    seconds = served["scoring"]["seconds"]
    told = f"the client {seconds['client']['median']:.1f} s and a bare loop over the same requests"
    assert told in page
    assert f"{seconds['bare']['median']:.1f} s; of its time" in page
    assert served["scoring"]["client_share_by_process_time"] < 0.1


FROM_STATES = {
    "`gold`: reverse KL on bytes": "gold: reverse KL on bytes",
    "`gold`: forward KL on prefixes": "gold: forward KL on prefixes",
    "`gold`: reverse KL on shared tokens": "gold: reverse KL on shared tokens",
    "plain torch: reverse KL on shared tokens": "naive torch: reverse KL on shared tokens",
    "TRL 1.16 GOLD": "TRL GOLD, default merge",
    "LM-head matmuls alone (lower bound)": "matrix products",
}
FROM_LOGITS = {
    "`gold`: reverse KL on bytes": "gold: reverse KL on bytes, from logits",
    "`gold`: the hybrid of GOLD": "gold: the hybrid of GOLD, from logits",
    "TRL 1.16 GOLD": "TRL GOLD, default merge, from logits",
}


def told_seconds(case, name):
    row = next(r for r in case["rows"] if r["name"] == name)
    if row["seconds"]:
        return f"{row['seconds']['median']:.3g}"
    return {"over 60 s": "> 60"}.get(row["note"], "–" if row["note"].startswith("not called: ") else "")


def test_the_tables_of_speed_are_their_records():
    speed = README.split("## Speed")[1].split("\n## ")[0]
    losses, rest = speed.split("The same, the logits of both sides")
    of_logits, rest = rest.split("Of other pairs")
    told, steps = rest.split("A whole on-policy")
    told = " ".join(told.split())
    cases = [c for c in record("loss-cpu")["cases"] if c["hidden"] == 576]
    mine = sorted((c for c in cases if c["student"].startswith("smollm2")), key=lambda c: c["rows_S"])
    for section, names, shown in (
        (losses, FROM_STATES, mine),
        (of_logits, FROM_LOGITS, [c for c in mine if c["rows_S"] <= 512]),
    ):
        head, *rows = cells(section)
        assert head == ["seconds", *(f"{c['rows_S']:,} tokens" for c in shown)]
        assert rows == [[name, *(told_seconds(c, names[name]) for c in shown)] for name in names]
    for case in cases:
        if case["rows_S"] != 256:
            continue
        if case["student"] == case["teacher"]:
            ours, theirs = (told_seconds(case, name) for name in ("gold: JSD", "TRL chunked JSD"))
            assert f"the JSD takes {ours} s, TRL's chunked one {theirs} s." in told
        elif case not in mine:
            ours, products, theirs = (
                told_seconds(case, FROM_STATES[name])
                for name in (
                    "`gold`: reverse KL on bytes",
                    "LM-head matmuls alone (lower bound)",
                    "TRL 1.16 GOLD",
                )
            )
            assert f"{ours} s (products {products}, TRL {theirs})" in told
    (few,), many = [c for c in mine if c["rows_S"] == 256], mine[-1]
    peaks = [
        next(r for r in c["rows"] if r["name"] == name)["peak_mib"]
        for c, name in (
            (few, "gold: reverse KL on bytes"),
            (few, "TRL GOLD, default merge"),
            (many, "gold: reverse KL on bytes"),
        )
    ]
    assert f"{peaks[0]:,.0f} MiB for reverse KL on bytes, {peaks[1]:,.0f} for TRL" in told
    logits = many["logits_mib"]
    assert (
        f"at {many['rows_S']:,} tokens {peaks[2]:,.0f} MiB, where both sides' logits are {logits:,.0f}"
        in told
    )
    steps = cells(steps)
    trainers = [(p, t) for p in record("step-cpu")["pairs"] for t in p["trainers"]]
    for (pair, trainer), (_, name, whole, *phases, times) in zip(trainers, steps[1:], strict=True):
        assert (name == "`gold`") == (trainer["name"] == "gold")
        order = "rollout", "teacher", "student", "update"
        assert phases == [f"{trainer['seconds'][phase]['median']:.1f} s" for phase in order]
        assert whole == f"{trainer['whole_s']['median']:.1f} s"
        assert times == ("" if name == "`gold`" else f"{pair['times_gold']['median']:.2f} ×")


def test_the_table_of_told_tails_is_its_record():
    told = json.loads((RECORDS / "tails.json").read_text())["data"]["told"]
    page = (ROOT / "docs" / "method.md").read_text("utf-8")
    section = page.split("| observed tokens of each row |")[1].split("\n\n")[0]
    for row, found in zip(cells(section)[-len(told) :], told, strict=True):
        top_k, untold, *others = (float(cell.rstrip(" %")) for cell in row)
        names = "reverse_kl_per_byte", "cosine", "size"
        assert (top_k, untold) == (found["top_k"], pytest.approx(100 * found["untold"], abs=0.5))
        assert others == [pytest.approx(found[name], abs=0.0051) for name in names]


def extending_code(name: str) -> dict[str, Any]:
    """What the block of docs/extending.md defines that mentions a name."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.findall(r"^<!-- tested -->\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    defined: dict[str, Any] = {}
    exec(compile(next(block for block in code if name in block), "extending.md", "exec"), defined)
    return defined


def test_the_tracker_of_the_extending_page_works(tmp_path):
    tracker = extending_code("LossFile")["LossFile"](tmp_path / "loss.csv")
    recipe = Recipe(steps=2, prompts_per_step=2, num_generations=1, max_new_tokens=4)
    done = distill(tiny.tiny_student(), tiny.tiny_teacher(), tiny.prompts(4), recipe, trackers=[tracker])
    rows = (tmp_path / "loss.csv").read_text().splitlines()
    assert rows == [f"{record['step']},{record['loss']}" for record in done.steps]


def test_the_teacher_of_the_extending_page_works():
    teacher = tiny.tiny_teacher()
    unigram = extending_code("Unigram")["Unigram"](teacher.vocabulary, "12 +3 =")
    recipe = Recipe(steps=2, prompts_per_step=2, num_generations=1, max_new_tokens=4)
    done = distill(tiny.tiny_student(), unigram, tiny.prompts(4), recipe, heldout=tiny.heldout(2))
    assert all(math.isfinite(step["loss"]) for step in done.steps)
    assert "reverse_kl_per_byte" in done.evaluations[-1]


def test_the_engine_and_the_state_of_the_extending_page_work():
    student = tiny.tiny_student()
    recipe = Recipe(steps=2, prompts_per_step=2, num_generations=1, max_new_tokens=4)
    engine = extending_code("ScriptedEngine")["ScriptedEngine"]([5, 6, student.vocabulary.stop_ids[0]])
    done = distill(student, tiny.tiny_teacher(), tiny.prompts(4), recipe, engine=engine)
    assert [record["stop_rate"] for record in done.steps] == [1.0, 1.0]
    assert engine.version == 1
    found = extending_code("train_step")["losses"](
        tiny.tiny_student(), tiny.tiny_teacher(), tiny.prompts(4), recipe
    )
    expected = distill(tiny.tiny_student(), tiny.tiny_teacher(), tiny.prompts(4), recipe)
    assert found == [record["loss"] for record in expected.steps]


def test_the_task_of_the_extending_page_works(monkeypatch):
    monkeypatch.setattr(tasks, "OWN_TASKS", dict(tasks.OWN_TASKS))
    extending_code("Multiples")
    task = tasks.load_task("multiples", length=4)
    train, heldout = (task.prompts(split, 100, 0) for split in ("train", "heldout"))
    assert not {p.text for p in train} & {p.text for p in heldout}
    assert task.score(Prompt("x", text="x", reference=[7, 14, 21, 28]), " 7 14 20 28") == 0.75
    with pytest.raises(ConfigError, match="did you mean length"):
        tasks.load_task("multiples", lenght=4)


def test_the_objective_of_the_extending_page_works(monkeypatch):
    from tests.contract.test_contract import PAIR, STUDENT, TEACHER
    from tests.contract.toys import ToyModel, inputs_of, random_texts

    monkeypatch.setattr(losses, "OBJECTIVES", dict(losses.OBJECTIVES))
    table = losses.OBJECTIVES
    extending_code("squared_gap")
    inputs = inputs_of(PAIR, random_texts(PAIR, 4, 1), ToyModel(STUDENT, 3), ToyModel(TEACHER, 4))
    whole, single = table["squared_gap"](), table["squared_gap"](all_chunks=False)
    assert 0 < single(inputs).total.item() < whole(inputs).total.item()
    assert whole.count(inputs.batch) == whole(inputs).parts["chunks"].item()
    with pytest.raises(ConfigError, match="all_chunk: unknown key; did you mean all_chunks"):
        table["squared_gap"](all_chunk=False)


def test_every_module_of_test_support_has_a_line():
    folder = ROOT / "tests" / "support"
    listed = re.findall(r"^\| (\w+) \|", (folder / "README.md").read_text(), re.MULTILINE)
    assert listed[1:] == sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")


def test_the_tokenizer_family_of_the_extending_page_is_read():
    assert extending_code("WordPiece")["vocabulary"].size == 4


def test_the_environment_of_the_extending_page_works():
    environment = extending_code("SecondTry")["SecondTry"]()
    prompt = Prompt("k", messages=({"role": "user", "content": "6 * 7"},), reference="42")
    seen = Conversation(prompt, [])
    for text, replied, score in (("41", True, 0.0), ("42", False, 0.5)):
        seen.turns.append(read_turn(text.encode()))
        assert (environment.reply(seen) is not None) is replied
        assert environment.score(seen) == score
