"""What is shown of a text: stand-ins for what cannot be seen, names of events, and sums of log-probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizers import EOS_ID, byte_level_bpe, with_added
from support.views import view_of, vocabulary_of

from gold.inspect.view import (
    AlignmentView,
    TokenizedSide,
    describe,
    event_name,
    prompt_runs,
    summary,
    token_runs,
    visible,
)
from gold.tokenize.vocabulary import Vocabulary

# Stand-ins


def shown(data: bytes) -> str:
    return "".join(run for run, _ in visible(data))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a b", "a·b"),
        (b"\t\r\n", "⇥␍⏎"),
        (b"\x1b[31m\x00\x7f", r"\x1b[31m\x00\x7f"),
        ("\u00a0\u200b\u2028\u3000\ufeff".encode(), r"⍽\u200b\u2028\u3000\ufeff"),
        (b"\xf0\x9f", r"\xf0\x9f"),
        ("é".encode()[1:] + b"a", r"\xa9a"),
        ("e\u0301".encode(), "e\u0301"),
        ("\u0301a".encode(), "◌\u0301a"),
        ("\u1161".encode(), "◌\u1161"),
        ("日本 🙂".encode(), "日本·🙂"),
        (rb"\x00", r"\x00"),
        (b"", ""),
    ],
)
def test_nothing_is_invisible(data: bytes, expected: str) -> None:
    assert shown(data) == expected


def test_a_stand_in_is_told_from_the_text_itself() -> None:
    assert visible(rb"\x00" + b"\x00") == [(r"\x00", False), (r"\x00", True)]
    assert visible("· ".encode()) == [("·", False), ("·", True)]


@given(st.binary(max_size=30))
def test_what_is_shown_can_be_printed(data: bytes) -> None:
    runs = visible(data)
    assert all(character.isprintable() for run, _ in runs for character in run)
    kept = "".join(run for run, mark in runs if not mark)
    text = data.decode("utf-8", "ignore")
    assert kept == "".join(c for c in text if c.isprintable() and c != " ")


# Tokens


def runs_of(side: TokenizedSide, index: int) -> str:
    start = int(side.tokenized.ends[index - 1]) if index else 0
    return "".join(run for run, _ in token_runs(side, index, start, int(side.tokenized.ends[index])))


def test_tokens_without_bytes_have_names() -> None:
    vocabulary = Vocabulary(with_added(byte_level_bpe()), stop_ids=[EOS_ID])
    turn = vocabulary.tokenizer.token_to_id("<|turn|>")
    side = TokenizedSide("s", vocabulary, vocabulary.decode([turn, 40, 1000], rows=2000), 1.0)
    assert runs_of(side, 0) == "⟨<|turn|>⟩"
    assert runs_of(side, 2) == "⟨#1000⟩"
    assert event_name(vocabulary, (EOS_ID, turn)) == "⟨<eos>/<|turn|>⟩"
    # The space that Llama-2 puts before a text.
    prepend = view_of("\u3042", teacher="byte-fallback, prepend").teacher
    assert runs_of(prepend, 0) == "∅~"


def test_a_token_that_is_not_the_text_s_is_marked() -> None:
    side = view_of("e\u0301 x", student="byte-level, NFC").student
    shown = [runs_of(side, k) for k in range(len(side))]
    assert [s.endswith("~") for s in shown] == [not exact for exact in side.tokenized.exact]
    assert any(s.endswith("~") for s in shown)


# Prompts


def test_a_prompt_has_its_events_by_name_and_its_lines() -> None:
    vocabulary = vocabulary_of("byte-level")
    ids = (0, *vocabulary.encode("a  b\n\x1b").ids.tolist(), EOS_ID)
    side = TokenizedSide("s", vocabulary, vocabulary.encode(""), 1.0, prompt_ids=ids)
    runs = list(prompt_runs(side))
    assert "".join(run for run, _ in runs) == "⟨<bos>⟩a  b⏎\n\\x1b⟨<eos>⟩"
    assert [run for run, kind in runs if kind == "event"] == ["⟨<bos>⟩", "⟨<eos>⟩"]


# Scores


@given(st.text("ab ", max_size=12), st.randoms(use_true_random=False), st.booleans())
def test_chunks_conserve_log_probability(text: str, random: object, stopped: bool) -> None:
    view = view_of(text, stop_ids=(EOS_ID,) if stopped else ())
    logp = [-np.array([random.random() for _ in range(len(side))]) for side in view.sides]  # type: ignore[attr-defined]
    stop = -0.5 if stopped else None
    view = AlignmentView(
        *(replace(side, logp_N=x, stop_logp=stop) for side, x in zip(view.sides, logp, strict=True))
    )
    assert view.chunk_logp is not None
    assert view.score is not None
    sums = [float(x.sum()) for x in view.chunk_logp]
    assert sums == pytest.approx([float(x.sum()) for x in logp])
    assert view.score.scored_bytes == len(text)
    per = max(len(text), 1)
    whole = [x + (stop or 0.0) for x in sums]
    assert view.score.student_bits_per_byte == pytest.approx(-whole[0] / per / math.log(2))
    assert view.score.reverse_kl_sample_nats_per_byte == pytest.approx((whole[0] - whole[1]) / per)


def test_a_chunk_counts_where_both_sides_score_all_of_it() -> None:
    view = view_of("The dog sleeps.")
    logp = [np.full(len(side), -1.0) for side in view.sides]
    logp[0][0] = np.nan
    view = AlignmentView(*(replace(side, logp_N=x) for side, x in zip(view.sides, logp, strict=True)))
    assert view.score is not None
    first = view.alignment.chunks[0]
    assert view.score.scored_bytes == len(view.data) - int(view.alignment.ends_C[0])
    assert view.score.teacher_bits_per_byte == pytest.approx(
        (len(view.teacher) - int(first[3])) / view.score.scored_bytes / math.log(2)
    )
    found = describe(view)
    assert found["student"]["logp"][:2] == [None, -1.0]
    assert found["score"]["scored_bytes"] == view.score.scored_bytes
    assert any(line.startswith(f"scored: {view.score.scored_bytes} of ") for line in summary(view))

    turned = AlignmentView(view.teacher, view.student)
    assert turned.score is not None
    assert turned.score.scored_bytes == view.score.scored_bytes


def test_bytes_without_a_token_are_not_scored() -> None:
    view = view_of("ax", "characters", "byte-level, bytes missing")
    tokenized = view.teacher.tokenized
    none = replace(view.teacher, tokenized=replace(tokenized, ids=tokenized.ids[:0], ends=tokenized.ends[:0]))
    view = AlignmentView(*(replace(side, logp_N=np.full(len(side), -1.0)) for side in (view.student, none)))
    assert view.score is not None
    assert view.score.scored_bytes == 0


def test_a_text_without_scores_says_nothing_of_them() -> None:
    view = view_of("The dog.")
    assert view.score is None
    assert "score" not in describe(view)
    assert len(summary(view)) == 5


def test_the_summary_counts() -> None:
    view = view_of("a")
    assert summary(view) == [
        "1 byte: 1 student token, 1 teacher token, 1 chunk",
        "one token on both sides: 1 chunk = 100% of the student's tokens, 100% of the teacher's, 100% of the bytes",
        "largest chunk: 1 byte; most tokens in one: 2, both sides together",
        "shared vocabulary: 50% of the student's tokens, 50% of the teacher's are one token of the other side too",
        "repaired: 0 bytes (student), 0 bytes (teacher)",
    ]
