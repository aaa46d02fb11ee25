"""Time and memory of losses: the meter, errors against float64, what is refused, and the record; small tokenizers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tokenizers import EOS_ID, byte_level_bpe, sentencepiece_bpe

from benchmarks import loss
from benchmarks.loss import Bench, Case, Inputs, Limits, Loss
from benchmarks.meter import Meter
from gold.align.vocabularies import VocabularyPair
from gold.tokenize.vocabulary import Vocabulary

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LIMITS = Limits(call_s=60.0, case_s=60.0, rounds=1, exact_tokens=64, deadline=math.inf)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small vocabularies in the place of the real ones, matrices with rows to spare."""
    found = {
        name: Vocabulary.load(tokenizer, stop_ids=[EOS_ID])
        for name, tokenizer in (("a", byte_level_bpe()), ("b", sentencepiece_bpe()))
    }
    pairs = {(s, t): VocabularyPair(found[s], found[t]) for s in found for t in found}
    monkeypatch.setattr(loss, "WIDTHS", {name: v.size + 3 for name, v in found.items()})
    monkeypatch.setattr(loss, "vocabularies", lambda s, t: pairs[s, t])
    monkeypatch.setattr(loss, "tokenizer_path", lambda name: name)
    monkeypatch.setattr(loss, "PAIRS", (("a", "b"), ("a", "a")))
    monkeypatch.setattr(loss, "FEW", 8)


def inputs(pair: tuple[str, str] = ("a", "b"), tokens: int = 24) -> Inputs:
    made = Inputs.of(Case(*pair, tokens, 16), CPU, torch.float32)
    made.draw(3)
    return made


@pytest.mark.skipif(Meter(CPU).free_bytes() is None, reason="Linux counts a process's memory, others do not")
def test_the_meter_sees_what_a_call_held_at_its_height_and_not_what_is_held_besides() -> None:
    kept = torch.ones(30 * 2**20)
    meter = Meter(CPU)

    def work() -> None:
        first = torch.ones(25 * 2**20)  # 100 MiB
        second = first + 1
        del first, second
        torch.ones(2**20)

    for _ in range(2):
        sample = meter(work)
        assert sample.peak_bytes is not None
        assert 195 < sample.peak_bytes / 2**20 < 225
        assert sample.seconds > 0
    assert kept.sum() == 30 * 2**20


def test_a_text_has_the_rows_that_were_asked_for_and_states_are_drawn_anew() -> None:
    made = inputs()
    batch = made.batch()
    assert loss.all_rows(batch) == (made.hidden_S.shape[0], made.hidden_T.shape[0])
    assert made.hidden_S.shape[0] == 24
    assert batch.texts[0].student.data == batch.texts[0].teacher.data
    first = made.hidden_S.detach().clone()
    made.draw(4)
    assert not torch.equal(first, made.hidden_S)
    made.draw(3)
    assert torch.equal(first, made.hidden_S)
    prob = torch.softmax(made.hidden_S.detach() @ made.matrix_S.detach().T, -1)
    own = prob.gather(1, batch.student.targets[:, None])
    assert own.max() > 0.9
    assert own.min() < 0.1


@pytest.mark.slow
def test_every_loss_agrees_with_its_definition_in_float64() -> None:
    bench = Bench(CPU, LIMITS)
    for pair in (("a", "b"), ("a", "a")):
        made = inputs(pair)
        for one in loss.losses_of(made.pair, CPU):
            if not one.note:
                value, gradients = bench._errors(one, made)
                assert value is not None
                assert gradients is not None
                assert 0 <= value < 1e-4, one.name
                assert 0 < gradients < 1e-3, one.name


def test_naive_jsd_is_the_objective_where_no_row_is_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {name: width - 3 for name, width in loss.WIDTHS.items()}
    monkeypatch.setattr(loss, "WIDTHS", widths)
    made = inputs(("a", "a")).in_float64
    ours, naive, *_ = loss.losses_of(made.pair, CPU)
    assert ours.value(made).item() == pytest.approx(naive.value(made).item(), rel=1e-9)


def test_a_wrong_gradient_shows_in_the_errors() -> None:
    made = inputs()
    right = next(loss.losses_of(made.pair, CPU))

    def scaled(given: Inputs) -> torch.Tensor:
        total = right.value(given)
        return total + 0.01 * (total - total.detach())

    value, gradients = Bench(CPU, LIMITS)._errors(Loss("x", scaled, loss.all_rows, right.value), made)
    assert value is not None
    assert value < 1e-4
    assert gradients == pytest.approx(0.01, rel=0.1)


def test_operations_are_those_of_the_products() -> None:
    made = inputs()
    rows = loss.all_rows(made.batch())
    mine, theirs = rows[0] * made.matrix_S.shape[0] * 16, rows[1] * made.matrix_T.shape[0] * 16
    assert loss.operations(made, rows) == 6 * mine + 2 * theirs
    loss.matrix_products(made)()
    assert made.hidden_S.grad is None


def test_a_case_has_a_row_for_every_loss() -> None:
    found = Bench(CPU, LIMITS).measure(Case("a", "b", 24, 16))
    assert found is not None
    assert found.rows_S == 24
    names = [row.name for row in found.rows]
    assert names[0] == "gold: reverse KL on bytes"
    assert names[-1] == "matrix products"
    for row in found.rows:
        if row.note:
            assert row.seconds is None
            assert row.note == "TRL is not installed"
            continue
        assert row.calls == 1
        assert row.seconds is not None
        assert row.fastest_s is not None
        assert 0 < row.fastest_s <= row.seconds.median
        assert row.times_gold is not None
        if row.name != "matrix products":
            assert row.gradient_error is not None
    text = loss.table(found)
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1
    assert "logits 0 MiB" in text


def test_a_baseline_that_takes_too_long_is_marked_and_not_called_with_more_tokens() -> None:
    bench = Bench(CPU, Limits(1e-9, 60.0, 1, 0, math.inf))
    found = bench.measure(Case("a", "a", 24, 16))
    assert found is not None
    assert {row.note for row in found.rows} >= {"over 1e-09 s"}
    assert {row.name for row in found.rows if row.seconds} == {"gold: JSD", "matrix products"}
    more = bench.measure(Case("a", "a", 48, 16))
    assert more is not None
    assert "not called: 0 s at 24 tokens" in {row.note for row in more.rows}
    made = inputs(("a", "a"), 48)
    ours, naive, *_ = loss.losses_of(made.pair, CPU)
    bench = Bench(CPU, LIMITS)
    case = Case("a", "a", 48, 16)
    for of, seconds, peak, note in (
        (naive, 31.0, 0.0, "not called: 31 s at 24 tokens"),
        (ours, 31.0, 0.0, ""),
        (ours, 29.0, 2.0**60, "does not fit: 1073741824 GiB at 24 tokens"),
        (naive, 29.0, 0.0, ""),
    ):
        bench._before["a", "a", 16, of.name] = (24, seconds, peak)
        assert bench._refused(case, of, made).split(",")[0] == note


def test_cases_that_come_too_late_are_named_and_the_record_holds_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--tokens", "16", "--hidden", "8", "--rounds", "1", "--record"]
    assert loss.main([*arguments, "--into", str(tmp_path), "--pairs", "1"]) == 0
    record = json.loads((tmp_path / "loss-cpu.json").read_text())
    told = "python -m benchmarks loss --device cpu --tokens 16 --hidden 8 --rounds 1 --record --pairs 1"
    assert record["command"] == told
    (case,) = record["data"]["cases"]
    assert (case["student"], case["teacher"], case["rows_S"]) == ("a", "a", 16)
    assert "| gold: JSD |" in capsys.readouterr().out
    assert loss.main([*arguments, "--into", str(tmp_path / "none"), "--budget", "1e-9"]) == 0
    assert "left out, no time: a ← b, 16 tokens, hidden 8" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_a_case_for_which_there_was_no_time_is_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Bench.measure

    def once(bench: Bench, case: Case) -> loss.Found | None:
        found = measure(bench, case)
        bench.limits = replace(bench.limits, deadline=0.0)
        return found

    monkeypatch.setattr(Bench, "measure", once)
    arguments = ["--device", "cpu", "--tokens", "16", "20", "--hidden", "8", "--rounds", "1", "--pairs", "1"]
    assert loss.main([*arguments, "--record", "--into", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "loss-cpu.json").read_text())
    assert len(record["data"]["cases"]) == 1
    assert record["data"]["left_out"] == ["a ← a, 20 tokens, hidden 8"]


def test_numbers_that_make_no_case_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["--pairs", "7"], "--pairs: choose of 0: a ← b"),
        (["--tokens", "0"], "1 or more"),
    ):
        with pytest.raises(SystemExit) as stopped:
            loss.main(["--device", "cpu", *arguments])
        assert stopped.value.code == 1
        assert told in capsys.readouterr().err


def test_the_default_cases_name_known_pairs() -> None:
    for gpu in (False, True):
        cases = loss.sweep(gpu)
        assert len(set(cases)) == len(cases)
        assert np.array(cases).min() >= 0
        assert max(case[0] for case in cases) <= 3
