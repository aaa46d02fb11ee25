"""`gold init`: what it makes can be read, checked and trained, and nothing that is there is replaced."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Ended, run_gold
from support.tokenizers import byte_level_bpe, sentencepiece_bpe

from gold.config import Config
from gold.data import load_prompts
from gold.demo.models import tiny_model
from gold.errors import ConfigError
from gold.models.load import save_model
from gold.starter import CONFIG, HELDOUT, PROMPTS, STARTERS, make_starter
from gold.train.run_folder import RunFolder

Gold = Callable[..., Ended]


@pytest.fixture
def gold(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Gold:
    return lambda *arguments: run_gold(monkeypatch, capfd, *arguments)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two tiny models that read any text."""
    place = tmp_path_factory.mktemp("tiny models")
    for seed, (name, tokenizer) in enumerate(
        {"student": byte_level_bpe(), "teacher": sentencepiece_bpe()}.items()
    ):
        tokenizer.add_special_tokens(["<pad>"])
        model = tiny_model(tokenizer, name, layers=1, width=32, seed=seed)
        model.lm.config.max_position_embeddings = 4096
        save_model(model, place / name)
    return place / "student", place / "teacher"


@pytest.mark.parametrize("kind", STARTERS)
def test_a_starter_is_a_configuration_with_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "with spaces" / kind
    commands = make_starter(kind, folder)
    assert [command.split()[0] for command in commands] == ["cd", "gold", "gold"]
    monkeypatch.chdir(folder)
    config = Config.load(CONFIG)
    assert config.student.path == STARTERS[kind].student
    assert config.output == "runs/first"
    assert len(load_prompts(PROMPTS)) == 10
    assert len(load_prompts(HELDOUT)) == 4
    seen = [
        {(prompt.text, str(prompt.messages)) for prompt in load_prompts(file)} for file in (PROMPTS, HELDOUT)
    ]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("kind", STARTERS)
def test_what_is_a_comment_is_the_default(tmp_path: Path, kind: str) -> None:
    make_starter(kind, tmp_path)
    text = (tmp_path / CONFIG).read_text("utf-8")
    more = tmp_path / "more.yaml"
    more.write_text(re.sub(r"^( *)# ([a-z_]+:)", r"\1\2", text, flags=re.MULTILINE), "utf-8")
    assert more.read_text("utf-8") != text
    assert Config.load(more).to_dict() == Config.load(tmp_path / CONFIG).to_dict()


@pytest.mark.parametrize("kind", STARTERS)
def test_the_doctor_has_nothing_against_a_starter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gold: Gold, pair: tuple[Path, Path], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    student, teacher = pair
    made = gold("init", kind, "a run", "--student", student, "--teacher", teacher)
    assert made.code == 0, made.err
    assert "cd 'a run'" in made.out
    monkeypatch.chdir(tmp_path / "a run")
    done = gold("doctor", CONFIG)
    assert done.code == 0, done.out


def test_models_keep_their_place_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my: model").mkdir()
    monkeypatch.chdir(tmp_path)
    make_starter("chat", Path("x"), "my: model", "someone/else")
    config = Config.load(tmp_path / "x" / CONFIG)
    assert config.student.path == str(tmp_path / "my: model")
    assert config.teacher is not None
    assert config.teacher.path == "someone/else"
    assert config.teacher.template_kwargs == {}  # of the starter's own teacher


def test_nothing_is_replaced_unless_asked(tmp_path: Path, gold: Gold) -> None:
    (tmp_path / PROMPTS).write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        make_starter("demo", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [PROMPTS]
    done = gold("init", "demo", tmp_path)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert (tmp_path / PROMPTS).read_text() == "mine"
    assert gold("init", "demo", tmp_path, "--overwrite").code == 0
    assert len(load_prompts(tmp_path / PROMPTS)) == 10
    assert gold("init", "dmo", tmp_path / "other").code == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["demo", "chat", "lora"])
def test_a_starter_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gold: Gold, pair: tuple[Path, Path], kind: str
) -> None:
    student, teacher = pair
    assert gold("init", kind, tmp_path / kind, "--student", student, "--teacher", teacher).code == 0
    monkeypatch.chdir(tmp_path / kind)
    done = gold("train", CONFIG, "train.steps=1", "rollout.max_new_tokens=8", "train.prompts_per_step=2")
    assert done.code == 0, done.err
    run = RunFolder.open(Path("runs/first"))
    assert len(run.records("train")) == 1
    assert [record["step"] for record in run.records("eval")] == [0, 1]
    assert (run.path / "student" / "README.md").is_file()
