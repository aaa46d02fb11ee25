"""What the command line says of bad input: the one place where the wording of errors is pinned.

Other tests ask only for the class of an error and what it names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Ended, run_gold
from support.tokenizers import byte_level_bpe, sentencepiece_bpe

MINIMAL = "student: {path: student}\nteacher: {path: teacher}\ndata: {prompts: p.jsonl}\noutput: run\n"
FILES = {
    "run.yaml": MINIMAL,
    "lines.yaml": f"{MINIMAL}train:\n  steps: 0\n  sead: 1\n",
    "twice.yaml": "a: 1\nb: 2\na: 3\n",
    "list.yaml": "- 1\n",
    "empty.yaml": "",
    "p.jsonl": '{"prompt": "24 +7"}\n{"prompt": "1 +1"}\n',
    "bad.jsonl": '{"prompt": "24 +7"}\n{"promt": "1 +1"}\n',
    "empty.jsonl": "",
    "chat.json": '[{"role": "user", "content": "hi"}]',
}

Gold = Callable[..., Ended]


@pytest.fixture
def gold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Gold:
    """Runs `gold` in a folder with FILES and the tokenizers a.json and b.json."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    byte_level_bpe().save(str(tmp_path / "a.json"))
    sentencepiece_bpe().save(str(tmp_path / "b.json"))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_gold(monkeypatch, capfd, *arguments)


def check(done: Ended, *lines: str, code: int = 1) -> None:
    assert done.err.splitlines() == [f"error: {line}" for line in lines]
    assert done.code == code


# gold train

FILE_ERRORS = [
    ("no.yaml", "no.yaml cannot be read: No such file or directory"),
    ("empty.yaml", "empty.yaml: is empty; a run needs at least student, teacher, data and output"),
    ("list.yaml", "list.yaml: expected sections such as student and teacher, got [1]"),
    ("twice.yaml", "twice.yaml:3: key 'a' is given twice, first on line 1"),
]


@pytest.mark.parametrize(("file", "line"), FILE_ERRORS)
def test_a_file_that_is_no_configuration(gold: Gold, file: str, line: str) -> None:
    check(gold("train", file), line)


def test_each_problem_of_a_file_is_a_line(gold: Gold) -> None:
    check(
        gold("train", "lines.yaml"),
        "lines.yaml:6: train.steps: must be >= 1, got 0",
        "lines.yaml:7: train.sead: unknown key; did you mean seed?",
    )


# An override, and what is said of it behind "override …: ".
OVERRIDE_ERRORS = [
    ("steps", "expected section.key=value"),
    ("train.steps=many", 'train.steps: expected a whole number, got "many"'),
    ("train.steps=0", "train.steps: must be >= 1, got 0"),
    ("rollout.top_p=2", "rollout.top_p: must be <= 1, got 2"),
    ("train.precision=fp16", 'train.precision: expected auto | no | bf16, got "fp16"; did you mean bf16?'),
    (
        "optimizer.schedule=cosin",
        'optimizer.schedule: expected linear | cosine | constant, got "cosin"; did you mean cosine?',
    ),
    ("optimizer.betas=[0.9]", "optimizer.betas.1: is missing"),
    ("student.device=gpu", 'student.device: expected auto, cpu, cuda, cuda:1, mps or xpu, got "gpu"'),
    ("student.path=''", "student.path: must not be empty"),
    ("train.lr=1", "train.lr: unknown key; did you mean optimizer.lr?"),
    ("train.sead=1", "train.sead: unknown key; did you mean seed?"),
    ("optimizer.clip_norm=1", "optimizer.clip_norm: unknown key; did you mean optimizer.max_grad_norm?"),
    ("objectives.1.weight=2", "there is no objectives.1: the last is 0"),
    ("output.x=1", 'output is "run", which has no keys'),
    (
        "objectives.0.name=reverse_lk",
        "objectives.0.name: unknown objective 'reverse_lk'; did you mean reverse_kl?",
    ),
    ("objectives=[{name: jsd, beta: 2}]", "objectives.0.beta: must be <= 1, got 2"),
    (
        "objectives=[{name: jsd, unshared: bucket}]",
        "objectives.0.unshared: belongs to support shared, not to bytes: leave it out",
    ),
    ("objectives=[]", "objectives: none has a weight above 0: nothing would be learned"),
    (
        "objectives=[{name: reward}]",
        "objectives: reward needs a verifier: train on a task (data.task), or leave reward out",
    ),
    ("student.quantization=nf8", 'student.quantization: expected nf4 | int8, got "nf8"; did you mean nf4?'),
    ("student.lora.rnk=4", "student.lora.rnk: unknown key; did you mean rank?"),
    (
        "student.quantization=nf4",
        "student.quantization: nf4 weights are not trained themselves: train adapters on them (student.lora={}), or "
        "leave it out",
    ),
    ("route=topic", "route: there is one teacher: name several in teachers, or leave it out"),
]


@pytest.mark.parametrize(("override", "line"), OVERRIDE_ERRORS)
def test_an_override(gold: Gold, override: str, line: str) -> None:
    check(gold("train", "run.yaml", override), f"override {override}: {line}")


# The value is not repeated where it may be a server's key in the wrong place.
TEACHER_ERRORS = [
    ("teacher", "gpt2", 'teacher: expected keys and values, got "gpt2"'),
    ("teacher.path", "null", "teacher.path: is missing"),
    (
        "teacher.served",
        "{url: 'localhost', model: m}",
        "teacher.served.url: expected one such as http://localhost:8000/v1",
    ),
    (
        "teacher.served",
        "{url: 'http://h/v1', model: m, key_env: sk-1}",
        "teacher.served.key_env: expected the name of an environment variable, never a key itself",
    ),
]


@pytest.mark.parametrize(("key", "value", "line"), TEACHER_ERRORS)
def test_an_override_of_a_teacher(gold: Gold, key: str, value: str, line: str) -> None:
    check(gold("train", "run.yaml", f"{key}={value}"), f"override {key}=…: {line}")


TASK, SPAN_PG = "data={task: {name: running_sums}}", "objectives=[{name: span_pg}]"
COMBINATIONS = [
    (
        ["teacher.self=ema"],
        "run.yaml:2: teacher: path is of another model, and self is the student's own: leave one of them out",
    ),
    (
        ["student={path: s.gguf, lora: {}, quantization: int8}"],
        "override student={path: s.gguf, lora: {}, quantization: int8}: student.quantization: weights of a GGUF file "
        "have their own: leave it out",
    ),
    (["data.task.name=countdown"], "run.yaml:3: data: both prompts and task are given: keep one"),
    (
        ["data.prompts=null"],
        "run.yaml:3: data: neither prompts nor task is given: name a file or data set, or a task",
    ),
    (
        ["objectives=[{name: sft}]"],
        "run.yaml: rollout.on_policy: sft learns the data's completions, and at 1 none is used: set it below 1",
    ),
    (
        [SPAN_PG, "rollout.top_p=0.9"],
        "override rollout.top_p=0.9: rollout.top_p: span_pg is a policy gradient over all tokens, and importance "
        "weights cannot recover tokens that are never sampled: set it to 1, got 0.9",
    ),
    (
        [SPAN_PG, "rollout.temperature=0.7"],
        "override rollout.temperature=0.7: rollout.temperature: span_pg is a policy gradient at temperature 1: set it "
        "to 1, or give the objective an importance_cap, got 0.7",
    ),
    (
        [SPAN_PG, "rollout.on_policy=0"],
        "override rollout.on_policy=0: rollout.on_policy: span_pg needs completions that the student writes, got 0",
    ),
    (
        [TASK, "objectives=[{name: reward}]", "rollout.num_generations=1"],
        "override rollout.num_generations=1: rollout.num_generations: reward compares completions of one prompt: it "
        "needs at least 2, got 1",
    ),
    (
        ["teacher=null", "teachers={a: {path: t}, b: {path: u}}"],
        "override teachers=…: teachers: a route names the teacher of a prompt, a mix takes all: give one of the two, "
        "neither is given",
    ),
    (
        ["teacher=null", "teachers={a: {path: t}, b: {path: u}}", "mix=linear", "objectives=[{name: uld}]"],
        "override mix=linear: mix: uld cannot be computed for a mix of teachers: choose a divergence on bytes, or a "
        "route",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), COMBINATIONS)
def test_settings_that_do_not_go_together(gold: Gold, overrides: list[str], line: str) -> None:
    check(gold("train", "run.yaml", *overrides), line)


DATA_ERRORS = [
    ("data={task: {name: running_sum}}", "unknown task 'running_sum'; did you mean running_sums?"),
    (
        "data={task: {name: running_sums, options: {longst: 3}}}",
        "task 'running_sums' has no option 'longst'; did you mean longest?",
    ),
    ("data.prompts=no.jsonl", "no.jsonl cannot be read: No such file or directory"),
    (
        "data.prompts=empty.jsonl",
        'empty.jsonl: no prompts in it; expected one JSON object per line, such as {"prompt": "…"}',
    ),
    ("data.prompts=bad.jsonl", 'bad.jsonl:2: unknown key "promt"; did you mean prompt?'),
    (
        "data={prompts: p.jsonl, heldout_share: 0.1}",
        "none of the 2 prompts is held out at a share of 0.1; add prompts, raise heldout_share, or give a held-out "
        "file of their own",
    ),
    (
        "data={prompts: p.jsonl, weight: w}",
        'p.jsonl:1: "w", which is the weight, is null or missing; expected a number',
    ),
    (
        "data={prompts: p.jsonl, weight: w, order: kept}",
        "override data={prompts: p.jsonl, weight: w, order: kept}: data.weight: has no meaning in the order of the "
        "file: set data.order to shuffled, or leave it out",
    ),
]


@pytest.mark.parametrize(("override", "line"), DATA_ERRORS)
def test_data(gold: Gold, override: str, line: str) -> None:
    check(gold("train", "run.yaml", override), line)


RUN_ERRORS = [
    (["--resume"], "run holds no run, there is no config.yaml; give a run folder"),
    (["--resume", "--overwrite"], "--resume goes on with a run and --overwrite removes it; give one of them"),
    (["--allow-changed"], "--allow-changed is for a run that goes on; give --resume too, or leave it out"),
]


@pytest.mark.parametrize(("options", "line"), RUN_ERRORS)
def test_a_run_folder(gold: Gold, options: list[str], line: str) -> None:
    check(gold("train", "run.yaml", *options), line)


# The other commands

PAIR = ["--student", "a.json", "--teacher", "b.json"]
OTHERS = [
    (["eval", "no"], "no cannot be read: No such file or directory"),
    (["doctor", "no.json", "b.json"], "no tokenizer at no.json: no such file or folder"),
    (["doctor", "run.yaml", "--gpus", "8"], "--gpus goes with --memory, the GiB of each GPU: give that too"),
    (
        ["doctor", "a.json", "b.json", "--memory", "24"],
        "--memory is of a run: name its YAML file instead of two models",
    ),
    (
        ["align", "--student", "no.json", "--teacher", "b.json", "x"],
        "no tokenizer at no.json: no such file or folder",
    ),
    (["align", *PAIR, "--file", "no.txt"], "no.txt cannot be read: No such file or directory"),
    (
        ["align", *PAIR, "x", "--file", "p.jsonl"],
        "give at most one of TEXT, --file, --jsonl, --chat and --ids",
    ),
    (
        ["align", *PAIR, "--ids", "1,x"],
        '--ids: \'x\' is no id; give whole numbers, such as "1 2 3" or "[1, 2, 3]"',
    ),
    (
        ["align", *PAIR, "--chat", "chat.json"],
        'chat.json: needs a list of {"role": …, "content": …} that ends with a message of the assistant: its text is '
        "aligned, what is before it is the prompt",
    ),
    (
        ["align", *PAIR, "--score", "x"],
        "a.json is a tokenizer without weights, and --score needs both models: give their folders or Hub ids, or leave "
        "--score out",
    ),
    (
        ["init", "caht"],
        "there is no starter 'caht': choose one of demo, chat, reasoning, lora; did you mean chat?",
    ),
    (["objectives", "reverse_lk"], "unknown objective 'reverse_lk'; did you mean reverse_kl?"),
    (["plot", "no"], "no holds no run, there is no config.yaml; give a run folder"),
    (
        ["cache", "build", "run.yaml"],
        "teacher.cache: it names no folder to build; set teacher.cache.path",
    ),
    (["cache", "info", "no"], "cache no: there is none; gold cache build makes one"),
    (["cache", "verify", "no"], "cache no: there is none; gold cache build makes one"),
    (["cache", "merge", "into", "no"], "cache no: there is none; gold cache build makes one"),
    (
        ["demo", "--out", "p.jsonl"],
        "p.jsonl exists and is no earlier demonstration; give another folder with --out",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), OTHERS)
def test_another_command(gold: Gold, arguments: list[str], line: str) -> None:
    check(gold(*arguments), line)


USAGE = [
    (["trian"], "No such command 'trian'. Did you mean 'train'?; try gold --help"),
    (["train"], "Missing argument 'CONFIG'; try gold train --help"),
    (
        ["train", "run.yaml", "--resum"],
        "No such option: --resum (Possible options: --resume); try gold train --help",
    ),
    (["align", "--student", "a.json"], "Missing option '--teacher'; try gold align --help"),
    (["demo", "extra"], "Got unexpected extra argument(s) (extra); try gold demo --help"),
]


@pytest.mark.parametrize(("arguments", "line"), USAGE)
def test_wrong_usage(gold: Gold, arguments: list[str], line: str) -> None:
    check(gold(*arguments), line, code=2)


def test_a_group_without_a_command_prints_its_help(gold: Gold) -> None:
    done = gold("cache")
    assert (done.code, done.err) == (2, "")
    assert "verify" in done.out
