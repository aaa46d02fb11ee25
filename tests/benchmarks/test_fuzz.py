"""Fuzzing finds what is broken on purpose, says how to see it again, and gives the same in every process."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tokenizers import byte_level_bpe

from benchmarks import fuzz
from benchmarks.texts import FORGED, odd_text
from gold.align.chunks import Alignment, align_tokens
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

TRAINED = ["--trained-only", "--processes", "1"]


@pytest.fixture(scope="module", autouse=True)
def trained() -> Any:
    """The trained tokenizers, made once for all tests."""
    found = fuzz.subjects(trained_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "subjects", lambda trained_only: found)
        yield


def test_nothing_fails_and_every_tokenizer_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--texts", "150", *TRAINED]) == 0
    out = capsys.readouterr().out
    assert "150 texts, 300 pairs" in out
    for subject in fuzz.subjects(True):
        assert f"\n| {subject.name} | " in out


def without_an_edge(found: Alignment) -> Alignment:
    if len(found) < 2:
        return found
    merged = [found.chunks[0, 0], found.chunks[1, 1], found.chunks[0, 2], found.chunks[1, 3]]
    return Alignment(np.array([merged, *found.chunks[2:]], np.int32), found.ends_C[1:])


def with_a_token_twice(found: Alignment) -> Alignment:
    chunks = found.chunks.copy()
    chunks[1:, 0] -= 1
    return replace(found, chunks=chunks)


def with_a_token_in_the_wrong_chunk(found: Alignment) -> Alignment:
    chunks = found.chunks.copy()
    if len(chunks) > 1 and chunks[0, 3] - chunks[0, 2] > 1:
        chunks[0, 3] -= 1
        chunks[1, 2] -= 1
    return replace(found, chunks=chunks)


def with_other_owners(found: Alignment) -> Alignment:
    found.chunk_T[-1:] = 0
    return found


@pytest.mark.parametrize(
    "broken", [without_an_edge, with_a_token_twice, with_a_token_in_the_wrong_chunk, with_other_owners]
)
def test_a_broken_alignment_is_found(
    broken: Callable[[Alignment], Alignment],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fuzz, "align_tokens", lambda one, other: broken(align_tokens(one, other)))
    assert fuzz.main(["--texts", "100", *TRAINED]) == 1
    assert "error: case " in capsys.readouterr().err


def ends_one_early(found: TokenizedText) -> TokenizedText:
    ends = found.ends.copy()
    ends[:1] -= ends[:1] > 0
    return replace(found, ends=ends)


def all_exact(found: TokenizedText) -> TokenizedText:
    return replace(found, exact=np.ones_like(found.exact))


def nothing_repaired(found: TokenizedText) -> TokenizedText:
    return replace(found, repaired_bytes=0)


def other_bytes(found: TokenizedText) -> TokenizedText:
    return replace(found, data=found.data.replace(b"\xcc\x81", b""))


def with_a_special_token(found: TokenizedText) -> TokenizedText:
    return replace(found, ids=np.where(np.arange(len(found)) == 3, 0, found.ids).astype(np.int32))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (ends_one_early, "other bytes than the text"),
        (all_exact, "other bytes than the text"),
        (nothing_repaired, "0 bytes repaired"),
        (other_bytes, "the bytes are"),
        (with_a_special_token, "special tokens [0]"),
    ],
)
def test_a_broken_tokenization_is_found(
    broken: Callable[[TokenizedText], TokenizedText],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encode = Vocabulary.encode
    monkeypatch.setattr(Vocabulary, "encode", lambda *args, **how: broken(encode(*args, **how)))
    assert fuzz.main(["--texts", "100", *TRAINED]) == 1
    assert told in capsys.readouterr().err


def test_ids_that_the_tokenizer_would_not_give_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = Vocabulary.encode

    def in_halves(self: Vocabulary, text: str | bytes, **how: Any) -> TokenizedText:
        if isinstance(text, bytes) or not text.isascii():
            return encode(self, text, **how)
        half = len(text) // 2
        one, two = encode(self, text[:half], **how), encode(self, text[half:], at_start=False)
        return TokenizedText(
            np.concatenate([one.ids, two.ids]),
            np.concatenate([one.ends, two.ends + half]),
            text.encode(),
            np.concatenate([one.exact, two.exact]),
            one.repaired_bytes + two.repaired_bytes,
        )

    monkeypatch.setattr(Vocabulary, "encode", in_halves)
    assert fuzz.main(["--texts", "100", *TRAINED]) == 1
    assert "the tokenizer's own [" in capsys.readouterr().err


def test_broken_ids_and_exceptions_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = Vocabulary.decode
    monkeypatch.setattr(Vocabulary, "decode", lambda *args, **how: ends_one_early(decode(*args, **how)))
    assert fuzz.main(["--texts", "100", *TRAINED]) == 1
    assert "sums of lengths" in capsys.readouterr().err
    monkeypatch.setattr(Vocabulary, "decode", lambda *args, **how: 1 / 0)
    assert fuzz.main(["--texts", "100", *TRAINED]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_first_case_that_fails_is_told_and_runs_again_by_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = Vocabulary.encode

    def cautious(self: Vocabulary, text: str | bytes, **how: Any) -> TokenizedText:
        if ("é" if isinstance(text, str) else "é".encode()) in text:
            raise ValueError("accents")
        return encode(self, text, **how)

    monkeypatch.setattr(Vocabulary, "encode", cautious)
    assert fuzz.main(["--texts", "300", "--seed", "5", *TRAINED]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    command, number = message.split("run it again: ")[1].rsplit(" ", 1)
    assert command == "python -m benchmarks fuzz --trained-only --seed 5 --case"
    cases = [fuzz.draw(5, n, fuzz.subjects(True)) for n in range(int(number) + 1)]
    assert [n for n, case in enumerate(cases) if fuzz._failure(case)] == [int(number)]
    assert fuzz.main([*command.split()[4:], number]) == 1
    out = capsys.readouterr().out
    assert "fails: " in out
    last = out.split("text ")[-1].splitlines()[0]
    assert eval(last) in ("é", "é".encode(), "", b"")
    assert fuzz.main([*command.split()[4:], str(int(number) - 1)]) == 0
    assert "holds" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_check_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BLOCK", 10)
    alone, together = (fuzz._run(3, 40, None, processes, True) for processes in (1, 2))
    assert alone == together


def test_a_run_without_time_checks_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BLOCK", 10)
    assert [fuzz._run(3, 40, minutes, 1, True)[0].cases for minutes in (None, 0.0)] == [40, 10]


def test_the_record_holds_what_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "write_record", partial(fuzz.write_record, folder=tmp_path))
    assert fuzz.main(["--texts", "30", "--seed", "2", "--record", *TRAINED]) == 0
    record = json.loads((tmp_path / "fuzz.json").read_text())
    assert record["command"] == (
        "python -m benchmarks fuzz --trained-only --seed 2 --texts 30 --processes 1 --record"
    )
    assert (record["data"]["texts"], record["data"]["pairs"], record["data"]["failures"]) == (30, 60, 0)
    assert sum(counts["texts"] for counts in record["data"]["tokenizers"].values()) == 90


def test_a_tokenizer_that_cuts_texts_off_is_asked_for_all_of_it() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(4)
    subject = fuzz.Subject("cutting", Vocabulary.load(tokenizer))
    fuzz.check(fuzz.Case("a text of more tokens", (subject, subject), (True, False), ()), fuzz.Tally())
    assert tokenizer.truncation


def test_odd_texts_are_odd_and_those_of_their_seed() -> None:
    texts = [odd_text(random.Random(f"{n}")) for n in range(4000)]
    assert texts[:50] == [odd_text(random.Random(f"{n}")) for n in range(50)]
    strings = [text for text in texts if isinstance(text, str)]
    joined = "".join(strings)
    assert 0.1 < 1 - len(strings) / len(texts) < 0.25
    assert {ord(c) >> 16 for c in joined} == set(range(17))
    assert any("\ud800" <= c <= "\udfff" for c in joined)
    assert all(forged in joined for forged in FORGED)
    lengths = sorted(map(len, texts))
    assert lengths[0] == 0
    assert 10 < lengths[len(texts) // 2] < 40
    assert lengths[-1] > 800
    broken = [text for text in texts if isinstance(text, bytes)]
    assert sum(not fuzz._is_utf8(text) for text in broken) > 0.8 * len(broken)
