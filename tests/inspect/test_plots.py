"""Pictures of a run: every measure has its panel, gaps are gaps, nothing global is touched."""

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gold.errors import CheckpointError, ConfigError
from gold.inspect.plots import _panels, plot_run
from gold.inspect.series import running_mean, words
from gold.train.run_folder import RunFolder

VALUES = st.none() | st.integers(-9, 9) | st.floats(width=32) | st.booleans() | st.just("text")
NAMES = st.sampled_from(
    ["loss", "accuracy", "accuracy_low", "accuracy_high", "x_per_byte", "lr", "evaluate_s"]
)
RECORDS = st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=6)


@settings(deadline=None)
@given(RECORDS, RECORDS)
def test_panels_hold_every_measure_once_and_only_what_was_measured(evals, trains):
    evals, trains = ([{**r, "step": s, "kind": "k"} for s, r in enumerate(rs)] for rs in (evals, trains))
    panels = _panels(evals, trains)
    assert len({(panel.title, panel.held_out) for panel in panels}) == len(panels)
    for panel in panels:
        assert any(math.isfinite(value) for value in panel.values)
        assert panel.steps == sorted(set(panel.steps))
    held_out = {panel.title for panel in panels if panel.held_out}
    for record in evals:
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                assert (
                    name in ("step", "evaluate_s", "accuracy_low", "accuracy_high")
                    or words(name)[0] in held_out
                )


@given(st.lists(st.floats(-1, 1) | st.just(math.nan), max_size=30), st.integers(1, 40))
def test_a_running_mean_stays_within_its_values(values, width):
    means = running_mean(values, width)
    assert len(means) == len(values)
    for mean in means:
        assert math.isnan(mean) or -1.0 - 1e-9 <= mean <= 1.0 + 1e-9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("accuracy", ("accuracy", "")),
        ("reverse_kl_per_byte", ("reverse KL", "nats per byte")),
        ("gap_nats_per_byte", ("gap", "nats per byte")),
        ("bits_per_byte", ("bits per byte", "")),
        ("length_tokens", ("length", "tokens")),
        ("tokens_per_s", ("speed", "tokens/s")),
        ("peak_mib", ("peak", "MiB")),
    ],
)
def test_names_become_words_and_units(name, said):
    assert words(name) == said


def a_run(folder, steps=60):
    with RunFolder.create(folder, {"a": 1}) as run:
        for step in range(1, steps + 1):
            loss = float("nan") if step == 7 else 1.0 / step
            run.log(
                "train", {"step": step, "loss": loss, "length_tokens": 12.0, "tokens_per_s": 9e5, "lr": 1.0}
            )
            if step % 20 == 0:
                band = {"accuracy_low": 0.4, "accuracy_high": 0.6}
                run.log("eval", {"step": step, "accuracy": 0.5, **band, "reverse_kl_per_byte": 1 / step})
    return folder


def test_a_run_is_drawn(tmp_path):
    (path,) = plot_run(a_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "plots" / "learning.png"
    assert [entry.name for entry in path.parent.iterdir()] == ["learning.png"]
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[:2] == (825, 2100)
    assert picture.std() > 0.02
    before = path.read_bytes()
    assert plot_run(tmp_path / "run")[0].read_bytes() == before  # nothing of the clock is in it


def test_the_panels_are_those_of_the_run(tmp_path):
    run = RunFolder.open(a_run(tmp_path / "run"))
    panels = _panels(run.records("eval"), run.records("train"))
    assert [(panel.title, panel.unit, panel.held_out) for panel in panels] == [
        ("accuracy", "", True),
        ("reverse KL", "nats per byte", True),
        ("loss", "", False),
        ("completion length", "tokens", False),
        ("speed", "tokens/s", False),
    ]
    assert panels[0].band == ([0.4] * 3, [0.6] * 3)
    assert math.isnan(panels[2].values[6])


def test_one_training_step_is_enough_and_a_run_without_metrics_is_an_error(tmp_path):
    RunFolder.create(tmp_path / "run", {}).close()
    with pytest.raises(CheckpointError, match="run has no metrics yet; let it run a step, then plot"):
        plot_run(tmp_path / "run")
    assert plot_run(a_run(tmp_path / "short", steps=1))
    with pytest.raises(CheckpointError, match="holds no run"):
        plot_run(tmp_path)


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    run = a_run(tmp_path / "run", steps=1)
    (run / "plots").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*learning\.png: File exists"):
        plot_run(run)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"plots need matplotlib: pip install 'gold-distill\[plots\]'"):
        plot_run(tmp_path)


def test_nothing_global_is_touched(tmp_path):
    run = a_run(tmp_path / "run", steps=1)
    code = f"""
import sys
import gold.inspect.plots
assert "matplotlib" not in sys.modules
gold.inspect.plots.plot_run({str(run)!r})
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
