"""Diagnosis of a step whose loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from gold.align.model_inputs import student_states
from gold.kernels.lm_head import token_logp
from gold.kernels.logits import LazyLogits
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.rollout.types import Rollout


@torch.no_grad()
def why_not_finite(
    student: LanguageModel,
    rollouts: Sequence[Sequence[Rollout]],
    teachers: Mapping[str, Sequence[tuple[Rollout, LazyLogits]]],
    terms: Mapping[str, float],
) -> tuple[str, str]:
    """The cause and what to do about it, from a step's rollouts by microbatch, the rows of each teacher for its
    rollouts, and each term's sum. Costs another forward pass."""
    for name, graded in teachers.items():
        for rollout, rows in graded:
            none = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            if torch.isnan(token_logp(rows, none, none[:0])[0]).any():
                return (
                    f"NaN logits of teacher {name} for prompt {rollout.prompt.key}",
                    "look at its weights, or load it with dtype float32",
                )
    stops = torch.tensor(student.vocabulary.stop_ids, dtype=torch.int64, device=student.device)
    for together in rollouts:
        chosen = [r for r in together if r.ids.size]
        if not chosen:
            continue
        rows = lazy_logits(student.lm, student_states(student, chosen))
        ids = torch.cat([torch.from_numpy(r.ids.astype("int64")) for r in chosen]).to(student.device)
        logp, _ = token_logp(rows, ids, stops)
        for rollout, mine in zip(chosen, logp.split([r.ids.size for r in chosen]), strict=True):
            if torch.isnan(mine).any():
                return (
                    f"NaN logits of the student for prompt {rollout.prompt.key}",
                    "go back to an earlier checkpoint with a lower optimizer.lr, since the weights are no numbers any "
                    "more; if this is the first step, look at its weights",
                )
            if torch.isneginf(mine).any() and not rollout.sampled:
                token = student.vocabulary.label(int(rollout.ids[int(torch.isneginf(mine).nonzero()[0])]))
                return (
                    f"a student that gives probability 0 to {token} in the completion of prompt {rollout.prompt.key}",
                    "leave that prompt out, or look at the token's row of its output matrix",
                )
    broken = [name for name, value in terms.items() if not math.isfinite(value)]
    if broken:
        return (
            f"a NaN or infinite {broken[0]}",
            "lower optimizer.lr, or look at the last lines of metrics.jsonl",
        )
    return (
        "a NaN or infinite gradient of a finite loss",
        "lower optimizer.lr, or compute in float32 (train.precision=no)",
    )
