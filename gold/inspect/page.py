"""An alignment as one HTML file without network access, usable by mouse, touch or keyboard."""

import base64
import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from gold.inspect.html import SHADES, document, shades
from gold.inspect.view import AlignmentView, TokenizedSide, prompt_runs, summary, token_runs

_TAGS = {"text": "{}", "mark": "<i>{}</i>", "event": "<em>{}</em>"}
_HERE = Path(__file__).parent


def page(view: AlignmentView) -> str:
    """The page, as HTML.

    Every chunk shows the student's tokens over the teacher's; pointing at it, touching it or moving to it with the
    arrow keys shows the ids, bytes, offsets and log-probabilities of its tokens. Without scripts the picture and the
    summary are still shown.
    """
    style = (_HERE / "page.css").read_text(encoding="utf-8") + shades("p", "heat")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    title = f"{view.student.name} and {view.teacher.name}"
    scored = view.score is not None
    body = f"""\
<header>
<h1>One text, two tokenizers</h1>
{_summary(view)}
</header>
<main>
{_prompts(view)}
{_legend(scored)}
<div id="chunks" role="group" aria-label="Chunks of the text; arrow keys walk through them">
{"".join(_lines(view))}</div>
<p>{view.undrawn}</p>
</main>
<aside id="details" aria-live="polite">\
<p class="hint">Point at a chunk, touch it, or walk with the arrow keys.</p></aside>"""
    return document(title, style, body, script, _data(view))


def _data(view: AlignmentView) -> dict[str, Any]:
    """The data of the details of all drawn chunks; bytes are in base 64 or hexadecimal."""
    chunks = view.alignment.chunks[: view.drawn]
    ends = view.alignment.ends_C[: view.drawn].tolist()
    last = chunks[-1].tolist() if len(chunks) else [0, 0, 0, 0]
    return {
        "bytes": base64.b64encode(view.data[: ends[-1] if ends else 0]).decode(),
        "sides": [_side_data(view.student, last[1]), _side_data(view.teacher, last[3])],
        "chunks": chunks.tolist(),
        "ends": ends,
        "count": len(view.alignment),
    }


def _side_data(side: TokenizedSide, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ids": side.tokenized.ids[:count].tolist(),
        "ends": side.tokenized.ends[:count].tolist(),
        # The bytes of tokens that differ from the text's.
        "own": {k: _own_bytes(side, k).hex(" ") for k in range(count) if not side.tokenized.exact[k]},
    }
    for name, value_N in (("logp", side.logp_N), ("entropy", side.entropy_N)):
        if value_N is not None:
            found[name] = [None if math.isnan(x) else round(x, 4) for x in value_N[:count].tolist()]
    return found


def _own_bytes(side: TokenizedSide, k: int) -> bytes:
    token = int(side.tokenized.ids[k])
    return side.vocabulary.token_bytes(token) if token < side.vocabulary.size else b""


def _lines(view: AlignmentView) -> Iterator[str]:
    """The chunks of each line of the text; a browser lays out only the visible lines."""
    ends = view.alignment.ends_C.tolist()
    rows = list(_tokens(view.student, view, 1)), list(_tokens(view.teacher, view, 3))
    line = []
    if view.bos_names:
        line.append(_special(view.bos_names))
    for c, (s0, s1, t0, t1) in enumerate(view.alignment.chunks[: view.drawn].tolist()):
        kind = "" if s1 - s0 == t1 - t0 == 1 else " many"
        line.append(
            f'<button type="button" class="chunk{kind}" tabindex="{0 if c == 0 else -1}">'
            f'<span class="row s">{"".join(rows[0][s0:s1])}</span>'
            f'<span class="row t">{"".join(rows[1][t0:t1])}</span></button>\n'
        )
        if view.data[ends[c] - 1 : ends[c]] == b"\n":
            yield f'<div class="line">{"".join(line)}</div>\n'
            line = []
    if view.stop_names:
        line.append(_special(view.stop_names))
    if line:
        yield f'<div class="line">{"".join(line)}</div>\n'


def _tokens(side: TokenizedSide, view: AlignmentView, last: int) -> Iterator[str]:
    """Each drawn token."""
    count = int(view.alignment.chunks[view.drawn - 1, last]) if view.drawn else 0
    start = 0
    for k, end in enumerate(side.tokenized.ends[:count].tolist()):
        level = ""
        if side.logp_N is not None and not math.isnan(side.logp_N[k]):
            level = f" p{min(SHADES, int(-side.logp_N[k]))}"
        yield f'<span class="k{level}">{_tagged(token_runs(side, k, start, end))}</span>'
        start = end


def _tagged(runs: Iterable[tuple[str, str]]) -> str:
    return "".join(_TAGS[kind].format(escape(run)) for run, kind in runs)


def _special(names: tuple[str, str]) -> str:
    return (
        f'<span class="chunk event"><span class="row s">{escape(names[0])}</span>'
        f'<span class="row t">{escape(names[1])}</span></span>\n'
    )


def _summary(view: AlignmentView) -> str:
    names = " ".join(
        f'<span class="{letter}">{escape(side.name)}</span>'
        for letter, side in zip("st", view.sides, strict=True)
    )
    return f"<p>{names}</p>" + "".join(f"<p>{escape(line)}</p>" for line in summary(view))


def _prompts(view: AlignmentView) -> str:
    if view.student.prompt_ids is None:
        return ""
    shown = "".join(
        f'<div><h3 class="{letter}">{name}</h3><pre>{_tagged(prompt_runs(side))}</pre></div>'
        for name, letter, side in zip(("student", "teacher"), "st", view.sides, strict=True)
    )
    return (
        "<details open><summary>What each side reads before the text</summary>"
        f'<div class="pair">{shown}</div></details>'
    )


def _legend(scored: bool) -> str:
    shades = "".join(f'<span class="k p{level}">{level}</span>' for level in range(SHADES + 1))
    scale = f'<span class="scale">nats: {shades}</span>' if scored else ""
    return (
        '<p class="legend"><span class="s">student above</span> <span class="t">teacher below</span> '
        '<span class="chunk">one token on both sides</span> <span class="chunk many">several tokens</span> '
        f"{scale}</p>"
    )
