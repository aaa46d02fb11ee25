"""Both models' log-probabilities along a completion of an evaluation, chunk by chunk, for people to look at."""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray

from gold.align.texts import AlignedText
from gold.kernels.logits import LazyLogits, likeliest
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

ALTERNATIVES = 4
"""The teacher's most probable tokens that are recorded at each chunk."""

Alternatives = list[list[list[Any]]]


def teacher_alternatives(rows: LazyLogits, vocabulary: Vocabulary) -> Alternatives:
    """The teacher's most probable tokens of each row with their log-probabilities in nats, most probable first; empty
    for a row of which no token is known."""
    none = torch.full((len(rows), 0), -1, dtype=torch.int64, device=rows.device)
    ids_NK, logp_NK, _ = likeliest(rows, ALTERNATIVES, none, vocabulary.size)
    ids_NK, logp_NK = ids_NK.cpu(), logp_NK.masked_fill(ids_NK < 0, -torch.inf).cpu()
    logp_NK, order_NK = logp_NK.sort(dim=-1, descending=True)
    ids_NK = ids_NK.gather(-1, order_NK)
    return [
        [[_written(vocabulary, i), round(x, 4)] for i, x in zip(ids, logp, strict=True) if math.isfinite(x)]
        for ids, logp in zip(
            ids_NK[:, :ALTERNATIVES].tolist(), logp_NK[:, :ALTERNATIVES].tolist(), strict=True
        )
    ]


def _written(vocabulary: Vocabulary, index: int) -> str:
    """What a token writes; the name of a special token."""
    return vocabulary.token_bytes(index).decode("utf-8", "replace") or vocabulary.label(index)


def chunk_records(
    text: AlignedText,
    chunks: NDArray[Any],
    logp_S: NDArray[Any],
    logp_T: NDArray[Any],
    alternatives: Alternatives | None,
) -> list[dict[str, Any]]:
    """Each chunk's text and both sides' log-probability of it, in nats; the stop event last, as a chunk whose text is
    None.

    Where a side has several tokens in a chunk, `student_tokens` and `teacher_tokens` are those with their
    log-probabilities; `alternatives` are the teacher's most probable tokens before the chunk.
    """
    found = []
    for s0, s1, t0, t1 in chunks.tolist():
        record: dict[str, Any] = {
            "text": _bytes_of(text.student, s0, s1).decode("utf-8", "replace"),
            "student": round(float(logp_S[s0:s1].sum()), 4),
            "teacher": round(float(logp_T[t0:t1].sum()), 4),
        }
        if s1 - s0 > 1 or t1 - t0 > 1:
            record["student_tokens"] = _tokens(text.student, logp_S, s0, s1)
            record["teacher_tokens"] = _tokens(text.teacher, logp_T, t0, t1)
        if alternatives is not None and t0 < len(alternatives):
            record["alternatives"] = alternatives[t0]
        found.append(record)
    if text.stopped:
        record = {
            "text": None,
            "student": round(float(logp_S[-1]), 4),
            "teacher": round(float(logp_T[-1]), 4),
        }
        if alternatives:
            record["alternatives"] = alternatives[-1]
        found.append(record)
    return found


def _tokens(side: TokenizedText, logp: NDArray[Any], first: int, last: int) -> list[list[Any]]:
    return [
        [_bytes_of(side, k, k + 1).decode("utf-8", "replace"), round(float(logp[k]), 4)]
        for k in range(first, last)
    ]


def _bytes_of(side: TokenizedText, first: int, last: int) -> bytes:
    start = int(side.ends[first - 1]) if first else 0
    return bytes(side.data[start : int(side.ends[last - 1])]) if last > first else b""
