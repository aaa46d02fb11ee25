"""Talking with models: each goes on after its own answers, and nothing but the end of input ends it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
from support.command import run_gold

from gold import chat as chat_module
from gold.chat import Answer, Chat, needs_plain, run_chat, show_answers, talk
from gold.config import Config
from gold.errors import ConfigError, DataError
from gold.models.language_model import LanguageModel
from gold.rollout.types import Sampling
from gold.run import speakers
from gold.train.run_folder import RunFolder

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
GREEDY = Sampling(temperature=0.0, max_new_tokens=4)


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    found = {"student": tiny.tiny_student(), "teacher": tiny.tiny_teacher()}
    for model in found.values():
        model.tokenizer.chat_template = TEMPLATE
    return found


def test_every_model_goes_on_after_its_own_answers(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, list[str]]] = []
    real = chat_module.sample

    def seen(engine: Any, model: LanguageModel, prompts: Any, *rest: Any, **options: Any) -> Any:
        read.append((model.name, [m["content"] for m in prompts[0].messages]))
        return real(engine, model, prompts, *rest, **options)

    monkeypatch.setattr(chat_module, "sample", seen)
    chat = Chat(models, GREEDY, system="s")
    first = chat.ask(" 1 +2 =")
    second = chat.ask(" 3 =")
    assert list(first) == list(second) == ["student", "teacher"]
    assert all(0 < answer.tokens <= 4 for answer in first.values())
    turns = [(name, ["s", " 1 +2 ="]) for name in models]
    turns += [(name, ["s", " 1 +2 =", first[name].text, " 3 ="]) for name in models]
    assert read == turns
    chat.reset()
    assert chat.ask(" 1 +2 =")["student"].text == first["student"].text
    assert read[-1] == ("teacher", ["s", " 1 +2 ="])


def test_plain_texts_are_continued_each_alone(models: Any) -> None:
    chat = Chat(models, GREEDY, plain=True)
    first, second = chat.ask(" 1 +2 ="), chat.ask(" 1 +2 =")
    assert [a.text for a in first.values()] == [a.text for a in second.values()]
    assert not needs_plain(models)
    assert needs_plain({"student": tiny.tiny_student()})


def test_the_seed_and_the_turn_choose_the_draws(models: Any) -> None:
    texts = []
    for seed in (0, 0, 1):
        chat = Chat(models, Sampling(max_new_tokens=12), seed, plain=True)
        texts.append([chat.ask(" 1 +2 =")["student"].text for _ in range(2)])
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_a_turn_that_does_not_fit_does_not_count(models: Any) -> None:
    chat = Chat(models, GREEDY)
    chat.ask(" 1 =")
    before = {name: list(turns) for name, turns in chat.turns.items()}
    with pytest.raises(DataError, match=r"student: .*; /reset begins anew"):
        chat.ask(" 1" * 5000)
    assert chat.turns == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_talk_ends_with_its_input_and_survives_failures(
    models: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(models, GREEDY)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f" 1 =\n\n/help\n{' 1' * 5000}\n/reset\n 2 =\n"))
    talk(chat)
    done = capsys.readouterr()
    assert done.out.count("[student, ") == 2
    assert "/reset begins anew, /help" in done.out
    assert "a new conversation" in done.out
    assert done.err.startswith("error: student: ")
    assert len(chat.turns["student"]) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n 1 =\n"))
    talk(chat)
    assert capsys.readouterr().out == ""


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_talk(
    models: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter([" 1 =", " 2 =", KeyboardInterrupt()])

    def read(prompt: str = "") -> str:
        line = next(lines)
        if isinstance(line, KeyboardInterrupt):
            raise line
        return line

    chat, asked = Chat(models, GREEDY), []

    def ask(text: str, tell: Any) -> dict[str, Answer]:
        asked.append(text)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return {"student": Answer("an answer", 2, True, 0.1)}

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "ask", ask)
    talk(chat)
    out = capsys.readouterr().out
    assert "stopped; the turn does not count" in out
    assert out.endswith("[student, 2 tokens in 0.1 s]\nan answer\n\n")


def test_answers_send_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_answers({"student": Answer("a\x1b[2Jb\nc", 3, False, 0.25)})
    assert capsys.readouterr().out == "[student, 3 tokens in 0.2 s, cut off]\na\\x1b[2Jb\nc\n"


def test_prompts_are_answered_as_json(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_chat(Chat(models, GREEDY), [" 1 =", " 2 ="], as_json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], second["prompt"]) == (" 1 =", " 2 =")
    assert list(first["answers"]) == ["student", "teacher"]
    assert set(first["answers"]["student"]) == {"text", "tokens", "stopped"}


# The models of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.save_pair(folder)
    settings = Config.model_validate(tiny.run_settings(folder, folder / "run")).to_dict()
    RunFolder.create(folder / "run", settings).close()
    shutil.copytree(folder / "student", folder / "run" / "student")
    return folder / "run"


def test_a_run_has_its_student_its_teacher_and_its_start(run: Path) -> None:
    notes: list[str] = []
    found = speakers(run, note=notes.append)
    assert list(found) == ["student", "teacher", "start"]
    assert notes == ["loading student", "loading teacher", "loading start"]
    assert list(speakers(run, ["start"])) == ["start"]
    assert list(speakers(run / "student")) == ["student"]
    with pytest.raises(
        ConfigError, match="--only techer: there is student, teacher, start; did you mean teacher"
    ):
        speakers(run, ["techer"])
    with pytest.raises(ConfigError, match="--only teacher: there is student"):
        speakers(run / "student", ["teacher"])


def test_a_run_without_a_student_yet_is_one_line(tmp_path: Path, run: Path) -> None:
    RunFolder.create(tmp_path / "new", RunFolder.open(run).config).close()
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        speakers(tmp_path / "new")


def test_the_command_asks_and_ends(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_gold(
        monkeypatch,
        capsys,
        *("chat", run, "--only", "student", "--prompt", " 1 =", "--max-new-tokens", 3, "--json"),
    )
    assert done.code == 0
    assert json.loads(done.out)["answers"]["student"]["tokens"] <= 3
    assert "no chat template: texts are continued" in done.err
    assert run_gold(monkeypatch, capsys, "chat", run, "--json").code == 2
