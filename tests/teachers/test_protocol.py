"""The defaults of the Teacher protocol, and teachers that read prompts in their own way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch

from gold import CachedTeacher, DataError, LocalTeacher, Prompt, Recipe, SelfTeacher, ServedTeacher, Teachers
from gold.evaluate import EvaluationPlan, evaluate
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.teachers import Teacher
from gold.tokenize.chat import prompt_text
from gold.train.loop import distill
from gold.train.preflight import readers_of

RECIPE = Recipe(steps=2, prompts_per_step=2, num_generations=1, max_new_tokens=6)


class Hinted(LocalTeacher):
    def adapt_prompt(self, prompt: Prompt) -> Prompt:
        return replace(prompt.for_teacher, text=f"{prompt.reference} ={prompt.text}")


class Flat(Teacher):
    """A test double: every token is as likely as every other."""

    gives = "rows"

    def __init__(self) -> None:
        self.name, self.device = "flat", torch.device("cpu")
        self.vocabulary = tiny.tiny_teacher().vocabulary

    def score(self, prompts: Any, tokenized_texts: Any, stopped: Any) -> list[LazyLogits]:
        sizes = [text.ids.size + bool(stop) for text, stop in zip(tokenized_texts, stopped, strict=True)]
        return [GivenLogits(torch.zeros(size, self.vocabulary.size)) for size in sizes]


def test_a_teacher_that_only_scores_trains_and_is_evaluated() -> None:
    run = distill(tiny.tiny_student(), Flat(), tiny.prompts(4), RECIPE, heldout=tiny.heldout(2))
    assert run.steps[-1]["applied"]
    measures = run.evaluations[-1]
    assert "reverse_kl_per_byte" in measures
    assert "forward_kl_per_byte" not in measures
    flat = Flat()
    assert (flat.retries, flat.state(), flat.misfit(tiny.prompts(1)[0], 10**9)) == (None, None, "")
    assert len(readers_of(tiny.tiny_student(), Teachers({"teacher": flat}))) == 1


def test_an_adapted_prompt_is_what_is_read_checked_and_sampled_from(tmp_path: Path) -> None:
    model = tiny.tiny_teacher()
    plain, hinted = LocalTeacher(model), Hinted(model)
    told = [replace(p, teacher_context=f"{p.reference} =") for p in tiny.prompts(3)]
    text = [model.vocabulary.encode("12")] * 3
    for teacher, prompts in ((plain, told), (hinted, tiny.prompts(3))):
        assert teacher.prompt_ids(prompts[0]) == model.tokenizer.encode(prompt_text(told[0].for_teacher))
    one, other = (
        teacher.score(prompts, text, [True] * 3)
        for teacher, prompts in ((plain, told), (hinted, tiny.prompts(3)))
    )
    assert all(torch.equal(a.logits(), b.logits()) for a, b in zip(one, other, strict=True))
    # A cache keeps scores under the prompt that was read.
    CachedTeacher(hinted, tmp_path).score(tiny.prompts(3), text, [True] * 3)
    assert CachedTeacher(plain, tmp_path).missing(told, text, [True] * 3) == []
    assert len(CachedTeacher(plain, tmp_path).missing(tiny.prompts(3), text, [True] * 3)) == 3
    plan = EvaluationPlan(max_new_tokens=6)
    measures = [
        evaluate(tiny.tiny_student(), teacher, prompts, plan=plan).measures
        for teacher, prompts in ((plain, told), (hinted, tiny.prompts(3)))
    ]
    assert "forward_kl_per_byte" in measures[0]
    assert measures[0] == measures[1]


def test_an_adapted_prompt_is_checked_before_the_run() -> None:
    prompts = [replace(tiny.prompts(1)[0], reference=" 1" * 200)]
    with pytest.raises(DataError, match="128 tokens"):
        distill(tiny.tiny_student(), Hinted(tiny.tiny_teacher()), prompts, RECIPE)


def test_a_served_teacher_sends_the_adapted_prompt(tmp_path: Path) -> None:
    class Informed(ServedTeacher):
        adapt_prompt = Hinted.adapt_prompt

    model = tiny.tiny_teacher()
    model.tokenizer.save_pretrained(tmp_path)
    served = Informed(tmp_path, url="http://127.0.0.1:1/v1", model="m")
    prompt = tiny.prompts(1)[0]
    request = served.request(prompt, [5], False)
    assert list(request.ids[: request.start]) == Hinted(model).prompt_ids(prompt)


def test_only_a_frozen_copy_of_the_same_weights_stands_for_the_reference() -> None:
    student = tiny.tiny_student()
    frozen = SelfTeacher(student)
    teachers = Teachers(
        {"other": tiny.tiny_teacher(), "average": SelfTeacher(student, 0.9), "frozen": frozen}
    )
    assert teachers.frozen_copy(student.lm) is frozen.model.lm
    assert Teachers({"flat": Flat(), "student": LocalTeacher(student)}).frozen_copy(student.lm) is None
