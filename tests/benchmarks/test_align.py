"""The clock, the texts, and the comparison with other walks, on small tokenizers and without TRL."""

import gc
import json
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from support.texts import text
from support.tokenizers import byte_level_bpe, families, sentencepiece_bpe
from tokenizers import Tokenizer

from benchmarks import align
from benchmarks.clock import Spread, seconds_in_turn, spread
from benchmarks.texts import plain_texts
from gold.align.chunks import Alignment, align_tokens, chunks_of
from gold.tokenize.vocabulary import Vocabulary

STUDENT, TEACHER = (Vocabulary.load(tokenizer) for tokenizer in (byte_level_bpe(), sentencepiece_bpe()))
TEXTS = ["The quick brown fox", "def add(a, b):\n    return a + b", "日本語 and Привет"]


def test_the_clock_runs_all_work_in_turn_and_counts_every_round_but_the_first() -> None:
    ran: list[str] = []

    def busy() -> None:
        ran.append("busy")
        assert not gc.isenabled()
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass

    seconds = seconds_in_turn(
        {"busy": busy, "idle": lambda: ran.append("idle"), "rest": lambda: time.sleep(0.02)}, 3
    )
    assert ran == ["busy", "idle"] * 2 + ["idle", "busy"] + ["busy", "idle"]
    assert {name: len(values) for name, values in seconds.items()} == {"busy": 3, "idle": 3, "rest": 3}
    assert min(seconds["busy"]) >= 0.01
    assert max(seconds["rest"]) < 0.01  # sleeping keeps no processor busy
    assert gc.isenabled()


def test_spread_by_hand() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


@given(text)
def test_the_walk_in_plain_python_finds_the_chunks(sample: str) -> None:
    tokenized_texts = [vocabulary.decode(vocabulary.encode(sample).ids) for vocabulary in (STUDENT, TEACHER)]
    one, other = tokenized_texts
    if one.data == other.data:
        lengths = [[len(v.token_bytes(i)) for i in range(v.size)] for v in (STUDENT, TEACHER)]
        found = align.python_chunks(one.ids.tolist(), other.ids.tolist(), *lengths)
        assert [list(row) for row in found] == align_tokens(one, other).chunks.tolist()


def measure(student: Vocabulary = STUDENT, peer: Any = None) -> align.Measurement:
    return align.measure(
        ("a", "b"), "small", student, TEACHER, TEXTS, ["x", "<s>", "e\u0301"], peer, rounds=2
    )


def test_a_measurement_counts_tokens_and_chunks_and_gives_every_time() -> None:
    found = measure()
    alignments = [align_tokens(STUDENT.encode(t), TEACHER.encode(t)) for t in TEXTS]
    assert found.tokens == sum(len(v.encode(t)) for v in (STUDENT, TEACHER) for t in TEXTS)
    assert found.chunks == sum(map(len, alignments))
    assert found.one_to_one_chunks == sum(int(a.one_to_one_C.sum()) for a in alignments)
    assert set(found.ns_per_token) == {"gold", "bytes", "python", "tokenizing"}
    assert set(found.times_gold) == {"bytes", "python", "tokenizing"}
    for name, times in found.times_gold.items():
        assert 0 < times.low <= times.median <= times.high, name
    assert "| a – b | small | " in align.table_row(found)
    assert align.table_row(found).count("|") == align.HEAD.splitlines()[0].count("|")


def test_wrong_chunks_and_changed_texts_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    changing = Vocabulary.load(families()["byte-level, NFKC and lower case"])
    with pytest.raises(ValueError, match="a changes 'The quick brown fox'…: the pair needs other texts"):
        measure(changing)

    def without_the_last(*arguments: Any) -> Alignment:
        found = chunks_of(*arguments)
        return Alignment(found.chunks[:-1], found.ends_C[:-1])

    monkeypatch.setattr(align, "chunks_of", without_the_last)
    with pytest.raises(AssertionError, match="not those of plain Python"):
        measure()


class StandIn:
    """What is called of TRL's trainer, for tokenizers whose every character is a byte."""

    def __init__(self, walk: Callable[[Any, Any], Any], byte_level_only: bool) -> None:
        self.ULDLoss = SimpleNamespace(_align_by_byte_offsets=walk)
        self.GOLDTrainer = SimpleNamespace(_maybe_add_completion_byte_offsets=self.add)
        self.byte_level_only = byte_level_only

    def add(self, trainer: Any, piece: dict[str, Any]) -> None:
        import torch

        assert piece["labels"] is piece["input_ids"]
        lengths = [
            len(trainer._tokenizer.convert_ids_to_tokens([i])[0]) for i in piece["input_ids"][0].tolist()
        ]
        ends = torch.tensor(lengths).cumsum(0)
        piece["byte_offsets"] = torch.stack([ends - torch.tensor(lengths), ends], dim=1)[None]

    def encode_with_byte_offsets(self, backend: Any, texts: list[str]) -> Any:
        if self.byte_level_only and "ByteLevel" not in repr(backend.decoder):
            raise NotImplementedError("ByteLevel only")
        found = []
        for sample, encoding in zip(
            texts, backend.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            at = [len(sample[:i].encode()) for i in range(len(sample) + 1)]
            found.append((encoding.ids, [(at[a], at[b]) for a, b in encoding.offsets]))
        return found


def right_walk(student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]) -> Any:
    shared = sorted({end for _, end in student} & {end for _, end in teacher})
    sides: Any = ([], [])
    for side, offsets in zip(sides, (student, teacher), strict=True):
        for low, high in zip([0, *shared], shared, strict=False):
            side.append([i for i, (start, end) in enumerate(offsets) if low <= start and end <= high])
    return sides


@pytest.fixture
def trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., align.Trl]:
    def make(
        teacher: Tokenizer, walk: Callable[[Any, Any], Any] = right_walk, only: bool = False
    ) -> align.Trl:
        for name, tokenizer in (("a", byte_level_bpe()), ("b", teacher)):
            (tmp_path / name).mkdir()
            tokenizer.save(str(tmp_path / name / "tokenizer.json"))
            (tmp_path / name / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "PreTrainedTokenizerFast"}'
            )
        monkeypatch.setattr(align, "tokenizer_path", lambda name: tmp_path / name)
        monkeypatch.setitem(sys.modules, "trl.experimental.gold.gold_trainer", StandIn(walk, only))
        return align.Trl("a", "b")

    return make


ASCII = ["The quick brown fox", "def add(a, b):\n    return a + b", "<eos> is text"]


@pytest.mark.parametrize(
    ("walk", "counts"),
    [
        (right_walk, {"equal": 2, "different": 0, "special": 1, "refused": 0}),
        (
            lambda s, t: ([[i for i, _ in enumerate(s)]], [[i for i, _ in enumerate(t)]]),
            {"different": 2, "special": 1},
        ),
    ],
)
def test_groups_of_trl_are_held_to_the_chunks(
    walk: Callable[[Any, Any], Any], counts: dict[str, int], trl: Callable[..., align.Trl]
) -> None:
    other = byte_level_bpe(ASCII, vocab_size=300)
    teacher = Vocabulary.load(other)
    pairs = [(STUDENT.encode(sample), teacher.encode(sample)) for sample in ASCII]
    peer = trl(other, walk)
    assert peer.groups(ASCII, pairs) == {"equal": 0, "different": 0, "special": 0, "refused": 0} | counts
    works = peer.works(ASCII, pairs)
    assert set(works) == {"trl_walk", "trl_offsets"}
    assert works["trl_walk"]() == [
        walk(*([*zip(side.starts.tolist(), side.ends.tolist(), strict=True)] for side in pair))
        for pair in pairs
    ]


def test_a_tokenizer_that_trl_refuses_is_timed_without_its_offsets(trl: Callable[..., align.Trl]) -> None:
    found = measure(peer=trl(sentencepiece_bpe(), only=True))
    assert "trl_walk" in found.ns_per_token
    assert "trl" not in found.ns_per_token
    assert found.trl_groups["plain"] == {"equal": 0, "different": 0, "special": 0, "refused": 3}


def test_the_benchmark_prints_its_rows_without_trl_and_records_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, tokenizer in (("small", byte_level_bpe()), ("other", sentencepiece_bpe())):
        tokenizer.save(str(tmp_path / f"{name}.json"))
    monkeypatch.setattr(align, "tokenizer_path", lambda name: tmp_path / f"{name}.json")
    monkeypatch.setattr(align, "PAIRS", (("small", "other"),))
    monkeypatch.setattr(align, "trl_version", lambda: None)
    monkeypatch.setattr(align, "write_record", partial(align.write_record, folder=tmp_path))
    assert align.main(["--texts", "2", "--rounds", "1", "--record"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "TRL: not installed"
    assert [line.split(" | ")[:2] for line in lines[4:6]] == [
        ["| small – other", "2 of 4 kB"],
        ["| small – other", "as one"],
    ]
    record = json.loads((tmp_path / "align.json").read_text())
    assert record["command"] == "python -m benchmarks align --texts 2 --rounds 1 --record"
    assert record["data"]["trl"] is None
    assert [pair["ns_per_token"]["gold"]["median"] > 0 for pair in record["data"]["pairs"]] == [True, True]


def test_plain_texts_have_their_size_and_their_seed() -> None:
    texts = plain_texts(20, 4096)
    assert texts == plain_texts(20, 4096)
    assert texts != plain_texts(20, 4096, seed=1)
    for sample in texts:
        assert 3900 < len(sample.encode()) < 4200
        assert unicodedata.is_normalized("NFC", sample)
    assert "return" in "".join(texts)
    assert any("\u3040" <= c <= "\u30ff" for c in "".join(texts))
