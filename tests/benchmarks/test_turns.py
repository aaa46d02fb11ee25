import json
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import turns
from benchmarks.claims.cells import Cells
from benchmarks.orders import PRICES, Orders, Played, failing, mended_turns, right_texts, right_turns
from gold.environments.calling import Caller
from gold.turns import read_turn

TASK = Orders()
CALLER = Caller(10.0)
PROMPT = TASK.prompts("train", 1, 0)[0]
RIGHT = right_texts(*PROMPT.reference, PRICES[PROMPT.reference[1]])


def answers(*texts, task=TASK):
    """What a conversation of these turns has for messages after each."""
    played, found = Played(PROMPT, task, CALLER), []
    for text in texts:
        before = len(played.seen.messages) + 1
        played.play(text)
        found.append([m["content"] for m in played.seen.messages[before:]])
    return found, played.seen


def test_no_item_is_in_both_splits():
    train, heldout = (
        {p.reference[1] for seed in (0, 1) for p in TASK.prompts(split, 200, seed)}
        for split in ("train", "heldout")
    )
    assert not train & heldout
    assert train | heldout <= PRICES.keys()


def test_a_failed_call_has_an_error_or_ends_the_conversation():
    number, item = PROMPT.reference
    found, seen = answers(*RIGHT)
    assert found == [[str(PRICES[item])], [str(number * PRICES[item])], []]
    for ended, score in (("done", 1.0), ("max_turns", 0.0)):
        seen.ended = ended
        assert TASK.score(seen) == score
    unread = RIGHT[0].replace("}}", "}")
    ((error,), _), _ = answers(unread, RIGHT[0])
    assert error.startswith("error: ")
    ((nothing), _), _ = answers(unread, RIGHT[0], task=Orders(repairs=False))
    assert nothing == []
    _, seen = answers(*RIGHT[1:])  # right without having asked
    seen.ended = "done"
    assert TASK.score(seen) == 0.0


@given(st.integers(0, 10**6), st.integers(0, 1))
@settings(max_examples=80, deadline=None)
def test_calls_that_are_made_to_fail_do(seed, place):
    ((error,),), _ = answers(failing(RIGHT[place], np.random.default_rng(seed)))
    assert error.startswith("error: ")


def test_completions_are_what_is_right_after_any_mistake():
    found = mended_turns(TASK.prompts("train", 60, 1), 0)
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
            assert dict(calls[0].arguments) == {"item": item}
            assert not results
        else:
            assert ("price", calls[0].arguments["a"]) == results[-1]
            assert calls[0].arguments["b"] == number


def test_without_mistakes_each_conversation_has_three_turns():
    prompts = TASK.prompts("train", 5, 2)
    texts = [text for p in prompts for text in right_texts(*p.reference, PRICES[p.reference[1]])]
    assert [turn.completion for turn in right_turns(prompts)] == texts


@pytest.mark.slow
def test_the_experiment_on_tiny_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        turns, "WAYS", {n: turns.Way(way.imitated, ((1e-3, 4), (2e-3, 4))) for n, way in turns.WAYS.items()}
    )
    # A teacher of two steps ends none of its turns.
    monkeypatch.setattr(turns, "imitated", lambda teacher, task, prompts, seed, samples: right_turns(prompts))
    sizes = turns.Sizes(batch=2, heldout=4, samples=1, known=6, teacher_steps=2, start_known=4, start_steps=2)
    data = turns.experiment(Cells(tmp_path, 0), list(turns.WAYS), [2, 8], 2, sizes)
    assert {row["way"] for row in data["rows"]} == set(turns.WAYS)
    assert len(data["tried"]) == 2 * len(turns.WAYS)
    assert {t["seed"] for t in data["tried"]} == {turns.TUNING_SEED}
    assert {t["prompts"] for t in data["tried"]} == {2}
    assert all(len(row["right"]["seeds"]) == 2 for row in data["rows"])
    assert {(row["prompts"], row["steps"]) for row in data["rows"]} == {(2, 4), (8, 8)}
    json.dumps(data)
    assert "imitation, then distilled" in turns.table(data)


def test_distillation_is_ahead_only_if_it_is():
    row = partial(dict, prompts=5)
    rows = [row(way=turns.DISTILLED, right={"mean": 0.8}), row(way=turns.IMITATION, right={"mean": 0.7})]
    assert turns.ahead(rows, 5)
    rows.append(row(way=turns.LONGER, right={"mean": 0.8}))
    assert not turns.ahead(rows, 5)
    rows.append(row(way=turns.BOTH, right={"mean": 0.9}))
    assert turns.ahead(rows, 5)
