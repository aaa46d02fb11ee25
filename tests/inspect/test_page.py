"""The page: nothing in it but the text as text, and in a real browser every chunk says what it holds."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from support.chromium import Browser, browser, missing
from support.html import Reader
from support.texts import data
from support.tokenizers import BOS_ID, EOS_ID, byte_level_bpe
from support.views import view_of

from gold.inspect import view as view_module
from gold.inspect.page import page
from gold.inspect.view import AlignmentView, TokenizedSide, token_runs
from gold.tokenize.vocabulary import Vocabulary

EVIL = "<script>document.title = 'run'</script>\n<img src=x onerror=alert(1)> </script><!-- & \"'` {{x}} <eos>\x00"


def scored(view: AlignmentView) -> AlignmentView:
    logp = [-np.linspace(0.25, 12.0, len(side)) for side in view.sides]
    logp[0][:1] = np.nan
    return AlignmentView(
        *(replace(side, logp_N=x, entropy_N=-x / 2) for side, x in zip(view.sides, logp, strict=True))
    )


TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "h1", "p", "main"),
    *("span", "div", "button", "i", "em", "aside", "script"),
}


def assert_holds(content: str, view: AlignmentView) -> None:
    read = Reader(content)
    starts = [0, *view.student.tokenized.ends.tolist()]
    tokens = [
        "".join(run for run, _ in token_runs(view.student, k, starts[k], starts[k + 1]))
        for k in range(len(view.student))
    ]
    assert read.within("chunks", "row s") == "".join(tokens)
    assert read.tags <= TAGS
    embedded = json.loads(read.within("data"))
    assert base64.b64decode(embedded["bytes"]) == view.data
    assert embedded["chunks"] == view.alignment.chunks.tolist()
    assert [side["ids"] for side in embedded["sides"]] == [s.tokenized.ids.tolist() for s in view.sides]


@settings(max_examples=40)
@given(data)
def test_the_page_holds_the_text(text: bytes) -> None:
    view = view_of(text)
    assert_holds(page(view), view)


def test_no_token_is_markup() -> None:
    """Tokens that are whole elements: a vocabulary may have them."""
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([EVIL, "</span></button>", "</script>", "<!--"])
    vocabulary = Vocabulary(tokenizer, stop_ids=[EOS_ID])
    text = f"a</span></button>{EVIL}</script> <!-- b"
    tokenized = vocabulary.encode(text)
    assert len(tokenized) < 12
    side = TokenizedSide("s", vocabulary, tokenized, 1.0, prompt_ids=tuple(tokenized.ids.tolist()))
    content = page(AlignmentView(side, side))
    assert Reader(content).tags <= TAGS | {"details", "summary", "h3", "pre"}
    assert_holds(page(AlignmentView(replace(side, prompt_ids=None), side)), AlignmentView(side, side))


def test_nothing_is_fetched_and_nothing_else_is_run() -> None:
    content = page(scored(view_of(EVIL, bos_id=BOS_ID, stop_ids=(EOS_ID,))))
    read = Reader(content)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", content)
    assert {name for _, name, _ in read.attributes}.isdisjoint({"src", "href", "style", "action"})
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    policy = next(
        value for tag, name, value in read.attributes if name == "content" and "default-src" in value
    )  # type: ignore[operator]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert content.count("<script") == 2  # the data and the page's own


def test_names_are_escaped() -> None:
    view = view_of("a")
    content = page(AlignmentView(replace(view.student, name="<b>&"), view.teacher))
    assert "<b>" not in content
    assert "&lt;b&gt;&amp;" in content


def test_the_summary_and_the_shades_are_there_without_scripts() -> None:
    view = scored(view_of("The dog sleeps.", stop_ids=(EOS_ID,), stop_logp=-0.7))
    read = Reader(page(view))
    summary = read.within("header")
    assert view.score is not None
    for said in (
        f"{len(view.student)} student tokens, {len(view.teacher)} teacher tokens",
        f"bits per byte: {view.score.student_bits_per_byte:.3f}",
        "stop: 49.7%",
        f"{view.score.reverse_kl_sample_nats_per_byte:+.4f} nats per byte",
    ):
        assert said in summary
    levels = [
        value for tag, name, value in read.attributes if name == "class" and (value or "").startswith("k")
    ]
    drawn = levels[10:]  # after the legend's
    expected = [
        "k" if np.isnan(x) else f"k p{min(9, int(-x))}"
        for c in view.alignment.chunks
        for side, (a, b) in zip(view.sides, (c[:2], c[2:]), strict=True)
        for x in side.logp_N[a:b]  # type: ignore[index]
    ]
    assert drawn == expected
    assert "p9" not in read.within("header")
    assert "nats:" not in page(view_of("a"))


def test_each_line_of_the_text_is_a_line_of_the_page() -> None:
    content = page(view_of("def f():\n    return 1\n\nf()"))
    assert content.count('<div class="line">') == 3


def test_of_a_long_text_the_beginning_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "DRAWN_BYTES", 40)
    view = view_of("the dog sleeps. " * 100)
    read = Reader(page(view))
    embedded = json.loads(read.within("data"))
    assert 40 <= len(base64.b64decode(embedded["bytes"])) < 60
    assert len(embedded["chunks"]) == view.drawn < len(view.alignment) == embedded["count"]
    assert "the picture ends at byte" in read.within("main")


def test_an_empty_text_is_an_empty_page() -> None:
    read = Reader(page(view_of("")))
    assert json.loads(read.within("data"))["chunks"] == []
    assert "0 chunks" in read.within("header")


# In a browser

needs_browser = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TEXT = f"The dog\t日本 e\u0301 {EVIL} and the dog sleeps in the sun. " + "na" * 60


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AlignmentView]:
    view = scored(view_of(TEXT, "byte-level, NFC", "characters", bos_id=BOS_ID, stop_ids=(EOS_ID,)))
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page(view), encoding="utf-8")
    return file, view


def details(window: Browser) -> str:
    text: str = window.run("return document.getElementById('details').innerText")
    return text


def expected_details(view: AlignmentView, c: int) -> list[str]:
    """Ids, bytes, offsets and log-probabilities of both sides' tokens in a chunk, as the page writes them."""
    found = [f"Chunk {c + 1} of {len(view.alignment)}"]
    s0, s1, t0, t1 = view.alignment.chunks[c].tolist()
    for side, (a, b) in zip(view.sides, ((s0, s1), (t0, t1)), strict=True):
        for k in range(a, b):
            start, end = int(side.tokenized.starts[k]), int(side.tokenized.ends[k])
            found += [
                str(side.tokenized.ids[k]),
                side.tokenized.data[start:end].hex(" "),
                f"{start}\u2013{end}",
            ]
            if side.logp_N is not None and not np.isnan(side.logp_N[k]):
                found.append(f"{round(side.logp_N[k], 4):.3f}".replace("-", "\u2212"))
            if side.entropy_N is not None and not np.isnan(side.entropy_N[k]):
                found.append(f"{round(side.entropy_N[k], 4):.3f}")
    return found


def assert_told(window: Browser, view: AlignmentView, c: int) -> None:
    told = details(window)
    for part in expected_details(view, c):
        assert part in told


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_way_to_a_chunk_shows_its_tokens(
    window: Browser, shown: tuple[Path, AlignmentView], width: int, dark: bool
) -> None:
    file, view = shown
    window.messages("performance")
    window.messages()
    window.open(file, width=width, dark=dark)
    chunks = window.find("#chunks button")
    assert len(chunks) == len(view.alignment)
    assert "Point at a chunk" in details(window)
    # With the mouse, with a finger, with the keyboard.
    window.point_at(chunks[1])
    assert_told(window, view, 1)
    window.touch(chunks[4])
    assert_told(window, view, 4)
    right, left, down, up, end, home = "\ue014", "\ue012", "\ue015", "\ue013", "\ue010", "\ue011"
    window.press(right)
    assert_told(window, view, 5)
    window.press(left, left)
    assert_told(window, view, 3)
    window.press(end)
    assert_told(window, view, len(view.alignment) - 1)
    window.press(home)
    assert_told(window, view, 0)
    window.press(down, up)
    assert_told(window, view, 0)
    # One chunk is a stop of the tab key, and it is the one that has the focus.
    tabbed = window.run(
        "return [...document.querySelectorAll('#chunks [tabindex=\"0\"]')].map(b => b === document.activeElement)"
    )
    assert tabbed == [True]
    # The text is text, whatever it says.
    assert window.run("return document.title") == f"{view.student.name} and {view.teacher.name}"
    assert window.run("return document.querySelectorAll('main img, main script').length") == 0
    row = "[...document.querySelectorAll('#chunks .row.s')].map(r => r.innerText).join('')"
    assert "<script>document.title" in window.run(f"return {row}")
    # Nothing is asked of any network, nothing is complained of, nothing is wider than the window.
    assert [m["message"] for m in window.messages()] == []
    assert window.requests(file.resolve().as_uri()) == [file.resolve().as_uri()]
    assert window.run("return document.documentElement.scrollWidth") <= width
    background = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark


@needs_browser
def test_a_token_that_is_not_the_text_s_shows_its_own_bytes(
    window: Browser, shown: tuple[Path, AlignmentView]
) -> None:
    file, view = shown
    tokenized = view.student.tokenized
    k = int(np.flatnonzero(~tokenized.exact)[0])
    c = int(view.alignment.chunk_S[k])
    window.open(file)
    window.point_at(window.find("#chunks button")[c])
    own = view.student.vocabulary.token_bytes(int(tokenized.ids[k])).hex(" ")
    assert f"its own: {own}" in details(window)


@needs_browser
def test_the_browser_refuses_what_the_page_does_not_name(window: Browser, tmp_path: Path) -> None:
    content = page(view_of("a")).replace("</main>", "<script>document.title = 'run'</script></main>")
    file = tmp_path / "changed.html"
    file.write_text(content, encoding="utf-8")
    window.messages()
    window.open(file)
    assert window.run("return document.title") != "run"
    assert any("Content Security Policy" in m["message"] for m in window.messages())
