"""Selected rows are those with the largest scores, and a sparse teacher is right on average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.claims import main
from benchmarks.claims.pair_models import TOKENIZERS
from benchmarks.claims.selection import SparseTeacher, selected_kl
from gold.demo.models import tiny_model
from gold.demo.running_sums import RunningSums
from gold.kernels.logits import LazyLogits
from gold.losses.divergences import reverse_kl
from gold.models.language_model import LanguageModel


def rows(*probs: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def test_rows_with_the_largest_score_alone_have_a_gradient_and_the_mean_is_theirs() -> None:
    logp = rows((0.5, 0.5), (0.9, 0.1), (0.99, 0.01), (0.6, 0.4)).requires_grad_()
    logq = rows((0.5, 0.5), (0.1, 0.9), (0.9, 0.1), (0.7, 0.3))
    whole = reverse_kl(logp, logq)
    for by, kept in (("divergence", 1), ("entropy", 0)):
        value = selected_kl(logp, logq, 0.25, by)  # type: ignore[arg-type]
        assert value.mean().item() == pytest.approx(whole[kept].item())
        (grad,) = torch.autograd.grad(value.sum(), logp)
        assert [bool(row.abs().sum() > 0) for row in grad] == [n == kept for n in range(4)]
    torch.testing.assert_close(selected_kl(logp, logq, 1.0), whole)


def test_a_side_without_an_event_has_an_entropy() -> None:
    logp = rows((1.0, 0.0), (0.5, 0.5))
    value = selected_kl(logp, rows((0.5, 0.5), (0.25, 0.75)), 0.5, "entropy")
    assert value[0].item() == 0.0
    assert value[1].item() > 0.0


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(TOKENIZERS["characters"](), "characters", layers=1, width=16, seed=0)


def told(model: LanguageModel, kept: int, drawn: int) -> LazyLogits:
    prompts = RunningSums().prompts("train", 1, 0)
    texts = [model.vocabulary.encode(prompts[0].completion or "")]
    return SparseTeacher(model, kept, drawn, 0).score(prompts, texts, [True])[0]


def test_what_a_sparse_teacher_draws_is_right_on_average(model: LanguageModel) -> None:
    full = told(model, model.vocabulary.size, 0).logits()[:, : model.vocabulary.size].exp()
    drawn = torch.stack([told(model, 2, 20_000).logits().double().exp()])[0]
    torch.testing.assert_close(drawn.sum(-1), torch.ones(len(drawn), dtype=torch.float64))
    torch.testing.assert_close(drawn, full, atol=0.01, rtol=0.0)
    one = told(model, 2, 1).logits().exp()
    assert (one > 0).sum(-1).tolist() == [3] * len(one)
    assert told(model, 2, 0).partial


@pytest.mark.slow
def test_the_small_form_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selection", "--small", "--seeds", "1", "--folder", str(tmp_path)]) == 0
    assert "forward KL, 1 told, 1 drawn" in capsys.readouterr().out
