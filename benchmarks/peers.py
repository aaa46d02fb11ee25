"""Losses of other toolkits, called as they are published: as objectives, on one text at a time, or on hidden states.

They are importable where the toolkit is installed; its own environment, with this package beside it, is the place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from types import SimpleNamespace

import torch
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.align.vocabularies import VocabularyPair
from gold.losses import Loss, LossInputs, Objective

OneText = Callable[[LossInputs, int, Tensor, Tensor], Tensor]
FromStates = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Student's states [N, D] and output matrix [V, D], then the teacher's, of one vocabulary: the sum over rows."""


def installed() -> dict[str, str]:
    """Versions of the toolkits whose losses can be called here."""
    found = {}
    for package in ("trl", "liger-kernel"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def losses() -> Iterator[tuple[str, Objective]]:
    """Every loss of a peer that is installed, by a name for people."""
    if "trl" in installed():
        yield from _of_trl()


def losses_from_states(device: torch.device) -> Iterator[tuple[str, FromStates | str]]:
    """JSD with β = ½ of two models with one vocabulary, [N, V] never stored: by name, or why it cannot be had."""
    if "trl" in installed():
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl(hidden_S: Tensor, matrix_S: Tensor, hidden_T: Tensor, matrix_T: Tensor) -> Tensor:
            value_N, _ = ChunkedDivergenceFunction.apply(
                hidden_S, matrix_S, None, hidden_T, matrix_T, None, 0.5
            )
            total: Tensor = value_N.sum()
            return total

        yield "TRL chunked JSD", trl
    else:
        yield "TRL chunked JSD", "TRL is not installed"
    if device.type != "cuda":
        yield "Liger chunked JSD", "needs a GPU"
    elif "liger-kernel" not in installed():
        yield "Liger chunked JSD", "Liger is not installed"
    else:
        module = import_module("liger_kernel.chunked_loss")
        function = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)

        def liger(hidden_S: Tensor, matrix_S: Tensor, hidden_T: Tensor, matrix_T: Tensor) -> Tensor:
            rows = hidden_S.shape[0]
            labels = torch.zeros(rows, dtype=torch.int64, device=hidden_S.device)
            mean: Tensor = function(hidden_S, matrix_S, hidden_T, matrix_T, labels)
            return mean * rows

        yield "Liger chunked JSD", liger


def _of_trl() -> Iterator[tuple[str, Objective]]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gold.gold_trainer import GOLDTrainer, ULDLoss

    def settings(**changed: object) -> SimpleNamespace:
        published = {
            "uld_crossentropy_weight": 0.0,
            "uld_distillation_weight": 1.0,
            "uld_student_temperature": 1.0,
            "uld_teacher_temperature": 1.0,
            "uld_skip_student_eos": True,
            "uld_skip_teacher_eos": True,
            "use_extended_uld": True,
            "uld_token_merge_strategy": "observed",
            "uld_use_hybrid_loss": False,
            "uld_hybrid_matched_weight": None,
            "uld_hybrid_unmatched_weight": None,
            "beta": 0.5,
        }
        return SimpleNamespace(**(published | changed))

    def across(config: SimpleNamespace) -> OneText:
        functions: dict[tuple[VocabularyPair, torch.device], ULDLoss] = {}

        def of_text(inputs: LossInputs, b: int, mine: Tensor, theirs: Tensor) -> Tensor:
            pair, text, device = inputs.batch.vocabularies, inputs.batch.texts[b], mine.device
            # Its map of the two vocabularies is made once a run.
            if (pair, device) not in functions:
                tokenizers = pair.student.tokenizer, pair.teacher.tokenizer
                functions[pair, device] = ULDLoss(config, *tokenizers, device=device)
            function = functions[pair, device]
            sides = []
            for logits, tokenized, stops in (
                (mine, text.student, pair.student.stop_ids),
                (theirs, text.teacher, pair.teacher.stop_ids),
            ):
                # One token of prompt before the completion; logits at a place predict the token after it.
                ids = [0, *tokenized.ids.tolist(), *([stops[0]] * text.stopped)]
                spans = zip(tokenized.starts.tolist(), tokenized.ends.tolist(), strict=True)
                offsets = [(0, 0), *spans, *([(len(text.student.data),) * 2] * text.stopped)]
                after_the_last = logits.new_zeros(len(ids) - logits.shape[0], logits.shape[1])
                labels = torch.tensor([[-100, *ids[1:]]], device=device)
                sides.append(
                    (
                        torch.cat((logits, after_the_last))[None],
                        labels,
                        torch.tensor([ids]),
                        torch.tensor([offsets]),
                    )
                )
            (logits_S, labels_S, ids_S, offsets_S), (logits_T, labels_T, ids_T, offsets_T) = sides
            value: Tensor = function(
                logits_S, logits_T, labels_S, labels_T, ids_S, ids_T, offsets_S, offsets_T
            )
            return value.reshape(())

        return of_text

    def jsd(inputs: LossInputs, b: int, mine: Tensor, theirs: Tensor) -> Tensor:
        value: Tensor = GOLDTrainer.generalized_jsd_loss(mine[None], theirs[None], beta=0.5, reduction="sum")
        return value

    uld = settings()
    hybrid = settings(uld_use_hybrid_loss=True)
    chained = settings(uld_use_hybrid_loss=True, uld_token_merge_strategy="bayesian")
    yield "TRL ULD, extended", _objective("trl uld", across(uld))
    yield "TRL GOLD, default merge", _objective("trl gold", across(hybrid))
    yield "TRL GOLD, bayesian merge", _objective("trl gold", across(chained))
    yield (
        "TRL generalised JSD, one vocabulary",
        Objective("gkd", _by_text(jsd), "rows", "text", _texts, {"beta": 0.5, "support": "tokens"}),
    )


def _objective(name: str, of_text: OneText) -> Objective:
    return Objective(name, _by_text(of_text), "rows", "text", _texts)


def _texts(batch: AlignedBatch) -> float:
    return float(len(batch.texts))


def _by_text(of_text: OneText) -> Callable[[LossInputs], Loss]:
    def loss(inputs: LossInputs) -> Loss:
        batch = inputs.batch
        logits, logits_T = (rows.logits() for rows in (inputs.student, inputs.teacher_rows))
        total = logits.new_zeros(())
        for b in range(len(batch.texts)):
            mine = logits[int(batch.student.row_starts[b]) : int(batch.student.row_starts[b + 1])]
            theirs = logits_T[int(batch.teacher.row_starts[b]) : int(batch.teacher.row_starts[b + 1])]
            if mine.shape[0]:
                total = total + of_text(inputs, b, mine, theirs)
        return Loss(total)

    return loss
