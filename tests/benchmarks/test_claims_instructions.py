"""Instructions that a program checks, and recovery on them: prompts, shares, and a whole run with a tiny model."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.claims import instructions
from benchmarks.claims.following import KINDS, SYSTEM, TOPICS, asked, followed
from benchmarks.claims.knowledge import KNOWLEDGE, SKILL

REGISTRY = "if_verifiable.ifeval.instructions_registry"
FOLLOWED = {
    "title": ("<<Rain>> It falls.", "<>> It falls."),
    "placeholder": ("It rains in [city].", "It rains in (city)."),
    "highlight": ("It *rains* today.", "It rains * today."),
    "bullets": ("* It rains.\n* It pours.", "* It rains.\n* It pours.\n* It stops."),
    "section": ("Section 1\nIt rains.", "It rains."),
}
LANGUAGES = {
    "fr": "Il pleut depuis ce matin et les rues de la ville sont vides.",
    "es": "Llueve desde esta mañana y las calles de la ciudad están vacías.",
    "de": "Es regnet seit heute Morgen und die Straßen der Stadt sind leer.",
}


@pytest.fixture
def verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instructions of one kind in the place of IFEval's: an answer must have a letter a."""

    def made(kind: str) -> Any:
        return SimpleNamespace(
            build_description=lambda **arguments: f"{kind} {arguments}",
            check_following=lambda text: "a" in text,
        )

    registry = {kind: made for variants in KINDS.values() for kind, _ in variants}
    monkeypatch.setitem(
        sys.modules, "langdetect", SimpleNamespace(DetectorFactory=SimpleNamespace(seed=None))
    )
    monkeypatch.setitem(sys.modules, REGISTRY, SimpleNamespace(INSTRUCTION_DICT=registry))


def test_an_answer_is_what_the_verifiers_say_and_an_empty_one_follows_nothing() -> None:
    pytest.importorskip("if_verifiable")
    seen = set()
    for prompt in asked("heldout"):
        name, _, arguments = prompt.reference
        seen.add(name)
        assert not followed(prompt, " \n")
        if name == "language":
            for code, text in LANGUAGES.items():
                assert followed(prompt, text) is (code == arguments["language"])
        else:
            good, bad = FOLLOWED[name]
            assert followed(prompt, good)
            assert not followed(prompt, bad)
    assert seen == set(KINDS)


def test_training_and_heldout_prompts_share_no_topic_and_every_topic_has_every_kind(verifiers: None) -> None:
    assert not set(TOPICS["train"]) & set(TOPICS["heldout"])
    for split, topics in TOPICS.items():
        assert len(set(topics)) == len(topics)
        prompts = asked(split)
        assert len({p.key for p in prompts}) == len(prompts) == len(topics) * len(KINDS)
        assert Counter(p.reference[0] for p in prompts) == dict.fromkeys(KINDS, len(topics))
        assert all(
            p.messages
            and p.messages[0]["content"] == SYSTEM
            and p.key.split(": ")[1] in p.messages[1]["content"]
            for p in prompts
        )
    arguments = [p.reference[2] for p in asked("heldout")]
    assert {each["language"] for each in arguments if "language" in each} == set(LANGUAGES)
    assert asked("heldout", 2) == asked("heldout")[: 2 * len(KINDS)]


def test_documents_tell_other_facts_for_every_seed_and_their_question_is_their_beginning() -> None:
    sizes = replace(instructions.Sizes(), facts=30)
    one, again, other = (instructions.documents(sizes, seed) for seed in (1, 1, 2))
    assert one == again
    assert len({p.text for p in one}) == 30
    assert not {p.text for p in one} & {p.text for p in other}
    for prompt in one:
        name, word = str(prompt.text).split()[3], prompt.reference.strip(" .")
        assert str(prompt.completion).startswith(prompt.reference)
        assert prompt.reference == f" {word}."
        assert str(prompt.completion).split().count(name) == 1
        assert str(prompt.completion).removeprefix(prompt.reference).split().count(word) == 1


@pytest.mark.parametrize("way", instructions.WAYS, ids=[way.name for way in instructions.WAYS])
def test_a_run_has_a_prompt_for_each_completion_and_that_share_of_them_asks_for_facts(
    verifiers: None, way: instructions.Way
) -> None:
    sizes = replace(instructions.SMALL, batch=8, facts=3)
    prompts = instructions.prompts_of(way, instructions.old_self(sizes), 2, sizes, seed=0)
    facts = [p for p in prompts if p.text is not None]
    assert len(facts) == round(16 * way.rehearsed)
    assert len({p.key for p in prompts if p.messages}) == 16 - len(facts) == len(prompts) - len(facts)
    assert all((p.completion is None) is bool(way.on_policy) for p in prompts)
    if way.on_policy:
        assert {p.route for p in facts} <= {KNOWLEDGE}
        assert {p.route for p in prompts if p.messages} == {SKILL}


@pytest.mark.parametrize(
    "way", [instructions.QUARTER, instructions.IMITATION], ids=["distilled", "imitation"]
)
def test_a_run_begins_with_the_model_that_was_made(
    verifiers: None, tmp_path: Path, way: instructions.Way
) -> None:
    sizes = replace(instructions.SMALL, fact_lr=0.03, fact_steps=30)
    made = instructions.make(instructions.Making(0, sizes), tmp_path)
    assert made["before"][KNOWLEDGE] == 0.0
    assert made["after"][KNOWLEDGE] == 1.0
    # Weights that hardly move answer as the model did when it was made.
    found = instructions.run(instructions.Job(replace(way, rate=1e-12), 0, 2, sizes), tmp_path)
    assert found.pop("cpu_s") > 0.0
    assert found == made["after"]


def test_without_the_verifiers_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, REGISTRY, None)
    assert main(["claims", "instructions", "--small", "--folder", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install if-verifiable" in line


@pytest.mark.slow
def test_the_small_form_runs(verifiers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "instructions", "--small", "--seeds", "1", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(way.name in printed for way in instructions.WAYS)
