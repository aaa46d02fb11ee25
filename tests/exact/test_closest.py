"""The closest completions of two partly known distributions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gold.exact.closest import closest_completions, kl


@st.composite
def known_parts(draw):
    """Two distributions, and the part of each that is known; events with probability 0, and nothing or all known."""
    size = draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sides = []
    for _ in range(2):
        whole = rng.dirichlet(np.full(size, 0.6))
        whole[rng.random(size) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
        whole = whole / whole.sum() if whole.sum() > 0 else np.full(size, 1 / size)
        share = draw(st.sampled_from([0.0, 0.5, 1.0]))
        known = np.where(rng.random(size) < share, 1.0, rng.random(size))
        sides.append((whole, whole * (known if share < 1.0 else 1.0)))
    return sides


@given(known_parts())
def test_closest_completions_are_completions_and_no_pair_is_closer(sides):
    (p, a), (q, b) = sides
    found_p, found_q = closest_completions(a[None], b[None])
    for found, known in ((found_p, a), (found_q, b)):
        assert found.sum() == pytest.approx(1.0, abs=1e-9)
        assert (found >= known - 1e-12).all()
    least = kl(found_p, found_q)[0]
    assert least >= -1e-12
    assert least <= kl(p[None], q[None])[0] + 1e-9
    assert kl(found_q, found_p)[0] <= kl(q[None], p[None])[0] + 1e-9
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 10.0):
        more = rng.dirichlet(np.full(a.size, spread), (2, 200))
        some_p, some_q = (x + max(0.0, 1.0 - x.sum()) * m for x, m in zip((a, b), more, strict=True))
        assert least <= kl(some_p, some_q).min() + 1e-9


def test_the_example_on_paper():
    """Known: 0.6 of the first event and 0.1 of the second; of the other side 0.2 and 0.5. So 0.3 may be anywhere."""
    p, q = closest_completions(np.array([[0.6, 0.1, 0.0]]), np.array([[0.2, 0.5, 0.0]]))
    assert p[0] == pytest.approx([0.6, 0.4, 0.0])
    assert q[0] == pytest.approx([0.5, 0.5, 0.0])


def test_sets_that_meet_are_at_zero():
    p, q = closest_completions(np.array([[0.5, 0.1]]), np.array([[0.3, 0.4]]))
    assert p == pytest.approx(q)


def test_nothing_known_and_all_known():
    given_p = np.array([[0.25, 0.75, 0.0]])
    p, q = closest_completions(given_p, np.zeros((1, 3)))
    assert q == pytest.approx(given_p)
    p, q = closest_completions(given_p, np.array([[0.5, 0.0, 0.5]]))
    assert p == pytest.approx(given_p)
    assert kl(p, q)[0] == pytest.approx(0.25 * np.log(0.5) + 0.75 * (np.log(0.75) + 104))


def test_probabilities_near_the_smallest_numbers_meet_without_a_warning() -> None:
    a, b = np.array([[1e-300, 0.0], [0.2, 1e-308]]), np.array([[0.0, 1e-300], [1e-308, 0.2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, q = closest_completions(a, b)
    assert np.allclose(p, q)
    assert np.allclose(p.sum(-1), 1.0)
    assert (p >= a).all()
    assert (p >= b).all()
