"""What `benchmarks bits` calls a difference."""

import pytest

from benchmarks.bits import differences, measured


def test_a_metric_may_get_another_name_but_not_another_value():
    before = {"run": {"a": 1.0, "b": 2.0}, "align x": "12"}
    assert not differences(before, {"run": {"a": 1.0, "c": 2.0}, "align x": "12"})
    assert "a was 1.0, is 1.5" in differences(before, {**before, "run": {"a": 1.5, "b": 2.0}})[0]
    assert len(differences(before, {"run": {"a": 1.0, "c": 2.5}, "align x": "13"})) == 2
    assert len(differences(before, {"other": {}})) == 3


@pytest.mark.slow
def test_a_run_gives_the_same_bits_twice():
    once = dict(measured(0, "sft on sampled"))
    assert once == dict(measured(0, "sft on sampled"))
    assert len(once["train sft on sampled teacher text"]["weights"]) == 64
