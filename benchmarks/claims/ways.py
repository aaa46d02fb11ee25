"""The ways that `benchmarks.claims.pairs` compares: their objectives, and how many texts the student writes.

Those of others stand twice: as their loss alone, on the student's own texts like every way of gold, and as their
authors set them, which for most means texts that the teacher wrote, and cross-entropy on these. Rates, steps and batch
are those of all ways. What the authors' settings are, and where they were read, is in docs/evidence.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gold.train.recipe import Term


@dataclass(frozen=True)
class Way:
    """An objective of one or more terms; λ is the share of texts that the student writes, the teacher wrote the
    others."""

    terms: tuple[Term, ...]
    own: float = 1.0
    top_p: float = 1.0


def _on(name: str, **options: Any) -> Way:
    return Way((Term(name, **options),))


_SFT = Term("sft")
OWN_TEXTS: Mapping[str, Way] = {
    "reverse KL on bytes": _on("reverse_kl"),
    "forward KL on bytes": _on("forward_kl"),
    "forward KL on prefixes": _on("forward_kl", support="prefix"),
    "strict one-to-one": _on(
        "reverse_kl",
        support="shared",
        where="one_to_one",
        top_k=15,  # of the published 16 there are so many: 14 tokens that a pair shares, and the stop
        top_k_of="student",
        unshared="renormalise",
    ),
    "ALM": _on("alm"),
    "ALM, debiased": _on("alm_debiased"),
    "X-Token, P-KL": _on("x_token"),
    "X-Token, H-KL": _on("x_token", variant="h_kl"),
    "GOLD": _on("gold"),
    "ULD": _on("uld"),
    "reverse KL on shared tokens": _on("reverse_kl", support="shared"),
    "token_pg, clip 3, baseline": _on("token_pg", clip=3.0, baseline="others"),
}
"""One term, on texts of the student alone."""
TEACHERS_TEXTS: Mapping[str, Way] = {
    "imitation, λ 0": Way((_SFT,), 0.0),
    "imitation + forward KL on bytes, λ 0": Way((_SFT, Term("forward_kl")), 0.0),
    "forward KL on bytes, λ 0.25": Way((Term("forward_kl"),), 0.25, 0.95),
    "ULD as published, λ 0": Way((_SFT, Term("uld", weight=1.5)), 0.0),
    # A Bernoulli KL at temperature 100 has 1/100 of the gradient: the weight makes up for it, as their equal norms do.
    "ALM as published, λ 0": Way((_SFT, Term("alm_debiased", weight=100.0)), 0.0),
    "X-Token as published, λ 0": Way((Term("x_token"), Term("sft", weight=0.1)), 0.0),
    "GOLD as published, λ 0.25": Way((Term("gold", weight=2.0, beta=0.0, matched_share=0.5),), 0.25, 0.95),
}
"""Ways of others as published, and three of gold to compare them with."""
WAYS: Mapping[str, Way] = {**OWN_TEXTS, **TEACHERS_TEXTS}
TRL: Mapping[str, Mapping[str, Any]] = {
    "TRL's GOLD trainer": {},
    "TRL's GOLD trainer, bayesian merge": {
        "uld_token_merge_strategy": "bayesian",
        "uld_skip_student_eos": False,
        "uld_skip_teacher_eos": False,
    },
    "TRL's GOLD trainer as published, λ 0.25": {
        "lmbda": 0.25,
        "beta": 0.0,
        "top_p": 0.95,
        "uld_hybrid_matched_weight": 1.0,
        "uld_hybrid_unmatched_weight": 1.0,
    },
}
"""What differs from the trainer's defaults, besides the hybrid loss and what all its runs have in common; the last
is the command of GOLD's article."""
