"""How much of a text two tokenizers cut alike, and what a comparison of one token with one token leaves out.

Texts of five kinds are aligned by `gold.align` for pairs of published tokenizers. A student's token counts as compared
one to one where the teacher has a token of the same bytes at the same place. A position is synced where both have read
the same bytes, so that two rows of next-token probabilities are conditioned on the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.assets import model_path, tokenizer_path
from benchmarks.claims.cells import Given
from benchmarks.claims.figures import canvas, markdown, save
from benchmarks.claims.languages import texts_by_kind
from gold.align.chunks import align_tokens
from gold.align.overlap import byte_equal_pairs
from gold.tokenize.vocabulary import Vocabulary

PAIRS = (
    ("smollm2-135m-instruct", "gemma3"),
    ("gemma3", "smollm2-135m-instruct"),
    ("qwen3", "llama3_1"),
    ("llama3_1", "qwen3"),
    ("qwen3", "gptoss"),
    ("qwen3", "deepseek_v3"),
    ("gemma3", "qwen3"),
    ("llama2", "llama3_1"),
)
"""Student and teacher, by the names of their tokenizers in the assets."""
NAMES = {
    "smollm2-135m-instruct": "SmolLM2",
    "gemma3": "Gemma 3",
    "qwen3": "Qwen3",
    "llama3_1": "Llama 3.1",
    "gptoss": "gpt-oss",
    "deepseek_v3": "DeepSeek V3",
    "llama2": "Llama 2",
}


@dataclass(frozen=True)
class Texts:
    """A cell: one pair of tokenizers on so many bytes of each kind."""

    student: str
    teacher: str
    bytes: int


def measure(given: Given) -> dict[str, Any]:
    """The shares of every pair, by kind of text."""
    size, pairs = (1024, PAIRS[2:3]) if given.small else (16384, PAIRS)
    rows = given.cells.all(measured, [Texts(*pair, size) for pair in pairs])
    return {"bytes_of_a_kind": size, "pairs": rows}


def measured(job: Texts, _: Path) -> dict[str, Any]:
    """What is told of one pair of published tokenizers."""
    student, teacher = (Vocabulary.load(_path(name)) for name in (job.student, job.teacher))
    kinds = {kind: shares_of(student, teacher, texts) for kind, texts in texts_by_kind(job.bytes).items()}
    names = {"student": NAMES[job.student], "teacher": NAMES[job.teacher]}
    return {**names, "vocabulary": shared_vocabulary(student, teacher), "kinds": kinds}


def _path(name: str) -> Path:
    return model_path(name) if name.startswith("smollm2") else tokenizer_path(name)


def shared_vocabulary(student: Vocabulary, teacher: Vocabulary) -> float:
    """Share of the student's tokens, special ones aside, whose bytes are one token of the teacher too."""
    return round(len(byte_equal_pairs(student, teacher)[0]) / int((~student.is_special).sum()), 4)


def shares_of(student: Vocabulary, teacher: Vocabulary, texts: Sequence[str]) -> dict[str, float]:
    """Of these texts together: tokens and bytes in one-to-one chunks, synced positions, digits outside such chunks
    (of all digits), chunks in student tokens and bytes, the largest chunk that is not one to one. Shares of an empty
    denominator are 0.
    """
    counts = dict.fromkeys(("tokens", "bytes", "chunks", "ones", "one_bytes", "digits", "missed_digits"), 0)
    largest = 0
    for text in texts:
        one = student.encode(text)
        other = teacher.encode(one.data)
        chunks = align_tokens(one, other)
        single = chunks.one_to_one_C
        widths = chunks.ends_C - chunks.starts_C
        data = np.frombuffer(one.data, np.uint8)
        digits = (data >= ord("0")) & (data <= ord("9"))
        counts["tokens"] += len(one)
        counts["bytes"] += data.size
        counts["chunks"] += len(chunks)
        counts["ones"] += int(single.sum())
        counts["one_bytes"] += int(widths[single].sum())
        counts["digits"] += int(digits.sum())
        counts["missed_digits"] += int((digits & ~np.repeat(single, widths)).sum())
        largest = max(largest, int(widths[~single].max(initial=0)))

    def share(part: str, whole: str) -> float:
        return round(counts[part] / max(1, counts[whole]), 4)

    return {
        "one_to_one_tokens": share("ones", "tokens"),
        "one_to_one_bytes": share("one_bytes", "bytes"),
        "synced_positions": share("chunks", "tokens"),
        "missed_digits": share("missed_digits", "digits"),
        "chunk_tokens": share("tokens", "chunks"),
        "chunk_bytes": share("bytes", "chunks"),
        "largest_chunk_bytes": largest,
        "bytes": counts["bytes"],
    }


def table(data: Mapping[str, Any]) -> str:
    """Two tables: one-to-one tokens and synced positions by kind; then what is missed, and chunks, by pair."""
    pairs = data["pairs"]
    kinds = list(pairs[0]["kinds"])
    by_kind = markdown(
        ["student ← teacher: one to one, synced", "vocabulary shared", *kinds],
        [
            [_name(pair), f"{pair['vocabulary']:.0%}"]
            + [f"{k['one_to_one_tokens']:.0%}, {k['synced_positions']:.0%}" for k in pair["kinds"].values()]
            for pair in pairs
        ],
    )
    head = ["student ← teacher: strict one to one leaves out", *(f"bytes, {kind}" for kind in kinds)]
    head += ["digits, numbers", "tokens a chunk", "bytes a chunk", "largest, bytes"]
    rows = []
    for pair in pairs:
        found = pair["kinds"].values()
        rows.append(
            [
                _name(pair),
                *(f"{1 - k['one_to_one_bytes']:.0%}" for k in found),
                f"{pair['kinds']['numbers']['missed_digits']:.0%}",
                _range([k["chunk_tokens"] for k in found]),
                _range([k["chunk_bytes"] for k in found]),
                str(max(k["largest_chunk_bytes"] for k in found)),
            ]
        )
    return f"{by_kind}\n\n{markdown(head, rows)}"


def _name(pair: Mapping[str, Any]) -> str:
    return f"{pair['student']} ← {pair['teacher']}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.1f}–{max(values):.1f}"


def draw(data: Mapping[str, Any], path: Path) -> None:
    """By pair and kind of text: bytes in one-to-one chunks (bars), and synced positions (marks)."""
    pairs = data["pairs"]
    kinds = list(pairs[0]["kinds"])
    figure, axes = canvas(size=(8.4, 0.62 * len(pairs) + 1.4))
    ax = axes[0][0]
    height = 0.8 / len(kinds)
    for n, kind in enumerate(kinds):
        places = [row + n * height for row in range(len(pairs))]
        found = [pair["kinds"][kind] for pair in pairs]
        ax.barh(
            places,
            [100 * f["one_to_one_bytes"] for f in found],
            height,
            color=f"C{n}",
            alpha=0.55,
            label=kind,
        )
        ax.plot([100 * f["synced_positions"] for f in found], places, "|", ms=8, color="0.1")
    ax.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(pairs))], [_name(pair) for pair in pairs], fontsize=8
    )
    ax.invert_yaxis()
    ax.set(
        xlabel="% of the text's bytes in one-to-one chunks; line: % of the student's positions synced",
        xlim=(0, 101),
    )
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=8, ncols=len(kinds), loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    save(figure, path)
