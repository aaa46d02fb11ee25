"""The claims about pairs of tokenizers: what is counted, what is trained, and that the pages show the records."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import coverage, pairs
from benchmarks.claims.cells import Given
from benchmarks.claims.languages import texts_by_kind
from benchmarks.claims.pair_models import TOKENIZERS, Model, Sizes, make
from benchmarks.record import RESULTS
from gold.tokenize.vocabulary import Vocabulary

ROOT = RESULTS.parents[1]
VOCABULARIES = {name: Vocabulary.load(make()) for name, make in TOKENIZERS.items()}


class InTurn:
    """Cells that run here, one after another, and are not kept."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def all(
        self, work: Callable[[Any, Path], Mapping[str, Any]], jobs: Sequence[Any]
    ) -> list[Mapping[str, Any]]:
        return [work(job, self.made) for job in jobs]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("characters", [" ", "3", "1", " ", "+", "7", " ", "="]),
        ("words", [" 31", " +", "7", " ="]),
        ("digits", [" ", "3", "1", " +", "7", " ="]),
        ("numbers", [" ", "31", " ", "+", "7", " ", "="]),
    ],
)
def test_the_tokenizers_differ_as_they_are_named(name: str, read: list[str]) -> None:
    vocabulary = VOCABULARIES[name]
    ids = vocabulary.encode(" 31 +7 =").ids.tolist()
    assert [vocabulary.token_bytes(index).decode() for index in ids] == read


def test_shares_by_hand() -> None:
    # · 3 1 · 2 8 against · 31 · 28: two spaces are one to one, four digits are not, four chunks begin in step.
    found = coverage.shares_of(VOCABULARIES["digits"], VOCABULARIES["numbers"], [" 31 28"])
    assert found == {
        "one_to_one_tokens": round(2 / 6, 4),
        "one_to_one_bytes": round(2 / 6, 4),
        "synced_positions": round(4 / 6, 4),
        "missed_digits": 1.0,
        "chunk_tokens": 1.5,
        "chunk_bytes": 1.5,
        "largest_chunk_bytes": 2,
        "bytes": 6,
    }


def test_the_vocabulary_that_is_shared_is_counted_from_the_student() -> None:
    # All 14 characters are tokens of both; the student has three signs with a space besides.
    assert coverage.shared_vocabulary(VOCABULARIES["digits"], VOCABULARIES["numbers"]) == round(14 / 17, 4)
    assert coverage.shared_vocabulary(VOCABULARIES["characters"], VOCABULARIES["digits"]) == 1.0


def test_texts_are_of_every_kind_and_size() -> None:
    texts = texts_by_kind(1500)
    assert list(texts) == ["English", "code", "German", "Chinese", "numbers"]
    for kind, passages in texts.items():
        assert 900 < sum(len(text.encode()) for text in passages) <= 1500, kind
    assert texts == texts_by_kind(1500)


@pytest.mark.slow
def test_pairs_run_and_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "PEERS", tmp_path / "none")
    data = pairs.measure(Given(InTurn(tmp_path), 1, True))  # type: ignore[arg-type]
    assert [row["way"] for row in data["rows"]] == ["reverse KL on bytes", "ALM as published, λ 0"]
    for row in data["rows"]:
        assert row["pair"] == "digits split by the student"
        assert row["stop_rate"]["half"] is None
    assert data["pairs"]["digits split by the student"]["texts"]["texts"] > 0
    assert "` ·4·1· ·3·9· ·3·4` ← ` ·41· ·39· ·34`" in pairs.table(data)
    assert json.loads(json.dumps(data)) == data
    pairs.draw(data, tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").stat().st_size > 5000


def _row(way: str, accuracy: float) -> dict[str, Any]:
    result = {"accuracy": accuracy, "reverse_kl_per_byte": 1.5, "length_bytes": 9.0, "stop_rate": 1.0}
    return pairs.row(way, "a pair", 1e-3, [{**result, "cpu_s": 3.0}] * 3)


def test_the_table_is_sorted_and_tells_why_a_way_has_no_numbers(tmp_path: Path) -> None:
    failed = pairs.row("other", "a pair", 1e-3, [{"error": "ValueError: no | offsets"}] * 3)
    side = {"accuracy": 0.9, "reads": "a|b"}
    start = {"accuracy": 0.1, "reverse_kl_per_byte": 3.0, "length_bytes": 9.0, "stop_rate": 1.0}
    data = {
        "pairs": {"a pair": {"student": side, "teacher": side, "start": start}},
        "rows": [_row("worse", 0.2), failed, _row("better", 0.4)],
    }
    lines = pairs.table(data).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        *("*teacher*", "better", "worse", "other", "*start*")
    ]
    assert "failed: ValueError: no / offsets" in lines[5]
    assert "40.0% ± 0.0" in lines[3]
    pairs.draw(data, tmp_path / "pairs.png")


def test_a_rate_that_fails_is_not_chosen() -> None:
    good, better = ({"accuracy": 0.1, "reverse_kl_per_byte": kl} for kl in (2.0, 1.0))
    assert pairs.quality({"error": "no"}) < pairs.quality(good) < pairs.quality(better)


@pytest.mark.parametrize("part", [coverage, pairs])
def test_the_page_shows_the_record(part: Any) -> None:
    name = part.__name__.rpartition(".")[2]
    data = json.loads((RESULTS / f"claims-{name}.json").read_text(encoding="utf-8"))["data"]
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert part.table(data) in page
    assert f"benchmarks/results/claims-{name}.png" in page
    assert (RESULTS / f"claims-{name}.png").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not pairs.PEERS.is_file(), reason="no .venv-peers: make bench-peers")
def test_the_other_trainer_begins_with_the_same_student(tmp_path: Path) -> None:
    sizes = Sizes(200, 150, 100, 16, 32)
    pair = "digits split by the student"
    for model in (Model("digits", "student", sizes), Model("numbers", "teacher", sizes)):
        make(model, tmp_path)
    pairs.write(pairs.Texts(pair, sizes), tmp_path)
    begun = pairs.begin(pairs.Start(pair, sizes), tmp_path)
    # One step that changes nothing: what is measured afterwards is the student and the teacher as they were.
    for way in pairs.TRL:
        kept = pairs.run(pairs.Run(way, pair, 1e-9, 0, 1, 4, sizes), tmp_path)
        assert begun.items() <= kept.items()
