"""The table of objectives: options by keyword, each mistake one line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from gold.align.vocabularies import VocabularyPair
from gold.cli import app
from gold.errors import ConfigError
from gold.losses import OBJECTIVES, SUPPORTS, DivergenceRow, find
from gold.train.recipe import Recipe, Term
from gold.train.setup import terms_of
from tests.contract.toys import toy_vocabulary

STUDENT = toy_vocabulary(["a+b", "b+ "], cut=None)
PAIR = VocabularyPair(STUDENT, toy_vocabulary(["b+a"]))


def refused(name: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        find(name)(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_told_in_one_line():
    assert refused("revrse_kl") == "unknown objective 'revrse_kl'; did you mean reverse_kl?"
    assert "reverse_kl, " in refused("x")
    assert refused("jsd", bta=0.5) == "bta: unknown key; did you mean beta?"
    assert refused("sft", beta=0.5) == "beta: unknown key; sft has no options"
    assert refused("jsd", beta=1.5) == "beta: must be <= 1, got 1.5"
    assert refused("jsd", beta="half").startswith("beta: expected a valid number")
    assert refused("skew_kl", alpha=-0.1) == "alpha: must be >= 0, got -0.1"
    assert refused("reverse_kl", support="byte") == (
        "support: expected " + " or ".join(("'bytes', 'prefix', 'shared'", "'tokens'")) + ", got 'byte'"
    )
    assert refused("reverse_kl", top_k=3) == "top_k: belongs to support shared, not to bytes: leave it out"
    assert (
        refused("reverse_kl", support="shared", rest="bucket") == "rest: unknown key; did you mean unshared?"
    )
    assert refused("reverse_kl", support="shared", top_k=0) == "top_k: must be >= 1, got 0"
    assert refused("span_pg", clip=float("nan")).startswith("clip: ")


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_resolved_options_give_the_same_objective(name):
    row = OBJECTIVES[name]
    options = row.resolve({})
    assert row.resolve(options) == options
    assert row(**options).options == options
    assert row.summary
    assert len(row.summary) < 220


@pytest.mark.parametrize("support", sorted(SUPPORTS))
def test_options_move_to_another_support(support):
    row = OBJECTIVES["jsd"]
    assert isinstance(row, DivergenceRow)
    moved = row.moved(
        support, {"support": "shared", "unshared": "renormalise", "half_life": 2.0, "beta": 0.1}
    )
    assert (moved["support"], moved["half_life"], moved["beta"]) == (support, 2.0, 0.1)
    assert ("unshared" in moved) == (support in ("shared", "tokens"))
    row(**moved)


def test_objectives_that_do_not_suit_the_pair():
    for term, message in (
        (Term("gkd"), "share one vocabulary"),
        (Term("reverse_kl", support="shared", top_k=99), "top_k is 99, and there are only 4 events"),
    ):
        with pytest.raises(ConfigError, match=message):
            terms_of(Recipe((term,)), None, {"": PAIR})


def test_the_command_lists_every_objective_and_option():
    shown = CliRunner().invoke(app, ["objectives"])
    assert shown.exit_code == 0
    for row in OBJECTIVES.values():
        assert f"\n{row.name}: " in f"\n{shown.stdout}"
        assert all(option in shown.stdout for option in row.arguments)
    one = CliRunner().invoke(app, ["objectives", "jsd"])
    assert "beta: number (0.5)" in one.stdout
    assert "span_pg" not in one.stdout


def test_an_option_of_a_divergence_needs_a_type():
    def renyi(logp, logq, alpha=0.5):
        return ((alpha * logp + (1 - alpha) * logq).logsumexp(-1)) / (alpha - 1)

    with pytest.raises(ConfigError, match=r"alpha: .*renyi"):
        DivergenceRow("renyi", renyi)()
    renyi.__annotations__["alpha"] = float
    assert DivergenceRow("renyi", renyi)(alpha=0.25).options["alpha"] == 0.25
