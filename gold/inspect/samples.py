"""The completions of a run's evaluations as HTML, shaded by how far student and teacher are apart on each chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from gold.inspect.charts import number
from gold.inspect.html import SHADES
from gold.inspect.series import Records, is_number
from gold.inspect.view import visible

_MOST_STEPS = 6
"""Evaluations of a prompt that are shown: the first, the last, and some between them."""
_LEVELS_PER_NAT = 2


class SampleList:
    """The samples of a run: ``html``, and in ``data`` the details of each drawn chunk for the script."""

    def __init__(self, samples: Records) -> None:
        self.data: list[Any] = []
        self._by_prompt: dict[str, list[Mapping[str, Any]]] = {}
        for sample in samples:
            self._by_prompt.setdefault(str(sample.get("prompt", "")), []).append(sample)

    def html(self) -> str:
        """A section with the samples of each prompt over the steps; empty if there are none."""
        if not self._by_prompt:
            return ""
        self.data.clear()
        blocks = "".join(self._prompt(prompt, given) for prompt, given in self._by_prompt.items())
        return f"<section><h2>Samples over time</h2>{_legend()}{blocks}</section>"

    def _prompt(self, prompt: str, samples: Sequence[Mapping[str, Any]]) -> str:
        shown = _chosen(list({int(s["step"]): s for s in samples}.values()))
        tries = "".join(self._try(sample) for sample in shown)
        return f"<article><pre>{_lines(prompt)}</pre>{tries}</article>"

    def _try(self, sample: Mapping[str, Any]) -> str:
        chunks = sample.get("chunks")
        chunks = [c for c in chunks if isinstance(c, dict)] if isinstance(chunks, list) else []
        known = [c for c in chunks if is_number(c.get("student")) and is_number(c.get("teacher"))]
        size = len(str(sample.get("completion", "")).encode("utf-8", "replace"))
        gap = sum(c["student"] - c["teacher"] for c in known) / max(size, 1)
        said = f"{number(gap)} nats per byte" if known else ""
        said += "" if sample.get("stopped") else ", cut off" if said else "cut off"
        teacher = f"{escape(str(sample['teacher']))}: " if sample.get("teacher") else ""
        if chunks:
            content = "".join(self._chunk(c, n == 0) for n, c in enumerate(chunks))
        else:
            content = _lines(str(sample.get("completion", ""))).replace("&#10;", "<br>")
        return (
            f'<div class="try"><h3>step {sample["step"]} <span class="unit">{teacher}{said}</span></h3>'
            f'<p class="tokens">{content}</p></div>'
        )

    def _chunk(self, chunk: Mapping[str, Any], first: bool) -> str:
        place = len(self.data)
        self.data.append({name: value for name, value in chunk.items() if value is not None})
        text = chunk.get("text")
        shown = "<em>stop</em>" if text is None else _text(str(text))
        after = "<br>" if text is not None and str(text).endswith("\n") else ""
        return (
            f'<button type="button" class="{_shade(chunk)}" data-chunk="{place}" tabindex="{0 if first else -1}">'
            f"{shown}</button>{after}"
        )


def _shade(chunk: Mapping[str, Any]) -> str:
    """The class of a chunk: h where the student is surer of it than the teacher, l where the teacher is."""
    student, teacher = chunk.get("student"), chunk.get("teacher")
    if not (is_number(student) and is_number(teacher)):
        return "k"
    gap = float(student) - float(teacher)  # type: ignore[arg-type]
    level = min(SHADES, int(_LEVELS_PER_NAT * abs(gap)))
    return f"k {'h' if gap > 0 else 'l'}{level}"


def _chosen(samples: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The first, the last, and evenly spaced ones between them."""
    count = min(len(samples), _MOST_STEPS)
    places = sorted({round(n * (len(samples) - 1) / max(count - 1, 1)) for n in range(count)})
    return (samples[place] for place in places)


def _text(text: str) -> str:
    """A text with visible white space."""
    runs = visible(text.encode("utf-8", "replace"))
    return "".join(f"<i>{escape(run)}</i>" if mark else escape(run) for run, mark in runs)


def _lines(text: str) -> str:
    """A text with plain spaces, and lines that end after a visible line break."""
    return "&#10;".join(" ".join(map(_text, line.split(" "))) for line in text.splitlines(keepends=True))


def _legend() -> str:
    def scale(letter: str) -> str:
        levels = (1, 3, 5, 7, SHADES)
        return "".join(
            f'<span class="k {letter}{level}">{level / _LEVELS_PER_NAT:g}</span>' for level in levels
        )

    return (
        '<p class="legend"><span>student surer than teacher, nats: '
        f'<span class="scale">{scale("h")}</span></span> '
        f'<span>teacher surer: <span class="scale">{scale("l")}</span></span> '
        '<span class="unit">Point at a token, touch it, or walk with the arrow keys: what each side gives it, and '
        "what the teacher would rather have written.</span></p>"
    )
