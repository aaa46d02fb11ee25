"""Completions that a teacher cannot read behind their prompts: left out of a step, an evaluation, a cache; counted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from support.processes import Command
from support.server import ModelServer
from support.trackers import Recorder

from gold.cache.store import ScoreCache
from gold.data import Prompt
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.language_model import LanguageModel
from gold.teachers import CachedTeacher, LocalTeacher, ServedTeacher, Teachers
from gold.teachers.absent import AbsentTeacher
from gold.teachers.cached import record
from gold.teachers.protocol import Teacher
from gold.train.loop import Run, distill
from gold.train.recipe import Recipe, Term
from tests.train.test_processes import assert_near, launch

ROOM = 20
"""Tokens of the teacher, which reads characters."""
SHORT = [p for p in tiny.prompts() if len(f"{p.text}{p.completion}") + 1 <= ROOM][:3]
LONG = [p for p in tiny.prompts() if len(f"{p.text}{p.completion}") + 1 > ROOM][:3]
RECIPE = Recipe(
    steps=1,
    num_generations=2,
    on_policy=0.0,
    micro_batch_size=2,
    generation_batch_size=8,
    lr=3e-3,
    warmup_steps=0,
    max_grad_norm=1e9,
    max_new_tokens=30,
)


def with_context(model: LanguageModel, tokens: int = ROOM) -> LanguageModel:
    model.lm.config.max_position_embeddings = tokens
    return model


def narrow() -> LanguageModel:
    return with_context(tiny.tiny_teacher())


def run(teacher: Any, prompts: list[Prompt], *, heldout: list[Prompt] | None = None, **changes: Any) -> Run:
    options = {name: changes.pop(name) for name in ("progress", "verifier") if name in changes}
    recipe = RECIPE.replace(prompts_per_step=len(prompts), **changes)
    options.setdefault("progress", Recorder())
    return distill(tiny.tiny_student(), teacher, prompts, recipe, heldout=heldout or [], **options)


def weights(done: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in done.student.lm.parameters()])


def assert_same_step(found: Run, expected: Run, unread: int) -> None:
    mine, theirs = found.steps[0], expected.steps[0]
    assert mine["skipped_sequences"] == unread
    assert theirs["skipped_sequences"] == 0
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-3, atol=1e-4)


def test_there_are_texts_of_both_kinds() -> None:
    assert len(SHORT) == len(LONG) == 3


@pytest.mark.parametrize(
    "term",
    [
        *(Term(name) for name in ("reverse_kl", "alm")),
        Term("forward_kl", support="shared"),
        Term("sft"),
    ],
    ids=lambda term: term.name,
)
def test_what_the_teacher_cannot_read_is_as_if_it_were_not_there(term: Term) -> None:
    terms = (term,) if term.name != "sft" else (Term("reverse_kl"), term)
    every = [LONG[0], SHORT[0], LONG[1], SHORT[1], SHORT[2]]
    assert_same_step(
        run(narrow(), every, objectives=terms), run(tiny.tiny_teacher(), SHORT, objectives=terms), 2
    )


def test_what_the_student_writes_too_long_is_left_out() -> None:
    """The student's own completions, some of which its teacher has no room for."""
    notes = Recorder()
    room = max(len(p.text or "") for p in SHORT) + 25
    changes: dict[str, Any] = {"on_policy": 1.0, "steps": 6, "max_new_tokens": 12}
    teacher = LocalTeacher(with_context(tiny.tiny_teacher(), room))
    sent: list[int] = []
    score = teacher.score

    def scored(prompts: Any, tokenized_texts: Any, stopped: Any) -> Any:
        sent.extend(
            len(teacher.prompt_ids(p)) + s.ids.size for p, s in zip(prompts, tokenized_texts, strict=True)
        )
        return score(prompts, tokenized_texts, stopped)

    teacher.score = scored  # type: ignore[method-assign]
    done = run(teacher, SHORT, progress=notes, **changes)
    unread = [record["skipped_sequences"] for record in done.steps]
    assert 0 < sum(unread) < 6 * 6
    assert len(sent) == 6 * 6 - sum(unread)
    assert max(sent) <= room
    assert [r["applied"] for r in done.steps] == [n < 6 for n in unread]
    (told,) = [note for note in notes.notes if "do not fit a model" in note]
    assert "max_new_tokens" in told


def test_of_very_many_prompts_one_that_the_student_cannot_read_ends_no_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gold.data.prompts.MOST_EXAMINED", 0)
    monkeypatch.setattr("gold.data.prompts.LONGEST_EXAMINED", 1)
    both = {p.key: replace(p, completion=None) for p in SHORT}
    # The longest by its letters is looked at, and is not the longest in tokens.
    hard, easy = Prompt("hard", text=" 5" * 70), Prompt("easy", text=" 11 +1" * 25)
    student, notes = tiny.tiny_student(), Recorder()
    assert len(student.prompt_ids(easy)) + 8 <= 128 < len(student.prompt_ids(hard)) + 8
    recipe = RECIPE.replace(prompts_per_step=5, on_policy=1.0, max_new_tokens=8)
    teacher = with_context(tiny.tiny_teacher(), 1024)
    done = distill(student, teacher, [*both.values(), hard, easy], recipe, progress=notes)
    assert done.steps[0]["skipped_sequences"] >= recipe.num_generations
    assert any("prompt hard" in note for note in notes.notes)


def test_a_step_of_which_nothing_is_left_changes_nothing_and_is_no_bad_one() -> None:
    notes = Recorder()
    done = run(narrow(), LONG, steps=3, bad_steps_allowed=0, progress=notes)
    assert [(r["step"], r["skipped_sequences"], r["applied"], r["bad_steps"]) for r in done.steps] == [
        (n, 3, False, 0) for n in (1, 2, 3)
    ]
    assert [r["loss"] for r in done.steps] == [0.0] * 3
    assert torch.equal(weights(done), weights(Run(tiny.tiny_student(), None)))
    assert len([note for note in notes.notes if note.startswith("step")]) == 1


def test_of_a_mix_a_text_is_left_out_where_one_teacher_cannot_read_it() -> None:
    def mixed(second: LanguageModel) -> Teachers:
        return Teachers({"a": tiny.tiny_teacher(), "b": second}, "linear")

    assert_same_step(run(mixed(narrow()), [*SHORT, *LONG]), run(mixed(tiny.tiny_teacher()), SHORT), 3)


def test_of_a_route_only_its_own_teacher_is_asked() -> None:
    def routed(prompts: list[Prompt], name: str) -> list[Prompt]:
        return [replace(p, route=name) for p in prompts]

    def two(first: LanguageModel) -> Teachers:
        return Teachers({"a": first, "b": tiny.tiny_teacher(seed=7)})

    kept = [*routed(SHORT, "a"), *routed(LONG[:1], "b")]
    assert_same_step(
        run(two(narrow()), [*kept, *routed(LONG[1:], "a")]), run(two(tiny.tiny_teacher()), kept), 2
    )


def test_an_evaluation_compares_what_both_can_read() -> None:
    plan = EvaluationPlan(max_new_tokens=8)
    both, student = [*SHORT, *LONG], tiny.tiny_student()
    found = evaluate(student, LocalTeacher(with_context(tiny.tiny_teacher(), 35)), both, plan=plan).measures
    assert 0 < found["skipped_sequences"] < 2 * len(both)
    assert found["reverse_kl_per_byte"] > 0
    alone = evaluate(student, LocalTeacher(with_context(tiny.tiny_teacher(), 2)), both, plan=plan)
    assert alone.measures["skipped_sequences"] == 2 * len(both)
    assert not {"reverse_kl_per_byte", "forward_kl_per_byte"} & alone.measures.keys()
    assert all("chunks" not in sample for sample in alone.samples)
    # What is left is compared as if nothing else had been there.
    narrow_, wide = LocalTeacher(with_context(tiny.tiny_teacher())), LocalTeacher(tiny.tiny_teacher())
    short = replace(plan, max_new_tokens=1)
    kept = [p for p in both if len(p.text or "") < ROOM - 4]
    long = Prompt("long", text=" 7 +1" * 8)
    left, whole = (
        evaluate(student, t, g, plan=short).measures for t, g in ((narrow_, [*kept, long]), (wide, kept))
    )
    assert left["skipped_sequences"] == 2
    assert "skipped_sequences" not in whole
    for name in ("reverse_kl_per_byte", "forward_kl_per_byte", "one_to_one_share"):
        assert left[name] == pytest.approx(whole[name], rel=1e-4)


def test_what_a_teacher_writes_beyond_the_students_context_is_left_out() -> None:
    plan = EvaluationPlan(max_new_tokens=8)
    room = max(len(p.text or "") for p in SHORT) + 1 + plan.max_new_tokens
    student, teacher = with_context(tiny.tiny_teacher(), room), LocalTeacher(tiny.tiny_student())
    assert evaluate(student, teacher, SHORT, plan=plan).measures["skipped_sequences"] > 0


def test_a_cache_is_built_of_what_the_teacher_can_read_and_the_run_from_it_leaves_out_the_same(
    tmp_path: Path,
) -> None:
    made = CachedTeacher(narrow_teacher := LocalTeacher(narrow()), tmp_path / "cache")
    told: list[tuple[int, int]] = []
    unread = record(made, [*SHORT, *LONG], lambda *each: told.append(each))
    made.cache.close()
    assert len(unread) == 3
    assert f"prompt {LONG[0].key}" in unread[0]
    assert told[-1][0] == 6
    assert len(ScoreCache.open(tmp_path / "cache")) == 3
    narrow_teacher.model.tokenizer.save_pretrained(tmp_path / "files")
    unasked = AbsentTeacher(tmp_path / "files", context=ROOM)
    done = run(CachedTeacher(unasked, tmp_path / "cache"), [*SHORT, *LONG], objectives=(Term("forward_kl"),))
    assert done.steps[0]["skipped_sequences"] == 3
    assert done.steps[0]["applied"]


def test_a_server_is_not_asked_for_what_its_model_cannot_read(tmp_path: Path) -> None:
    tiny.tiny_teacher().tokenizer.save_pretrained(tmp_path)
    with ModelServer(tiny.tiny_teacher()) as server:
        made: Teacher = ServedTeacher(
            tmp_path, url=server.url, model="tiny", top_k=5, retries=0, context=ROOM + 2
        )
        done = run(made, [*SHORT, *LONG], objectives=(Term("forward_kl"),))
        assert done.steps[0]["skipped_sequences"] == 3
        assert all(len(request["prompt"]) <= ROOM + 1 for request in server.requests if "prompt" in request)


@pytest.mark.slow
def test_a_process_whose_texts_are_all_left_out_keeps_in_step(tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    narrow().lm.config.save_pretrained(tmp_path / "teacher")
    # Steps of two prompts, of which each process has one.
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", [*SHORT[:2], *LONG[:2]])
    settings = tiny.run_settings(
        tmp_path,
        tmp_path / "unused",
        data={"prompts": str(prompts), "heldout": str(prompts)},
        rollout__on_policy=0.0,
        rollout__max_new_tokens=30,
        evaluate__prompts=1,
        train__prompts_per_step=2,
        train__steps=6,
    )
    path = tiny.write_settings(tmp_path / "run.yaml", settings)
    alone = Command(tmp_path / "0", "train", path, f"output={tmp_path / 'alone'}")
    assert alone.wait() == 0, alone.err
    start = partial(launch, tmp_path / "printed", "train", path)
    main, other = start(f"output={tmp_path / 'run'}")
    assert (main.wait(), other.wait()) == (0, 0), main.err + other.err
    assert_near(tmp_path / "run", tmp_path / "alone")
