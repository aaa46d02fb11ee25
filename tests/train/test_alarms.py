"""Alarms about a run that goes wrong slowly."""

import pytest

from gold.train.alarms import WINDOW, Drift, repetition


def told(**series: list[float]) -> list[tuple[int, str]]:
    """Steps and kinds of what the alarms say about a run."""
    alarms = Drift()
    found = []
    for step, values in enumerate(zip(*series.values(), strict=True)):
        record = {"step": step, **dict(zip(series, values, strict=True))}
        found += [(step, kind) for kind in alarms.check(record)]
    return found


@pytest.mark.parametrize(
    "name", ["length_bytes", "repetition", "sampled_entropy", "canonical_share", "teacher_unresolved_mass"]
)
def test_a_steady_run_is_not_disturbed(name):
    assert told(**{name: [0.9, 1.1] * 20}) == []


def test_lengths_that_run_away_or_collapse():
    assert told(length_bytes=[50.0] * WINDOW + [200.0] * WINDOW)[0] == (2 * WINDOW - 2, "length")
    assert told(length_bytes=[90.0] * WINDOW + [5.0] * WINDOW)[0][1] == "length"
    assert told(length_bytes=[0.0] * 20) == []


def test_repetition_that_was_not_there_at_the_start():
    assert told(repetition=[0.1] * WINDOW + [0.9] * WINDOW)[0][1] == "repetition"
    assert told(repetition=[0.6] * WINDOW + [0.9] * WINDOW) == []


def test_entropy_that_is_lost():
    assert told(sampled_entropy=[1.2] * WINDOW + [0.05] * WINDOW)[0] == (2 * WINDOW - 1, "entropy")
    assert told(sampled_entropy=[1.2] * WINDOW + [0.4] * 20) == []
    assert told(sampled_entropy=[0.0] * 20) == []  # greedy


def test_segmentations_that_drift():
    assert told(canonical_share=[0.99] * WINDOW + [0.7] * WINDOW)[0][1] == "canonical"


def test_texts_that_the_teacher_does_not_resolve():
    assert told(teacher_unresolved_mass=[0.04] * WINDOW + [0.3] * WINDOW)[0][1] == "unresolved"
    assert told(teacher_unresolved_mass=[0.01] * WINDOW + [0.08] * WINDOW) == []
    assert told(teacher_unresolved_mass=[0.4] * WINDOW + [0.6] * WINDOW) == []


def test_repetition_is_a_share_of_stretches():
    assert repetition(b"") == repetition(b"short") == repetition(bytes(range(100))) == 0.0
    assert repetition(b"a" * 100) == pytest.approx(1 - 1 / 93)
    assert 0.8 < repetition(b"0123456789" * 12) < 1
