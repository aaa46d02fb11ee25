"""An alignment as a page: one file without network, to look at with a mouse, a finger or a keyboard."""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from gold.inspect.view import AlignmentView, TokenizedSide, event_name, prompt_runs, token_runs

_LEVELS = 9
"""A token's shade says how many nats it cost, up to so many."""

_TAGS = {"text": "{}", "mark": "<i>{}</i>", "event": "<em>{}</em>"}
_HERE = Path(__file__).parent


def page(view: AlignmentView) -> str:
    """The page, as HTML.

    Every chunk shows the student's tokens over the teacher's; pointing at it, touching it or walking to it with the
    arrow keys shows the ids, bytes, offsets and log-probabilities of its tokens. Without scripts the picture and the
    summary are still there.
    """
    style = (_HERE / "page.css").read_text(encoding="utf-8") + _shades()
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    title = f"{view.student.name} and {view.teacher.name}"
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    data = json.dumps(_data(view), separators=(",", ":"))
    scored = view.score is not None
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>One text, two tokenizers</h1>
{_summary(view)}
</header>
<main>
{_prompts(view)}
{_legend(scored)}
<div id="chunks" role="group" aria-label="Chunks of the text; arrow keys walk through them">
{"".join(_lines(view))}</div>
{_undrawn(view)}
</main>
<aside id="details" aria-live="polite">\
<p class="hint">Point at a chunk, touch it, or walk with the arrow keys.</p></aside>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _shades() -> str:
    return "".join(
        f".p{level} {{ background: rgb(var(--heat) / {level / 12:.2f}); }}\n" for level in range(_LEVELS + 1)
    )


def _data(view: AlignmentView) -> dict[str, Any]:
    """What the details are made of, of the chunks that are drawn: numbers, and bytes in base 64 or hexadecimal."""
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
        # The bytes of tokens that are not the text's.
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
    """The chunks of each line of the text; a browser lays out only the lines that are in sight."""
    student, teacher = view.sides
    ends = view.alignment.ends_C.tolist()
    rows = list(_tokens(student, view, 1)), list(_tokens(teacher, view, 3))
    line = []
    if student.bos_id is not None or teacher.bos_id is not None:
        line.append(_event(view, *([] if side.bos_id is None else [side.bos_id] for side in view.sides)))
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
    if student.stop_ids or teacher.stop_ids:
        line.append(_event(view, student.stop_ids, teacher.stop_ids))
    if line:
        yield f'<div class="line">{"".join(line)}</div>\n'


def _tokens(side: TokenizedSide, view: AlignmentView, last: int) -> Iterator[str]:
    """Each token that is drawn."""
    count = int(view.alignment.chunks[view.drawn - 1, last]) if view.drawn else 0
    start = 0
    for k, end in enumerate(side.tokenized.ends[:count].tolist()):
        level = ""
        if side.logp_N is not None and not math.isnan(side.logp_N[k]):
            level = f" p{min(_LEVELS, int(-side.logp_N[k]))}"
        yield f'<span class="k{level}">{_tagged(token_runs(side, k, start, end))}</span>'
        start = end


def _tagged(runs: Iterable[tuple[str, str]]) -> str:
    return "".join(_TAGS[kind].format(escape(run)) for run, kind in runs)


def _event(view: AlignmentView, student: Iterable[int], teacher: Iterable[int]) -> str:
    names = [
        escape(event_name(side.vocabulary, ids)) if ids else "–"
        for side, ids in zip(view.sides, (tuple(student), tuple(teacher)), strict=True)
    ]
    return (
        f'<span class="chunk event"><span class="row s">{names[0]}</span>'
        f'<span class="row t">{names[1]}</span></span>\n'
    )


def _summary(view: AlignmentView) -> str:
    found, sides = view.coverage, view.sides
    shares = found.student_tokens, found.teacher_tokens
    rows = [
        ("tokens", [str(len(side)) for side in sides]),
        ("in chunks of one token on both sides", [f"{share:.0%}" for share in shares]),
        ("one token of the other side too", [f"{side.shared:.0%}" for side in sides]),
        ("repaired bytes", [str(side.tokenized.repaired_bytes) for side in sides]),
    ]
    more = ""
    if view.score is not None:
        score = view.score
        bits = score.student_bits_per_byte, score.teacher_bits_per_byte
        rows.append(("bits per byte", [f"{value:.3f}" for value in bits]))
        stops = [side.stop_logp for side in sides]
        if None not in stops:
            rows.append(("probability of stopping", [f"{math.exp(x or 0.0):.1%}" for x in stops]))
        more = (
            f"<p>Reverse KL, this sample alone: {score.reverse_kl_sample_nats_per_byte:+.4f} nats per byte, over "
            f"{score.scored_bytes} of {len(view.data)} bytes that both sides give a probability.</p>"
        )
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{values[0]}</td><td>{values[1]}</td></tr>'
        for name, values in rows
    )
    return (
        '<table><thead><tr><td></td><th scope="col" class="s">student</th><th scope="col" class="t">teacher</th></tr>'
        f'<tr class="names"><td></td><td>{escape(sides[0].name)}</td><td>{escape(sides[1].name)}</td></tr></thead>'
        f"<tbody>{body}</tbody></table>"
        f"<p>{len(view.data)} bytes in {found.chunks} chunks; {found.one_to_one_chunks} of them, {found.bytes:.0%} of "
        f"the bytes, are one token on both sides; the largest has {found.largest_chunk_bytes} bytes, and "
        f"the most tokens in one are {found.largest_chunk_tokens}, both sides together.</p>{more}"
    )


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
    shades = "".join(f'<span class="k p{level}">{level}</span>' for level in range(_LEVELS + 1))
    scale = f'<span class="scale">nats: {shades}</span>' if scored else ""
    return (
        '<p class="legend"><span class="s">student above</span> <span class="t">teacher below</span> '
        '<span class="chunk">one token on both sides</span> <span class="chunk many">several tokens</span> '
        f"{scale}</p>"
    )


def _undrawn(view: AlignmentView) -> str:
    if view.drawn == len(view.alignment):
        return ""
    return f"<p>The picture ends at byte {view.alignment.starts_C[view.drawn]} of {len(view.data)}.</p>"
