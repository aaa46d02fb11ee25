import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import turns
from benchmarks.orders import Orders
from benchmarks.record import RESULTS
from benchmarks.shop import PRICES, Played, mended_turns, right_turns
from benchmarks.stores import STORES, Stores
from gold.environments.calling import Caller
from gold.turns import read_turn

CALLER = Caller(10.0)
PAGE = RESULTS.parents[1] / "docs" / "conversations.md"
SHOPS = [Orders(), Stores()]
shops = pytest.mark.parametrize("task", SHOPS, ids=lambda task: task.name)


def first(task):
    """A prompt, and its right turns."""
    prompt = task.prompts("train", 1, 0)[0]
    number, item = prompt.reference
    return prompt, task.texts(number, item, PRICES[item])


def answers(task, *texts):
    """What a conversation of these turns has for messages after each."""
    played, found = Played(first(task)[0], task, CALLER), []
    for text in texts:
        before = len(played.seen.messages) + 1
        played.play(text)
        found.append([m["content"] for m in played.seen.messages[before:]])
    return found, played.seen


def ended(task, *texts, how="done"):
    """The score of a conversation of these turns that has ended so."""
    _, seen = answers(task, *texts)
    seen.ended = how
    return task.score(seen)


@shops
def test_no_item_is_in_both_splits(task):
    train, heldout = (
        {p.reference[1] for seed in (0, 1) for p in task.prompts(split, 200, seed)}
        for split in ("train", "heldout")
    )
    assert not train & heldout
    assert train | heldout <= set(task.items)


@shops
def test_a_failed_call_has_an_error_or_ends_the_conversation(task):
    prompt, right = first(task)
    number, item = prompt.reference
    found, _ = answers(task, *right)
    assert found == [[str(PRICES[item])], [str(number * PRICES[item])], []]
    assert ended(task, *right) == 1.0
    assert ended(task, *right, how="max_turns") == 0.0
    assert ended(task, *right[1:]) == 0.0  # right without having asked
    assert ended(task, *right[:2], "1") == 0.0
    unread = right[0].replace("}}", "}")
    ((error,), _), _ = answers(task, unread, right[0])
    assert error.startswith("error: ")
    ((nothing), _), _ = answers(type(task)(repairs=False), unread, right[0])
    assert nothing == []


def test_another_store_is_told_and_can_be_repaired():
    task = Stores()
    prompt, right = first(task)
    _, item = prompt.reference
    for store in range(1, 10):
        if store != STORES[item]:
            wrong = right[0].replace(f'"store": {STORES[item]}', f'"store": {store}')
            (error,), (told,) = answers(task, wrong, right[0])[0]
            assert error.endswith(f"it is in store {STORES[item]}")
            assert told == str(PRICES[item])
            assert ended(task, wrong, *right) == 1.0
            assert ended(task, wrong, *right[1:]) == 0.0


def test_a_guess_is_right_for_half_of_the_items():
    for split in ("train", "heldout"):
        found = [STORES[p.reference[1]] for p in Stores().prompts(split, 256, 0)]
        assert 0.4 < found.count(1) / 256 < 0.6
        assert set(found) == set(range(1, 10))


def test_a_teacher_learns_the_stores_of_all_items():
    assert {p.reference[1] for p in Stores().known(3000, 1)} == set(STORES)


@given(st.integers(0, 10**6), st.integers(0, 1), st.sampled_from(SHOPS))
@settings(max_examples=120, deadline=None)
def test_calls_that_are_made_to_fail_do(seed, place, task):
    failing = task.failing(first(task)[1][place], np.random.default_rng(seed))
    ((error,),), _ = answers(task, failing)
    assert error.startswith("error: ")


@shops
def test_completions_are_what_is_right_after_any_mistake(task):
    found = mended_turns(task, task.prompts("train", 60, 1), 0)
    assert any(turn.begun for turn in found)
    assert any(turn.messages[-1]["content"].startswith("error") for turn in found)
    for turn in found:
        if turn.begun is not None:  # what follows a wrong digit
            continue
        number, item = turn.reference
        results = [
            (m["tool_calls"][0]["function"]["name"], int(after["content"]))
            for m, after in zip(turn.messages, turn.messages[1:], strict=False)
            if m.get("tool_calls") and after["content"].isdigit()
        ]
        calls = read_turn(turn.completion.encode()).calls
        if not calls:
            assert ("multiply", int(turn.completion)) == results[-1]
        elif calls[0].name == "price":
            assert dict(calls[0].arguments) == task.asked_with(item)
            assert not results
        else:
            assert ("price", calls[0].arguments["a"]) == results[-1]
            assert calls[0].arguments["b"] == number


@shops
def test_without_mistakes_each_conversation_has_three_turns(task):
    prompts = task.prompts("train", 5, 2)
    texts = [text for p in prompts for text in task.texts(*p.reference, PRICES[p.reference[1]])]
    assert [turn.completion for turn in right_turns(task, prompts)] == texts


def test_of_noisy_conversations_the_right_ones_are_imitated_without_calls_that_fail():
    def drawn(score, *pairs):
        """A conversation of turns, each with the message before it."""
        rollouts = [
            SimpleNamespace(
                prompt=replace(first(Stores())[0], messages=({"role": "tool", "content": before},)),
                text=text,
                stopped=True,
                turn=SimpleNamespace(number=number),
            )
            for number, (before, text) in enumerate(pairs)
        ]
        return SimpleNamespace(score=score, rollouts=rollouts)

    repaired = drawn(1.0, ("36 of 4729", "wrong"), ("error: it is in store 3", "again"), ("52", "end"))
    lost = drawn(0.0, ("36 of 4729", "a"), ("52", "b"))
    assert [p.completion for p in turns.imitated([repaired, lost])] == ["wrong", "again", "end", "a", "b"]
    assert [p.completion for p in turns.imitated([repaired, lost], right_alone=True)] == ["again", "end"]


@pytest.mark.slow
@pytest.mark.parametrize("name", turns.TASKS)
def test_the_command_on_tiny_sizes(name, tmp_path, monkeypatch):
    # A teacher of two steps ends none of its turns.
    task = turns.TASKS[name]
    prompts = task.environment().prompts("train", 2, 0)
    given = right_turns(task.environment(), prompts)
    monkeypatch.setattr(turns, "imitated", lambda drawn, right_alone=False: given)
    sizes = turns.Sizes(batch=2, heldout=4, samples=1, known=6, teacher_steps=2, start_known=4, start_steps=2)
    ways = {n: replace(way, tried=((1e-3, 4), (2e-3, 4))) for n, way in task.ways.items()}
    monkeypatch.setitem(turns.TASKS, name, replace(task, sizes=sizes, ways=ways))
    where = ["--folder", str(tmp_path / "cells"), "--into", str(tmp_path), "--workers", "0"]
    turns.main(["--task", name, "--prompts", "2", "8", "--seeds", "2", *where])
    data = json.loads((tmp_path / f"{turns.record_name(name)}.json").read_text())["data"]
    assert {row["way"] for row in data["rows"]} == set(task.ways)
    assert len(data["tried"]) == 2 * len(task.ways)
    assert {t["seed"] for t in data["tried"]} == {turns.TUNING_SEED}
    assert {t["prompts"] for t in data["tried"]} == {2}
    assert all(len(row["right"]["seeds"]) == 2 for row in data["rows"])
    assert {(row["prompts"], row["steps"]) for row in data["rows"]} == {(2, 4), (8, 8)}
    for row in data["rows"]:
        assert all(told is None or len(told) == 4 for told in row["told"])
        assert all((told is None) == (ways[row["way"]].imitated == 1.0) for told in row["told"])


def test_distillation_is_ahead_only_if_it_is():
    row = partial(dict, prompts=5)
    rows = [row(way=turns.DISTILLED, right={"mean": 0.8}), row(way=turns.IMITATION, right={"mean": 0.7})]
    assert turns.ahead(rows, 5)
    rows.append(row(way=turns.LONGER, right={"mean": 0.8}))
    assert not turns.ahead(rows, 5)
    rows.append(row(way=turns.BOTH, right={"mean": 0.9}))
    assert turns.ahead(rows, 5)


@pytest.mark.parametrize("name", turns.TASKS)
def test_the_page_has_the_table_of_the_record(name):
    record = json.loads((RESULTS / f"{turns.record_name(name)}.json").read_text(encoding="utf-8"))
    assert turns.table(record["data"]) in PAGE.read_text(encoding="utf-8")
