"""Scores of an alignment: the models' own log-probabilities, each of the token given everything before it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import save_pair, tiny_student, tiny_teacher
from typer.testing import CliRunner

from benchmarks.assets import assets_folder
from gold.cli import app
from gold.errors import DataError, ModelError
from gold.inspect import score
from gold.inspect.score import PairScorer
from gold.inspect.view import AlignmentView, TokenizedSide, describe
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.models.language_model import LanguageModel
from gold.models.padding import PaddedStates

TEXT = " 24 +7 -3 = 31 28"


@pytest.fixture(scope="module")
def scorer() -> PairScorer:
    return PairScorer(tiny_student(), tiny_teacher())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    student, teacher = save_pair(tmp_path_factory.mktemp("models"))
    return str(student), str(teacher)


def view_of(scorer: PairScorer, text: str | bytes = TEXT, **beside: object) -> AlignmentView:
    sides = [
        TokenizedSide("model", vocabulary, vocabulary.encode(text), 1.0, **beside)  # type: ignore[arg-type]
        for vocabulary in scorer.vocabularies
    ]
    return AlignmentView(*sides)


@torch.no_grad()
def plain_logp(model: LanguageModel, ids: list[int]) -> np.ndarray:
    """log p(ids[k] | ids[:k]) for k ≥ 1, and of stopping after each: one forward pass of the whole model."""
    logits = model.lm(input_ids=torch.tensor([ids])).logits[0].double()
    logp = torch.log_softmax(logits, -1)
    picked = logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    stops = torch.logsumexp(logp[:, list(model.vocabulary.stop_ids)], -1)
    return np.array([picked.tolist(), stops[1:].tolist()])


def test_every_token_is_scored_given_what_is_before_it(scorer: PairScorer) -> None:
    view = scorer.score(view_of(scorer))
    for model, side in zip((scorer.student, scorer.teacher), view.sides, strict=True):
        # Both tokenizers put a BOS in front, and the picture says so.
        assert side.bos_id == model.tokenizer.bos_token_id
        expected = plain_logp(model, [side.bos_id, *side.tokenized.ids.tolist()])[0]
        assert side.logp_N == pytest.approx(expected, abs=1e-4)
        assert side.stop_logp is None
        ids = [side.bos_id, *side.tokenized.ids.tolist()]
        prob = torch.softmax(model.lm(input_ids=torch.tensor([ids])).logits[0, :-1].double(), -1)
        assert side.entropy_N == pytest.approx((-(prob * prob.log()).sum(-1)).tolist(), abs=1e-4)


def test_a_prompt_is_before_the_text_and_the_stop_event_after_it(scorer: PairScorer) -> None:
    prompts = [tuple(v.encode(" 12 +").ids.tolist()) for v in scorer.vocabularies]
    view = view_of(scorer)
    sides = [
        TokenizedSide("model", s.vocabulary, s.tokenized, 1.0, prompt_ids=p, stop_ids=s.vocabulary.stop_ids)
        for s, p in zip(view.sides, prompts, strict=True)
    ]
    for model, side in zip(
        (scorer.student, scorer.teacher), scorer.score(AlignmentView(*sides)).sides, strict=True
    ):
        assert side.prompt_ids is not None
        logp, stops = plain_logp(model, [*side.prompt_ids, *side.tokenized.ids.tolist()])
        assert side.logp_N == pytest.approx(logp[len(side.prompt_ids) - 1 :], abs=1e-4)
        assert side.stop_logp == pytest.approx(stops[-1], abs=1e-4)
        assert side.bos_id is None


def test_with_nothing_before_it_the_first_token_has_no_probability(
    scorer: PairScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gold.inspect.score.adds_bos", lambda tokenizer: False)
    view = scorer.score(view_of(scorer))
    for model, side in zip((scorer.student, scorer.teacher), view.sides, strict=True):
        assert side.logp_N is not None
        assert np.isnan([side.logp_N[0], side.entropy_N[0]]).all()  # type: ignore[index]
        expected = plain_logp(model, side.tokenized.ids.tolist())[0]
        assert side.logp_N[1:] == pytest.approx(expected, abs=1e-4)
    for text in ("", "7"):
        for beside in ({}, {"stop_ids": (2,)}):
            short = scorer.score(view_of(scorer, text, **beside))
            assert [len(side.logp_N) for side in short.sides] == [len(s) for s in short.sides]  # type: ignore[arg-type]
            assert (short.student.stop_logp is None) == (text == "" or not beside)


def test_a_model_beside_itself_differs_by_nothing() -> None:
    model = tiny_student()
    scorer = PairScorer(model, model)
    view = scorer.score(view_of(scorer))
    assert view.score is not None
    assert view.score.reverse_kl_sample_nats_per_byte == 0
    assert view.exact is not None
    assert view.exact.exact_reverse_kl_nats_per_byte == pytest.approx(0, abs=1e-6)
    assert 0 <= view.exact.unresolved_mass == view.exact.teacher_unresolved_mass < 0.01
    assert view.score.student_bits_per_byte == view.score.teacher_bits_per_byte > 0


def test_what_a_model_rules_out_has_no_probability(
    scorer: PairScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a token nor the stop event; what is shown of them is no infinity."""
    plain = score.lazy_logits

    def without(lm: object, states: PaddedStates) -> LazyLogits:
        logits = plain(lm, states).logits()
        return GivenLogits(logits.index_fill(1, torch.tensor([0, 1, 2, 5]), -torch.inf))

    monkeypatch.setattr(score, "lazy_logits", without)
    for text in (TEXT, "a\u0301 \ud7ff".encode()[:-1], b"\xff 24\xf0\x9f"):
        stop_ids = scorer.student.vocabulary.stop_ids, scorer.teacher.vocabulary.stop_ids
        view = view_of(scorer, text)
        sides = (replace(side, stop_ids=ids) for side, ids in zip(view.sides, stop_ids, strict=True))
        shown = scorer.score(AlignmentView(*sides))
        assert all(side.stop_logp is None for side in shown.sides)
        json.dumps(describe(shown), allow_nan=False)


def test_what_a_model_cannot_read_is_named(scorer: PairScorer) -> None:
    with pytest.raises(DataError, match=r"model: the text takes \d+ tokens, its context is \d+"):
        scorer.score(view_of(scorer, "7" * 5000))
    vocabulary = scorer.student.vocabulary
    beyond = TokenizedSide("model", vocabulary, vocabulary.decode([vocabulary.size + 3], rows=10_000), 1.0)
    with pytest.raises(DataError, match=f"id {vocabulary.size + 3} has no row"):
        scorer.score(AlignmentView(beyond, beyond))


def test_the_command_scores(folders: tuple[str, str], tmp_path: Path) -> None:
    arguments = ["align", "--student", folders[0], "--teacher", folders[1], "--score", TEXT]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    for side in ("student", "teacher"):
        assert len(found[side]["logp"]) == len(found[side]["ids"])
        assert all(x < 0 for x in found[side]["logp"])
    assert found["score"]["scored_bytes"] == found["bytes"]
    exact = found["exact"]
    assert 0 <= exact["least_reverse_kl_nats_per_byte"] <= exact["exact_reverse_kl_nats_per_byte"]
    gap = sum(found["student"]["logp"]) - sum(found["teacher"]["logp"])
    assert found["score"]["reverse_kl_sample_nats_per_byte"] == pytest.approx(gap / found["bytes"], abs=1e-5)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, [*arguments, "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert "bits per byte: " in done.stdout
    assert 'class="k p' in page.read_text()


def test_the_student_s_own_ids_are_scored_as_they_are(folders: tuple[str, str]) -> None:
    scorer = PairScorer.load(*folders)
    vocabulary = scorer.student.vocabulary
    singles = [
        next(i for i in range(vocabulary.size) if vocabulary.token_bytes(i) == bytes([b])) for b in b"12 +"
    ]
    arguments = ["align", "--student", folders[0], "--teacher", folders[1], "--score", "--json"]
    stop = vocabulary.stop_ids[0]
    done = CliRunner().invoke(app, [*arguments, "--ids", str([*singles, stop])])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["student"]
    bos = scorer.student.tokenizer.bos_token_id
    logp, stops = plain_logp(scorer.student, [bos, *singles])
    assert found["ids"] == singles
    assert found["logp"] == pytest.approx(logp, abs=1e-4)
    assert found["stop_logp"] == pytest.approx(stops[-1], abs=1e-4)


def test_a_source_without_weights_is_refused(folders: tuple[str, str]) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is"):
        PairScorer.load(f"{folders[0]}/tokenizer.json", folders[1])
    with pytest.raises(ModelError, match=r"no file none\.gguf"):
        PairScorer.load(f"{folders[0]}/none.gguf", folders[1])


@pytest.mark.slow
@pytest.mark.assets("smollm2-135m-instruct", "gemma3-270m")
def test_real_models_find_text_likely() -> None:
    arguments = ["align", "--score", "--json"]
    for side, name in (("student", "smollm2-135m-instruct"), ("teacher", "gemma3-270m")):
        arguments += [f"--{side}", str(assets_folder() / name)]
    done = CliRunner().invoke(app, [*arguments, "The capital of France is Paris, and that of Italy is Rome."])
    assert done.exit_code == 0, done.output
    score = json.loads(done.stdout)["score"]
    assert 0.3 < score["student_bits_per_byte"] < 1.5
    assert 0.3 < score["teacher_bits_per_byte"] < 1.5
