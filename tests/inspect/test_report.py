"""The page of a run: every measure is on it once, it asks nothing of anyone, and it never ends the run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chromium import Browser, browser, missing
from support.html import Reader
from support.trackers import Recorder

from gold import Recipe, distill
from gold.errors import CheckpointError
from gold.inspect.charts import Line, line_chart, number, stacked_chart
from gold.inspect.report import RunRecords, chart_groups, report, write_report
from gold.train.loop import Saving
from gold.train.run_folder import RunFolder
from gold.train.trackers import RunInfo

EVIL = "<script>document.title = 'run'</script>\n<img src=x onerror=alert(1)> </script><!-- & \"' <eos>"
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def chunk(text: str | None, student: float, teacher: float, **more: Any) -> dict[str, Any]:
    return {"text": text, "student": student, "teacher": teacher, **more}


def sample(step: int, prompt: str = EVIL) -> dict[str, Any]:
    chunks = [
        chunk("the", -0.5, -3.0, alternatives=[[" a", -0.1], [EVIL, -2.5]]),
        chunk(
            " dog\n",
            -2.0,
            -0.25,
            student_tokens=[[" do", -1.5], ["g\n", -0.5]],
            teacher_tokens=[[" dog\n", -0.25]],
        ),
        chunk(EVIL, -1.0, -1.0),
        chunk(None, -0.5, -0.5),
    ]
    return {
        "step": step,
        "prompt": prompt,
        "completion": f"the dog\n{EVIL}",
        "stopped": True,
        "chunks": chunks,
    }


def a_run(folder: Path, steps: int = 60, name: str = EVIL) -> Path:
    with RunFolder.create(folder, {"train": {"steps": steps}, "name": name}) as run:
        run.note("before the start")
        run.start(RunInfo({}, {"student": f"s {EVIL}", "teacher": "t"}, steps))
        for step in range(steps + 1):
            if step:
                times = {
                    "rollout_s": 0.5 + step / 100,
                    "teacher_s": 0.25,
                    "step_s": 1.0,
                    "tokens_per_s": 9e3 + step,
                }
                run.log(
                    "train",
                    {"step": step, "loss": 1 / step, "lr": 1e-5, "grad_norm": float(step % 7), **times},
                )
            if step % 20 == 0:
                kl = 1.0 / (1 + step)
                ends = {"reverse_kl_per_byte_low": kl * 0.9, "reverse_kl_per_byte_high": kl * 1.1}
                run.log(
                    "eval",
                    {"step": step, "reverse_kl_per_byte": kl, **ends, "stop_rate": 1.0, "evaluate_s": 3.0},
                )
                run.log("sample", sample(step))
        run.note(f"step 9: a warning {EVIL}")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(a_run(tmp_path_factory.mktemp("run") / "one"))


# What is on it


def test_the_page_says_what_the_run_was_and_did(page: Path) -> None:
    read = Reader(page.read_text(encoding="utf-8"))
    head = read.within("header")
    assert "step 60 of 60, finished" in head
    assert f"s {EVIL}" in head
    assert "1 min 12 s in steps and evaluations" in head
    texts = [text for _, text in read.texts]
    assert any(text.startswith("step 9: a warning") for text in texts)
    assert "before the start" in texts
    assert any(text.startswith("train:\n  steps: 60") for text in texts)
    whole = read.within("wide")
    assert "reverse KL, nats per byte" in whole
    assert "1 (0.9 – 1.1)0.0164 (0.0148 – 0.018)−0.984 ●" in whole
    assert "stop rate" not in whole  # it did not change


def test_what_does_not_change_has_no_chart_but_is_named(page: Path) -> None:
    read = Reader(page.read_text(encoding="utf-8"))
    titles = [text for open, text in read.texts if open and open[-1] == "b" and "chart" in open]
    assert titles == ["reverse KL", "loss", "grad norm", "speed", "seconds by phase"]
    assert "stop rate 1." in read.within("still")
    assert "learning rate 1e−5." in read.within("still")


NAMES = st.sampled_from(
    ["loss", "lr", "a_low", "a_high", "a", "x_s", "y_per_s", "step_s", "reverse_kl_bytes"]
)
VALUES = st.none() | st.integers(-9, 9) | st.floats(width=32) | st.booleans() | st.just("text")
RECORDS = st.lists(st.dictionaries(NAMES, VALUES, max_size=5), max_size=6)


@settings(max_examples=30)
@given(RECORDS, RECORDS)
def test_every_metric_is_drawn_or_named_once(evals: Any, trains: Any) -> None:
    evals, trains = ([{**r, "step": s} for s, r in enumerate(rs)] for rs in (evals, trains))
    run = RunRecords("run", {}, trains, evals, [], [], [])
    content = report(run, NOW)
    Reader(content)  # well formed
    groups = {title: (charts, still) for title, charts, still in chart_groups(run)}
    charts, still = groups["Held out"]
    numbers = {
        name
        for record in evals
        for name, value in record.items()
        if type(value) in (int, float) and math.isfinite(value)
    }
    expected = numbers - {"step", "x_s", "y_per_s", "step_s"}
    expected -= {"a_low", "a_high"} if "a" in numbers else set()
    assert len(charts) + len(still) == len(expected)
    assert "NaN" not in content
    assert "nan" not in content.replace("finance", "")


def test_a_run_without_records_has_a_page() -> None:
    read = Reader(report(RunRecords("run", {}, [], [], [], [], []), NOW, running=True))
    assert "step 0 of 0, running" in read.within("header")


@pytest.mark.parametrize("chunks", [5, "text", {"text": "a"}, [5], [{"text": 5, "student": "x"}]])
def test_a_sample_of_another_kind_is_shown_as_far_as_it_goes(chunks: Any) -> None:
    samples = [sample(0, "p") | {"chunks": chunks, "completion": "written"}]
    assert "step 0" in report(RunRecords("run", {}, [], [], samples, [], []), NOW)


def test_of_many_evaluations_the_first_the_last_and_some_between_are_shown() -> None:
    samples = [sample(step, "p") for step in range(0, 100, 2)]
    read = Reader(report(RunRecords("run", {}, [], [], samples, [], []), NOW))
    steps = [int(text.split()[1]) for open, text in read.texts if open[-1:] == ["h3"]]
    assert steps == [0, 20, 40, 58, 78, 98]


def test_shades_say_who_is_surer(page: Path) -> None:
    classes = [
        value
        for tag, name, value in Reader(page.read_text(encoding="utf-8")).attributes
        if (tag, name) == ("button", "class")
    ]
    assert classes[:4] == ["k h5", "k l3", "k l0", "k l0"]


# Charts


def paths(content: str, kind: str) -> list[str]:
    return re.findall(rf'<path class="{kind}[^"]*" d="([^"]*)"', content)


def test_a_line_breaks_where_there_is_no_value() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 4.0)]
    band = [0.5, 1.5, math.nan, 3.5], [1.5, 2.5, math.nan, 4.5]
    chart = line_chart("a <b>", "", [Line(points, band=band, marked=True)], 0)
    (line,), (region,) = paths(chart.html, "line"), paths(chart.html, "band")
    assert (line.count("M"), line.count("L")) == (2, 1)
    assert (region.count("M"), region.count("Z")) == (2, 2)
    assert chart.html.count("<circle") == 3
    assert "a &lt;b&gt;" in chart.html
    assert "1 → 4" in chart.html
    assert chart.data["lines"][0]["values"] == ["1", "2", "–", "4"]


def heights(path: str) -> list[float]:
    return [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]


def test_a_long_line_is_thinned_and_keeps_its_range() -> None:
    points = [(float(n), float(n % 100)) for n in range(10_000)]
    chart = line_chart("a", "", [Line(points)], 0)
    assert len(chart.html) < 30_000
    (line,) = chart.data["lines"]
    assert len(line["steps"]) <= 300
    assert line["steps"][-1] == 9_999
    assert set(line["low"]) <= {str(n) for n in range(100)}


def test_values_far_apart_get_a_log_scale() -> None:
    chart = line_chart("a", "", [Line([(0.0, 1e-3), (1.0, 1.0), (2.0, 1e3)])], 0)
    low, middle, high = heights(paths(chart.html, "line")[0])
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert "log scale" in chart.html


def test_stacked_lines_add_up() -> None:
    lines = [Line([(0.0, 1.0), (1.0, 1.0)], "a", 0), Line([(0.0, 2.0), (1.0, 3.0)], "b", 1)]
    chart = stacked_chart("a", "s", lines, 0)
    lower, upper = (heights(path) for path in paths(chart.html, "area"))
    assert lower[:2] == upper[2:][::-1]  # one begins where the other ends
    assert (lower[2] - lower[0]) * 3 == pytest.approx(upper[2] - upper[1], abs=0.3)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (-1234.5, "−1,234"),
        (3e-5, "3e−5"),
        (2.5e7, "2.5e7"),
        (0.0123456, "0.0123"),
        (12.3456, "12.35"),
    ],
)
def test_numbers_are_short(value: float, said: str) -> None:
    assert number(value) == said


# Safety


def test_nothing_is_fetched_and_no_text_is_markup(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    read = Reader(content)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", content)
    assert {name for _, name, _ in read.attributes}.isdisjoint({"src", "href", "style", "action", "onerror"})
    assert "img" not in read.tags
    assert content.count("<script") == 2
    data = json.loads(read.within("data"))
    assert data["samples"][0]["alternatives"][1][0] == EVIL


# While a run goes on


def train(tmp_path: Path, seen: Recorder, steps: int = 2) -> Path:
    recipe = Recipe(steps=steps, prompts_per_step=2, num_generations=1, warmup_steps=0, max_new_tokens=4)
    saving = Saving(tmp_path / "run", evaluate_every=1, checkpoint_every=2)
    student, teacher, heldout = tiny.tiny_student(), tiny.tiny_teacher(), tiny.heldout(2)
    distill(student, teacher, tiny.prompts(4), recipe, heldout=heldout, saving=saving, trackers=[seen])
    return tmp_path / "run"


def test_a_run_keeps_its_page_up_to_date(tmp_path: Path) -> None:
    states = []

    def look(record: Any) -> None:
        said = Reader((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
        states.append((said.within("header"), said.within("data")))

    run = train(tmp_path, Recorder(look))
    assert "step 0 of 2, running" in states[0][0]
    assert "step 1 of 2, running" in states[1][0]
    read = Reader((run / "report.html").read_text(encoding="utf-8"))
    assert "step 2 of 2, finished" in read.within("header")
    assert "student" in read.within("header")
    assert len([1 for open, text in read.texts if open[-1:] == ["h3"]]) == 6  # two prompts, three evaluations
    samples = json.loads(read.within("data"))["samples"]
    assert all(len(one["alternatives"]) == 4 for one in samples)
    assert all(logp <= 0 for one in samples for _, logp in one["alternatives"])


def test_a_page_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    seen = Recorder()

    def block(record: Any) -> None:
        page = tmp_path / "run" / "report.html"
        if page.is_file():
            page.unlink()
            page.mkdir()

    seen.on_step = block
    run = train(tmp_path, seen)
    notes = [note for note in seen.notes if "report.html" in note]
    assert len(notes) == 1
    assert notes[0].startswith("report.html failed, and the run goes on without it: cannot write")
    assert (run / "student" / "config.json").is_file()
    with pytest.raises(CheckpointError, match=r"cannot write .*report\.html"):
        write_report(run)


# In a browser

needs_browser = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def told(window: Browser) -> str:
    return str(window.run("return document.getElementById('details').innerText"))


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_charts_and_samples_answer_to_mouse_touch_and_keys(
    window: Browser, page: Path, width: int, dark: bool
) -> None:
    window.messages("performance")
    window.messages()
    window.open(page, width=width, dark=dark)
    svg = window.find(".chart svg")[0]
    window.point_at(svg)
    read = "return document.querySelector('.chart output').innerText"
    assert re.fullmatch(r"step [24]0: 0\.\d+ \(0\.\d+ – 0\.\d+\)", window.run(read))
    window.run("arguments[0].focus()", svg)
    window.press("\ue011")
    assert window.run(read) == "step 0: 1 (0.9 – 1.1)"
    window.press("\ue014")
    assert window.run(read).startswith("step 20: ")
    tokens = window.find(".tokens button")
    window.point_at(tokens[0])
    assert "student 61 %, log p −0.50" in told(window)
    assert "teacher's likeliest here: ·a 90 %" in told(window)
    window.touch(tokens[1])
    assert "student 14 %, log p −2.00: ·do 22 % g⏎ 61 %" in told(window)
    window.press("\ue014")
    assert "student 37 %, log p −1.00" in told(window)
    window.press("\ue00c")
    assert window.run("return document.getElementById('details').hidden")
    # The text is text, nothing is asked of any network, nothing is complained of or wider than the window.
    assert window.run("return document.title") == "one – gold"
    assert window.run("return document.querySelectorAll('main img, main script').length") == 0
    assert [m["message"] for m in window.messages()] == []
    assert window.requests(page.resolve().as_uri()) == [page.resolve().as_uri()]
    assert window.run("return document.documentElement.scrollWidth") <= width
    background = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
