"""Scores of one text by two models, token by token: the log-probabilities of `gold align --score`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gold import terminal
from gold.errors import DataError, ModelError
from gold.inspect.exact import exact_score
from gold.inspect.view import AlignmentView, TokenizedSide
from gold.kernels.lm_head import token_statistics
from gold.models.adapters import describe, is_adapted
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel, output_width
from gold.models.load import load_model
from gold.models.padding import PaddedStates
from gold.tokenize.chat import adds_bos
from gold.tokenize.vocabulary import Vocabulary


class PairScorer:
    """Two models, for the texts of an alignment."""

    def __init__(self, student: LanguageModel, teacher: LanguageModel) -> None:
        self.student, self.teacher = student, teacher

    @classmethod
    def load(cls, student: str, teacher: str) -> PairScorer:
        """The models of two folders, Hub ids or GGUF files, in float32.

        Raises: ModelError, VocabularyError as for ``load_model``.
        """
        mine = _load(student)
        theirs = mine if teacher == student else _load(teacher)
        for model in {id(m): m for m in (mine, theirs)}.values():
            if is_adapted(model.lm):
                terminal.show(f"model {model.name}: {describe(model.lm)}", stream=sys.stderr)
        return cls(mine, theirs)

    @property
    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """Both vocabularies."""
        return self.student.vocabulary, self.teacher.vocabulary

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        """Both tokenizers, with their chat templates."""
        return self.student.tokenizer, self.teacher.tokenizer

    def score(self, view: AlignmentView) -> AlignmentView:
        """The text with each token's log-probability and the entropy before it, the stop event's log-probability, and
        the exact divergence along it.

        The text follows the prompt, else BOS if the student's own ids began with one or the tokenizer adds one; if
        there is neither, the first token has no log-probability. A token or stop event of probability 0 has none
        either.

        Raises: DataError for a text that exceeds a model's context, or has ids beyond a model's rows.
        """
        scored = AlignmentView(_scored(self.student, view.student), _scored(self.teacher, view.teacher))
        return replace(scored, exact=exact_score(scored, self.student, self.teacher))


def _load(source: str) -> LanguageModel:
    path = Path(source)
    if path.suffix == ".gguf":
        return load_model(path.parent, gguf_file=path.name)
    if path.is_file():
        raise ModelError(
            f"{source} is a tokenizer without weights, and --score needs both models: give their folders or Hub ids, "
            "or leave --score out"
        )
    return load_model(source)


@torch.no_grad()
def _scored(model: LanguageModel, side: TokenizedSide) -> TokenizedSide:
    ids = side.tokenized.ids
    if side.prompt_ids is None and side.bos_id is None and adds_bos(model.tokenizer):
        side = replace(side, bos_id=model.tokenizer.bos_token_id)
    before = list(side.prompt_ids or (() if side.bos_id is None else (side.bos_id,)))
    if len(before) + len(ids) > model.context:
        raise DataError(
            f"{side.name}: the text takes {len(before) + len(ids)} tokens, its context is {model.context}; "
            "give a shorter one"
        )
    if len(ids) and ids.max() >= output_width(model.lm):
        raise DataError(
            f"{side.name}: id {ids.max()} has no row in its output matrix of {output_width(model.lm)}"
        )
    logp, entropy = np.full((2, len(ids)), np.nan)
    unscored = 0 if before else 1
    target = np.append(ids[unscored:], [-1] if side.stop_ids else []).astype(np.int64)
    if len(ids) < unscored or not len(target):
        return replace(side, logp_N=logp, entropy_N=entropy)
    states = PaddedStates.of(
        [before or ids[:1].tolist()], [ids[unscored:]], [len(target)], model.pad_id, model.device
    )
    stops = torch.tensor(side.stop_ids, dtype=torch.int64, device=model.device)
    log_target, log_stop, unsure = token_statistics(
        lazy_logits(model.lm, states), torch.from_numpy(target).to(model.device), stops
    )
    found = log_target[: len(ids) - unscored].double().cpu().numpy()
    logp[unscored:] = np.where(np.isfinite(found), found, np.nan)
    entropy[unscored:] = unsure[: len(ids) - unscored].double().cpu().numpy()
    stop_logp = float(log_stop[-1]) if side.stop_ids and torch.isfinite(log_stop[-1]) else None
    return replace(side, logp_N=logp, stop_logp=stop_logp, entropy_N=entropy)
