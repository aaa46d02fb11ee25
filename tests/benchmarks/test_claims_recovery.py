from collections import Counter
from dataclasses import replace

import hypothesis.extra.numpy as arrays
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.claims import facts, recovery
from benchmarks.claims.knowledge import KNOWLEDGE, SKILL, Facts, mean_curve, whole_numbers
from gold.losses import OBJECTIVES, forward_kl, reverse_kl

ROWS = arrays.arrays("float64", (2, 5), elements=st.floats(-12, 12))


def test_facts_are_different_for_each_seed_and_the_same_in_every_form():
    one, again, other = (Facts(50, seed).prompts() for seed in (1, 1, 2))
    assert one == again
    assert len({p.text for p in one}) == 50
    assert not {p.text for p in one} & {p.text for p in other}
    told = Facts(50, 1).prompts(" tell {}", slice(10, None))
    assert [p.reference for p in told] == [p.reference for p in one[10:]]
    assert told[0].text == " tell" + one[10].text.removesuffix(" is")


@pytest.mark.parametrize(("rehearsed", "asked"), [(0.0, 1.0), (0.25, 1.0), (0.5, 0.25)])
def test_that_share_of_the_prompts_asks_for_facts_each_as_often_as_any_other(rehearsed, asked):
    sizes = replace(recovery.Sizes(), prompts=120, facts=20)
    way = recovery.Way("", rehearsed=rehearsed, asked=asked)
    found = recovery.prompts_of(way, whole_numbers(0), sizes, seed=0)
    routes = Counter(p.route for p in found)
    assert routes[SKILL] == 120
    assert routes[KNOWLEDGE] == pytest.approx(rehearsed * len(found), abs=1)
    times = Counter(p.text for p in found if p.route == KNOWLEDGE)
    assert len(times) == (20 * asked if rehearsed else 0)
    assert not times or max(times.values()) - min(times.values()) <= 1
    assert all(p.completion is None for p in found)


def test_an_average_of_weights_lies_between_them():
    one, other = whole_numbers(0), whole_numbers(1)
    first, second = (next(m.lm.parameters()).detach().clone() for m in (one, other))
    torch.testing.assert_close(
        next(recovery.averaged(one, other, 0.25).lm.parameters()).data, first / 4 + second * 3 / 4
    )


def test_a_curve_is_the_mean_of_curves_at_each_point():
    curves = [
        [{"step": 0, "skill": 0.0}, {"step": 5, "skill": 0.5}],
        [{"step": 0, "skill": 1.0}, {"step": 5, "skill": 1.0}],
    ]
    assert mean_curve(curves) == [{"step": 0, "skill": 0.5}, {"step": 5, "skill": 0.75}]


@given(ROWS, ROWS)
def test_the_steeper_divergence_is_between_either_kl_and_their_sum(logits, others):
    logp, logq = (torch.tensor(x).log_softmax(-1) for x in (logits, others))
    found = facts.steeper_kl(logp, logq)
    forward, reverse = forward_kl(logp, logq), reverse_kl(logp, logq)
    assert (found >= torch.maximum(forward, reverse) - 1e-9).all()
    assert (found <= forward + reverse + 1e-9).all()
    p, q = logp.exp(), logq.exp()
    naive = torch.where(q > p, q * (logq - logp) + p - q, p * (logp - logq) + q - p).sum(-1)
    torch.testing.assert_close(found, naive)


@given(st.floats(0.01, 20), st.floats(0.01, 20), st.floats(0, 1))
def test_the_steeper_divergence_is_an_f_divergence(s, t, share):
    def f(x):
        # Two events of teacher mass ½ each, student mass x/2 and 0: the second adds f(0)/2, the same for every x.
        logq = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
        logp = torch.tensor([[x / 2, 1e-30]], dtype=torch.float64).log()
        return float(facts.steeper_kl(logp, logq))

    between = share * s + (1 - share) * t
    assert f(between) <= share * f(s) + (1 - share) * f(t) + 1e-9


def test_the_steeper_divergence_has_no_gradient_where_both_agree_and_no_nan_where_neither_has_mass():
    logits = torch.tensor([[0.3, -1.0, 2.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    logq = logits.detach().log_softmax(-1)
    value = facts.steeper_kl(logits.log_softmax(-1), logq).sum()
    value.backward()
    assert value.item() == 0.0
    assert float(logits.grad.abs().max()) < 1e-12


@pytest.mark.slow
def test_the_small_form_of_the_recovery_runs(tmp_path):
    sizes = recovery.SMALL
    made = recovery.make(recovery.Making(0, sizes), tmp_path)
    assert [p["step"] for p in made["curve"]] == [0, 1, 2, 3, 4]
    way = recovery.Way("", rehearsed=0.5, asked=0.5)
    found = recovery.run(recovery.Job(way, 1e-3, 0, sizes), tmp_path)
    assert [p["step"] for p in found["curve"]] == [0, 1, 2]
    assert set(found["curve"][-1]) == {"step", SKILL, KNOWLEDGE, "not asked"}


@pytest.mark.slow
def test_the_small_form_of_the_facts_runs(tmp_path):
    sizes = facts.SMALL
    for seed in (None, 0):
        facts.make(facts.Making(seed, sizes), tmp_path)
    known = set(OBJECTIVES)
    found = facts.run(facts.Job(facts.SMALL_WAYS[0], 1e-3, 0, sizes), tmp_path)
    assert set(OBJECTIVES) == known
    assert [p["step"] for p in found["curve"]] == [0, 1, 2]
