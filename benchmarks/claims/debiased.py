"""ALM's loss as its authors train with it: chunks that end where a word may end, and the probability that it does."""

from __future__ import annotations

import torch
from torch import Tensor

from gold.align.batch import BatchSide
from gold.kernels import chunk_sums
from gold.kernels.logits import LazyLogits
from gold.losses import Loss, LossInputs, Row
from gold.losses.divergences import Share
from gold.losses.policy import Positive
from gold.losses.published import EXCEPTIONS, _chunks, whole_chunks
from gold.losses.types import student_target_logp, teacher_target_logp

SPACES = b" \t\n"
"""A token that begins with one of these begins a word."""
_CERTAIN = 1e-6


def alm_debiased(inputs: LossInputs, *, temperature: Positive = 100.0, threshold: Share = 0.1) -> Loss:
    """``gold.losses.published.alm`` on chunks that are joined until the teacher's probability that the next token
    begins a word, or is special, is above ``threshold``; each side's likelihood of a joined chunk is multiplied by its
    own such probability at the chunk's end.

    The last chunk of a text has no such factor. Only for rows of all tokens, and for one teacher.

    Source: Minixhofer et al. 2503.20083, debiasing for possible continuations; ``compute_alm_loss`` of tokenkit
    (github.com/bminixhofer/tokenkit) with ``merge_by_space_prob+append_space``, ``binary_ce`` (its gradient is that of
    this KL), ``binarization_temp`` 100, ``tokenizer_pair_bias_threshold`` 0.1 and ``space+tab+newline+special``. There
    the mean is over joined chunks, here over those before joining.
    """
    batch, chunks = inputs.batch, _chunks(inputs.batch)
    mine, theirs = student_target_logp(inputs).event, teacher_target_logp(inputs).event
    ends_S, last_S = _word_ends(batch.student, inputs.student, chunks.chunk_S, chunks.count)
    total_S = chunk_sums(mine, chunks.chunk_S, chunks.count)
    with torch.no_grad():
        ends_T, _ = _word_ends(batch.teacher, inputs.teacher_rows, chunks.chunk_T, chunks.count)
        total_T = chunk_sums(theirs, chunks.chunk_T, chunks.count)
        text = torch.nn.functional.pad(batch.row_text[last_S], (0, 1), value=-1)
        whole = (text[1:] != text[:-1]) | (ends_T.exp() > threshold)
        joined = torch.cumsum(whole, 0) - whole.long()
    logp, logq = (
        total.new_zeros(int(whole.sum())).index_add(0, joined, total + torch.where(whole, ends, 0.0))
        for total, ends in ((total_S, ends_S), (total_T, ends_T))
    )
    return Loss(bernoulli_kl(logp, logq, temperature).sum().to(mine.dtype))


def bernoulli_kl(logp: Tensor, logq: Tensor, temperature: float) -> Tensor:
    """KL of two coins that show heads with probability q and p, each to the power of 1 / temperature, in nats."""
    log_a, log_b = (side.double() / temperature - _CERTAIN for side in (logq, logp))
    log_not_a, log_not_b = (torch.log(-torch.expm1(side)) for side in (log_a, log_b))
    return log_a.exp() * (log_a - log_b) - torch.expm1(log_a) * (log_not_a - log_not_b)


def _word_ends(side: BatchSide, rows: LazyLogits, chunk: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each chunk the log-probability that the token after it begins a word or is special, 0 where its text has no
    further row; and the chunk's last row."""
    row = torch.arange(len(chunk))
    last = torch.full((count,), -1).scatter_reduce(0, chunk[chunk >= 0], row[chunk >= 0], "amax")
    inner = ~torch.isin(last, torch.from_numpy(side.row_starts[1:] - 1))
    begins = torch.tensor([_begins_a_word(side, token) for token in range(rows.width)])
    logp = torch.log_softmax(rows.select(last[inner] + 1).logits().float(), -1)
    found = logp.new_zeros(count).masked_scatter(inner, torch.logsumexp(logp[:, begins], -1))
    return found, last


def _begins_a_word(side: BatchSide, token: int) -> bool:
    spelled = side.vocabulary.token_bytes(token) if token < side.vocabulary.size else b""
    return not spelled or spelled[0] in SPACES


ROW = Row(
    "alm_debiased",
    alm_debiased,
    needs="rows",
    unit="chunk",
    count=whole_chunks,
    exceptions=EXCEPTIONS["alm"],
    weighted=False,
)
"""Its row, for the table of objectives."""
