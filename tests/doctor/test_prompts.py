"""What the teacher and the student really read: templates that refuse, drop, change or date messages, arguments of
templates, lengths; and that `gold doctor` refuses what `gold train` does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
from support.command import run_gold
from support.tokenizers import BOS, EOS, byte_level_bpe, sentencepiece_bpe
from support.trackers import Recorder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gold.teachers.cached
import gold.train.preflight
from gold.config import Config
from gold.data import MOST_EXAMINED, Prompt
from gold.data.prompts import LONGEST_EXAMINED
from gold.doctor.finding import Finding
from gold.doctor.prompts import (
    PromptReader,
    examine_prompts,
    limits_of,
    notes_of,
    raise_refused,
)
from gold.doctor.side import read_side
from gold.errors import ConfigError, DataError, ModelError
from gold.models.load import wrap_model
from gold.teachers import CachedTeacher, LocalTeacher, ServedTeacher
from gold.teachers.absent import AbsentTeacher
from gold.tokenize.chat import prompt_ids
from gold.tokenize.templates import PromptTokenizer, Rendering, rendered
from gold.tokenize.vocabulary import Vocabulary
from gold.train.loop import Saving, distill
from gold.train.preflight import read_date
from gold.train.recipe import Recipe

TURNS = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
USERS = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
UPPER = "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + TURNS
)
DATED = "{{ strftime_now('%Y-%m-%d') }}" + TURNS
LLAMA3 = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    + TURNS
)
THINKING = TURNS + "{% if enable_thinking is defined and enable_thinking is false %}<no thought>{% endif %}"


def chat(*turns: tuple[str, str], key: str = "a") -> Prompt:
    return Prompt(key, messages=tuple({"role": role, "content": content} for role, content in turns))


def reader(role: str, template: str | None, context: int | None = None, **arguments: Any) -> PromptReader:
    tokenizer = byte_level_bpe() if role == "student" else sentencepiece_bpe()
    ids = {"stop_ids": [tokenizer.token_to_id(EOS)], "bos_id": tokenizer.token_to_id(BOS)}
    vocabulary = Vocabulary(tokenizer, chat_template=template, name=role, **ids)
    made = PromptTokenizer(vocabulary, {"bos_token": BOS, "eos_token": EOS})
    return PromptReader(role, f"the {role}'s folder", made, vocabulary, Rendering(arguments), context)


def checks_of(
    prompts: Sequence[Prompt], *readers: PromptReader, new_tokens: int = 8, heldout: Sequence[Prompt] = ()
) -> dict[str, Finding]:
    found = examine_prompts(prompts, heldout, readers or (reader("student", TURNS),), new_tokens)
    assert len({check.check for check in found}) == len(found)
    return {check.check: check for check in found}


# What a template does to messages


def test_prompts_that_everyone_reads_pass() -> None:
    talks = [chat(("system", "Be brief."), ("user", f"say {n}")) for n in range(3)]
    assert checks_of(talks, reader("student", TURNS), reader("teacher", TURNS)).keys() == {"prompts"}
    assert checks_of([Prompt("a", "text")], reader("student", None)).keys() == {"prompts"}


@pytest.mark.parametrize("said", ["Answer in French.", "a", "s"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_message_that_a_template_drops_is_named_with_side_role_and_count(side: str, said: str) -> None:
    """However short it is: the same letters stand elsewhere."""
    talks = [chat(("developer", said), ("user", f"say {n}"), key=str(n)) for n in range(5)] + [
        chat(("user", "a"))
    ]
    templates = {"student": TURNS, "teacher": TURNS} | {side: USERS}
    check = checks_of(talks, *(reader(role, template) for role, template in templates.items()))["messages"]
    assert check.status == "warn"
    for part in (f"of the {side} drops", "developer", "5 of 6 conversations"):
        assert part in check.found
    assert check.advice


def test_messages_that_are_changed_are_told_and_white_space_is_no_change() -> None:
    check = checks_of([chat(("user", "say it"))], reader("student", UPPER))["messages"]
    assert "cuts or changes" in check.found
    trimmed = TURNS.replace("m.content", "m.content | trim")
    assert "messages" not in checks_of([chat(("user", "  say it\n"))], reader("student", trimmed))
    assert "messages" not in checks_of([chat(("system", ""), ("user", "a"))], reader("student", USERS))


def test_what_teachers_alone_are_told_is_looked_for_as_they_read_it() -> None:
    told = Prompt(
        "a",
        messages=({"role": "user", "content": "a question"},),
        teacher_context=({"role": "developer", "content": "the answer"},),
    )
    check = checks_of([told], reader("student", USERS), reader("teacher", USERS))["messages"]
    assert "teacher drops" in check.found
    assert "student" not in check.found


def test_a_template_that_refuses_says_whose_it_is_and_what_to_do() -> None:
    talks = [chat(("system", "Be brief."), ("user", "a"), key=str(n)) for n in range(3)]
    check = checks_of(talks, reader("student", TURNS), reader("teacher", NO_SYSTEM))["prompts"]
    assert check.status == "fail"
    for part in ("prompt 0", "the teacher's folder", "System role not supported", "2 more"):
        assert part in check.found
    assert "template" in check.advice
    with pytest.raises(DataError, match="System role not supported"):
        raise_refused([check])
    # Of the held-out ones too.
    assert (
        checks_of([chat(("user", "a"))], reader("student", NO_SYSTEM), heldout=talks)["prompts"].status
        == "fail"
    )


def test_special_tokens_in_prompts_are_counted_for_they_may_have_been_rendered() -> None:
    rendered_already = [Prompt(str(n), f"{BOS}user: {n}{EOS}") for n in range(4)]
    check = checks_of([*rendered_already, Prompt("b", "text")], reader("student", TURNS))["special tokens"]
    assert (check.status, check.found.startswith("4 prompts")) == ("warn", True)
    assert EOS in check.found


# Many prompts


def test_of_many_prompts_some_are_drawn_and_the_longest_are_among_them() -> None:
    many = [Prompt(str(n), f"say {n}") for n in range(MOST_EXAMINED + 3000)]
    many[4321] = Prompt("long", "say it " * 200)
    found = examine_prompts(many, [], [reader("student", TURNS, 256)], 8)
    (refused,) = (check for check in found if check.check == "prompts")
    assert (refused.status, "long" in refused.found) == ("fail", True)
    fits = examine_prompts(many, [], [reader("student", TURNS, 2048)], 8)
    assert any(f"{MOST_EXAMINED:,}" in note for note in notes_of(fits))
    assert found == examine_prompts(many, [], [reader("student", TURNS, 256)], 8)
    assert LONGEST_EXAMINED < MOST_EXAMINED


# Lengths


def test_the_longest_prompt_and_new_tokens_are_held_against_both_contexts() -> None:
    prompts = [Prompt("short", "say"), Prompt("longest", "say it again and again")]
    sides = reader("student", None), reader("teacher", None)
    longest = [max(len(side.prompt_ids(p)) for p in prompts) for side in sides]
    fits = checks_of(
        prompts, reader("student", None, longest[0] + 8), reader("teacher", None, longest[1] + 30)
    )
    assert fits["context"].status == "pass"
    tight = checks_of(prompts, reader("student", None, 999), reader("teacher", None, longest[1] + 2))[
        "context"
    ]
    assert tight.status == "warn"
    assert "estimated" in tight.found
    assert "max_new_tokens" in tight.advice
    for role, context in (("student", longest[0] + 7), ("teacher", longest[1])):
        both = [reader(r, None, context if r == role else 999) for r in ("student", "teacher")]
        check = checks_of(prompts, *both)["prompts"]
        assert check.status == "fail"
        assert "longest" in check.found
    # Where nobody knows a context, nothing is said of it.
    assert "context" not in checks_of(prompts, *sides)


@pytest.mark.parametrize(
    ("length", "config", "limits"),
    [
        (None, {}, []),
        (10**30, {"sliding_window": None, "model_type": "mistral"}, []),
        (2048, {"sliding_window": 512, "model_type": "mistral"}, [2048, 512]),
        (None, {"sliding_window": 512, "model_type": "qwen2"}, []),
        (None, {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}, []),
        (None, {"sliding_window": 512, "layer_types": ["sliding_attention"] * 2}, [512]),
    ],
)
def test_other_limits_are_those_of_the_tokenizer_and_of_windows_in_every_layer(
    length: int | None, config: dict[str, Any], limits: list[int]
) -> None:
    student = reader("student", None)
    student.tokenizer.model_max_length = length
    assert list(limits_of(student.tokenizer, config)) == limits
    limited = replace(student, limits={n: (f"limit {n}", "shorten") for n in (9, 10)})
    prompt = Prompt("only", "say")
    size = len(student.prompt_ids(prompt))
    warned = [f.found for f in examine_prompts([prompt], [], [limited], 10 - size) if f.status == "warn"]
    assert warned == [f"student {size} + {10 - size} tokens exceed the 9 of limit 9"]


# Arguments of templates


def test_arguments_reach_the_template_of_every_kind_of_tokenizer(tmp_path: Path) -> None:
    talk = chat(("user", "a question"))
    folder = model_folder(tmp_path / "m", THINKING)
    arguments = {"enable_thinking": False}
    side = read_side("teacher", str(folder), None, Rendering(arguments))
    live = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = live.apply_chat_template(
        list(talk.messages or ()), add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert expected != live.apply_chat_template(
        list(talk.messages or ()), add_generation_prompt=True, return_dict=False
    )
    lm = LlamaForCausalLM.from_pretrained(folder)
    model = wrap_model(lm, live, template_kwargs=arguments)
    served = ServedTeacher(folder, url="http://localhost:1", model="m", template_kwargs=arguments)
    unasked = AbsentTeacher(folder, template_kwargs=arguments)
    for one in (side, model, LocalTeacher(model), served, unasked):
        assert one.prompt_ids(talk) == expected
    # What decides a cache's key is what is read.
    without = AbsentTeacher(folder).prompt_ids(talk)
    assert without != expected


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            {name: 1}
            for name in ("messages", "tools", "add_generation_prompt", "bos_token", "strftime_now", "a b", "")
        ),
        {"a": {1, 2}},
        {"a": float("nan")},
        [1],
    ],
    ids=str,
)
def test_arguments_that_no_template_can_be_given_are_refused(arguments: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="template_kwargs"):
        gold.load_model(tmp_path / "nowhere", template_kwargs=arguments)
    settings = tiny.run_settings(tmp_path, tmp_path / "run", student__template_kwargs=arguments)
    with pytest.raises(ConfigError, match=r"student\.template_kwargs"):
        Config.model_validate(settings)


def test_a_configuration_has_arguments_and_a_run_that_goes_on_with_others_is_refused(tmp_path: Path) -> None:
    config = Config.model_validate(
        tiny.run_settings(tmp_path, tmp_path / "run", teacher__template_kwargs={"enable_thinking": False})
    )
    assert config.teacher is not None
    assert config.teacher.template_kwargs == {"enable_thinking": False}
    assert config.to_dict()["teacher"]["template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(ConfigError, match="template_kwargs is of another model"):
        Config.model_validate(config.to_dict() | {"teacher": {"self": "ema", "template_kwargs": {"a": 1}}})


def test_an_argument_that_the_template_never_asks_for_is_told() -> None:
    talk = [chat(("user", "a"))]
    sides = (
        reader("student", THINKING, enable_thinking=False),
        reader("teacher", TURNS, enable_thinking=False),
    )
    check = checks_of(talk, *sides)["template arguments"]
    assert "teacher never uses enable_thinking" in check.found
    assert "teacher.template_kwargs" in check.advice


# Dates


def a_day(day: str) -> Any:
    class Day(date):
        @classmethod
        def today(cls) -> date:  # type: ignore[override]
            return date.fromisoformat(day)

    return Day


def test_the_day_that_a_template_writes_is_the_renderings() -> None:
    side = reader("student", DATED)
    written = rendered(side.tokenizer, [{"role": "user", "content": "a"}], Rendering(day=date(2026, 2, 3)))
    assert written.startswith("2026-02-03")
    llama = reader("student", LLAMA3).tokenizer
    assert rendered(llama, [], Rendering(day=date(2026, 2, 3))) == "03 Feb 2026"
    assert rendered(llama, [], Rendering({"date_string": "26 Jul 2024"}, date(2026, 2, 3))) == "26 Jul 2024"
    # What day it is for transformers does not matter to anyone here.
    assert "date" in checks_of([chat(("user", "a"))], reader("student", DATED))
    assert "date" not in checks_of(
        [chat(("user", "a"))], reader("student", LLAMA3, date_string="26 Jul 2024")
    )
    assert "date" not in checks_of([Prompt("a", "text")], reader("student", DATED))


NUMBERS = "{{ strftime_now('%Y %m %d') }}{% for m in messages %}{{ m.content }}{% endfor %} ="
TALKS = [chat(("user", f" {n} +{n}"), key=str(n)) for n in range(4)]


def test_a_run_keeps_its_day_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(
        steps=1,
        prompts_per_step=2,
        num_generations=1,
        lr=1e-3,
        warmup_steps=0,
        max_new_tokens=4,
    )

    def run(day: str, resume: bool) -> tuple[list[int], Recorder]:
        monkeypatch.setattr(gold.train.preflight, "date", a_day(day))
        student, notes = tiny.tiny_student(), Recorder()
        student.tokenizer.chat_template = NUMBERS
        saving = Saving(tmp_path / "run", resume=resume)
        distill(student, tiny.tiny_teacher(), TALKS, recipe, saving=saving, progress=notes)
        return student.prompt_ids(TALKS[0]), notes

    first, notes = run("2026-11-29", False)
    assert any("student writes the date" in note and "2026-11-29" in note for note in notes.notes)
    assert read_date(tmp_path / "run") == date(2026, 11, 29)
    again, _ = run("2027-01-02", True)
    assert again == first
    shutil.rmtree(tmp_path / "run")
    other, _ = run("2027-01-02", False)
    assert other != first


def test_a_cache_keeps_the_day_that_its_texts_were_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def teacher(day: str) -> CachedTeacher:
        monkeypatch.setattr(gold.teachers.cached, "date", a_day(day))
        model = tiny.tiny_teacher()
        model.tokenizer.chat_template = NUMBERS
        return CachedTeacher(LocalTeacher(model), tmp_path / "cache")

    first = teacher("2026-11-29")
    spelled = [first.vocabulary.encode(" 12 13")] * len(TALKS)
    first.score(TALKS, spelled, [True] * len(TALKS))
    first.cache.close()
    later = teacher("2027-01-02")
    assert later.cache.origin.date == "2026-11-29"
    assert later.missing(TALKS, spelled, [True] * len(TALKS)) == []
    # A run with it reads the day of the cache too.
    gold.train.preflight.pin_date(student := tiny.tiny_student(), gold.Teachers({"teacher": later}))
    assert student.rendering.day == date(2026, 11, 29)


# The doctor refuses what a run refuses


def model_folder(
    folder: Path, template: str | None = TURNS, *, teacher: bool = False, context: int = 128
) -> Path:
    tokenizer = sentencepiece_bpe() if teacher else byte_level_bpe()
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    live = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    live.chat_template = template
    live.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    model_folder(folder / "student")
    model_folder(folder / "teacher", teacher=True)
    return folder


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def of_student(folder: Path, **keys: Any) -> None:
    changed(folder / "run.yaml", student={"path": str(folder / "student"), **keys})


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-64])


FAULTS: dict[str, Callable[[Path], Any]] = {
    "none": lambda f: None,
    "a system turn that the teacher refuses": lambda f: (f / "teacher/chat_template.jinja").write_text(
        NO_SYSTEM
    ),
    "a system turn that the student refuses": lambda f: (f / "student/chat_template.jinja").write_text(
        NO_SYSTEM
    ),
    "a template that is none": lambda f: (f / "teacher/chat_template.jinja").write_text("{% if %}"),
    "a template that is dropped": lambda f: (f / "teacher/chat_template.jinja").write_text(USERS),
    "adapters": lambda f: (f / "teacher/adapter_config.json").write_text("{}"),
    "an encoder-decoder": lambda f: changed(
        f / "teacher/config.json", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True
    ),
    "pictures": lambda f: changed(
        f / "student/config.json",
        architectures=["BlipForConditionalGeneration"],
        model_type="blip",
        vision_config={},
    ),
    "weights cut short": lambda f: cut_short(f / "teacher/model.safetensors"),
    "no weights": lambda f: (f / "student/model.safetensors").unlink(),
    "a stale stop id": lambda f: changed(f / "teacher/generation_config.json", eos_token_id=99_999),
    "a stop id that is text": lambda f: changed(f / "student/generation_config.json", eos_token_id=70),
    "too long for the student": lambda f: changed(f / "student/config.json", max_position_embeddings=12),
    "too long for the teacher": lambda f: changed(f / "teacher/config.json", max_position_embeddings=12),
    "tight for the teacher": lambda f: changed(f / "teacher/config.json", max_position_embeddings=34),
    "a role that is not there": lambda f: changed(
        f / "run.yaml", student={"path": str(f / "student"), "roles": {"bos": "<nowhere>"}}
    ),
    "a device that is not there": lambda f: changed(
        f / "run.yaml", student={"path": str(f / "student"), "device": "xpu"}
    ),
    "a larger top_k than the vocabulary": lambda f: changed(
        f / "run.yaml", objectives=[{"name": "forward_kl", "support": "shared", "top_k": 100_000}]
    ),
    "no cache where nobody is to be asked": lambda f: changed(
        f / "run.yaml",
        teacher={"path": str(f / "teacher"), "cache": {"path": str(f / "c"), "missing": "stop"}},
    ),
    "no completions": lambda f: changed(f / "run.yaml", rollout={"on_policy": 0.5}),
    "an argument that shadows": lambda f: of_student(f, template_kwargs={"messages": 1}),
}
"""Faults of a pair, and what is none."""
SOUND = ("none", "a template that is dropped", "tight for the teacher")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_doctor_refuses_what_a_run_refuses(
    fault: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gold.run.plot_run", lambda folder: [])
    for side in ("student", "teacher"):
        shutil.copytree(pair / side, tmp_path / side)
    lines = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"the dog {n}"},
            ]
        }
        for n in range(6)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = tiny.run_settings(
        tmp_path, tmp_path / "run", train__steps=1, evaluate__prompts=2, evaluate__samples=0
    )
    file = str(tmp_path / "prompts.jsonl")
    (tmp_path / "run.yaml").write_text(json.dumps(settings | {"data": {"prompts": file, "heldout": file}}))
    FAULTS[fault](tmp_path)

    doctor, train = (
        run_gold(monkeypatch, capfd, name, tmp_path / "run.yaml") for name in ("doctor", "train")
    )
    assert doctor.code == train.code == (0 if fault in SOUND else 1), (doctor, train)
    if "stop id" in fault:
        assert "roles.stop" in doctor.out + doctor.err
        assert "another family" not in doctor.out + doctor.err


def test_align_shows_the_prompt_with_the_arguments_of_a_run(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(pair / "student", tmp_path / "student")
    (folder / "chat_template.jinja").write_text(THINKING)
    talk = chat(("user", "the dog"))
    (tmp_path / "talk.json").write_text(
        json.dumps([*(talk.messages or ()), {"role": "assistant", "content": "a"}])
    )
    words = [
        "align",
        "--student",
        folder,
        "--teacher",
        pair / "teacher",
        "--chat",
        tmp_path / "talk.json",
        "--json",
    ]

    shown = partial(run_gold, monkeypatch, capfd, *words)

    found = json.loads(shown("--student-template-kwargs", '{"enable_thinking": false}').out)
    side = read_side("student", str(folder), None, Rendering({"enable_thinking": False}))
    assert found["student"]["prompt_ids"] == side.prompt_ids(talk)
    assert json.loads(shown().out)["student"]["prompt_ids"] == prompt_ids(side.tokenizer, talk)
    assert "--teacher-template-kwargs" in shown("--teacher-template-kwargs", "{").err
    assert "messages" in shown("--teacher-template-kwargs", '{"messages": 1}').err


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("student/config.json", {"max_position_embeddings": 12}, "do not fit the 12 tokens"),
        ("teacher/config.json", {"max_position_embeddings": 12}, "do not fit the 12 tokens"),
        ("student/tokenizer_config.json", {"model_max_length": 11}, "exceed the 11 of its tokenizer's"),
        (
            "teacher/config.json",
            {"sliding_window": 13, "model_type": "mistral"},
            "exceed the 13 of the sliding",
        ),
    ],
)
def test_lengths_are_told_before_weights_are_loaded(
    file: str,
    changes: dict[str, Any],
    told: str,
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def load(*_: Any) -> Any:
        raise ModelError("here weights would be loaded")

    monkeypatch.setattr("gold.build.load", load)
    for side in ("student", "teacher"):
        shutil.copytree(pair / side, tmp_path / side)
    changed(tmp_path / file, **changes)
    tiny.write_settings(tmp_path / "run.yaml", tiny.run_settings(tmp_path, tmp_path / "run"))
    train = run_gold(monkeypatch, capfd, "train", tmp_path / "run.yaml")
    assert (train.code, told in train.out + train.err) == (1, True)
    assert ("would be loaded" in train.err) == ("exceed" in told)
    assert told in run_gold(monkeypatch, capfd, "doctor", tmp_path / "run.yaml").out
