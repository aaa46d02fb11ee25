"""Toy tokenizers that really disagree, toy models over them, and inputs of texts for the objectives."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.losses import LossInputs
from gold.tokenize.vocabulary import Vocabulary

CPU = torch.device("cpu")
BACKEND = "cpu"
"""The kernels of inputs that ask for none."""


def toy_vocabulary(
    merges: Sequence[str], letters: str = "ab ", shuffle: int = 0, cut: str | None = " ", unused: int = 0
) -> Vocabulary:
    """Byte-level BPE over a few letters with the given merges, such as ``a b``; ``cut`` stands alone in any text.

    ``shuffle`` numbers the ids another way; the last ids are ``unused`` special tokens.
    """
    symbol = {
        c: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(c)[0][0]
        for c in letters
    }
    pairs = [
        tuple(symbol[c] if c in symbol else "".join(symbol[x] for x in c) for c in m.split("+"))
        for m in merges
    ]
    tokens = ["<eos>", "<junk>", *symbol.values(), *("".join(p) for p in pairs)]
    if shuffle:
        np.random.default_rng(shuffle).shuffle(tokens)
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    steps = [pre_tokenizers.Split(cut, "isolated")] if cut else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<junk>", *(f"<unused{i}>" for i in range(unused))])
    return Vocabulary.load(tokenizer, stop_ids=[tokenizer.token_to_id("<eos>")])


@cache  # most tests ask for the same few models
def _draw(seed: int, context: tuple[bytes, ...], name: bytes) -> float:
    return float(np.random.default_rng((seed, zlib.crc32(repr((context, name)).encode()))).normal())


@dataclass
class ToyModel:
    """A row of logits for every context, each drawn once from the context itself; float64, with gradient if asked.

    ``longest``: contexts of that many tokens can only stop. ``extra`` rows stand for padding of the output matrix.
    """

    vocabulary: Vocabulary
    seed: int
    longest: int = 10**6
    extra: int = 0
    scale: float = 1.0
    requires_grad: bool = False
    never: tuple[str, ...] = ()
    rows: dict[tuple[bytes, ...], Tensor] = field(default_factory=dict)

    def row(self, context: Sequence[int]) -> Tensor:
        """Logits after a context of ids. Contexts are known by their tokens' bytes, so ids can be renamed."""
        vocabulary = self.vocabulary
        key = tuple(vocabulary.token_bytes(i) for i in context)
        if key not in self.rows:
            names = [
                vocabulary.token_bytes(i) or vocabulary.tokenizer.id_to_token(i).encode()
                for i in range(vocabulary.size)
            ]
            names += [b"padding %d" % i for i in range(self.extra)]
            draws = [_draw(self.seed, key, name) for name in names]
            logits = self.scale * torch.tensor(draws, dtype=torch.float64)
            if len(key) >= self.longest:
                stop = torch.zeros(len(names), dtype=torch.bool)
                stop[list(vocabulary.stop_ids)] = True
                logits = logits.masked_fill(~stop, -torch.inf)
            logits[[vocabulary.tokenizer.token_to_id(name) for name in self.never]] = -torch.inf
            self.rows[key] = logits.requires_grad_(self.requires_grad)
        return self.rows[key]

    def logp(self, context: Sequence[int]) -> Tensor:
        """Log-probabilities after a context."""
        return torch.log_softmax(self.row(context), -1)

    def states(self, ids: Sequence[int], rows: int) -> Tensor:
        """Logits of states 0 … rows − 1 along a text."""
        logits = [self.row(tuple(int(i) for i in ids[:k])) for k in range(rows)]
        return torch.stack(logits) if logits else self.row(())[None][:0]


def aligned(pair: VocabularyPair, ids: Sequence[int], **known: object) -> AlignedText:
    """A sampled text: ids, the stop id last if it is there."""
    stops = set(pair.student.stop_ids)
    stopped = bool(ids) and ids[-1] in stops
    tokenized = pair.student.decode(ids[:-1] if stopped else ids)
    known.setdefault("sampling_logprobs", np.full(len(ids), -1.5, np.float32))
    return AlignedText(np.array(ids, np.int32), tokenized, pair.to_teacher(tokenized), stopped, **known)  # type: ignore[arg-type]


def batch_of(pair: VocabularyPair, texts: Sequence[AlignedText]) -> AlignedBatch:
    """The texts as one microbatch."""
    return AlignedBatch(texts, pair, CPU)


def inputs_of(
    pair: VocabularyPair,
    texts: Sequence[AlignedText],
    student: Tensor | ToyModel,
    teacher: Tensor | ToyModel,
) -> LossInputs:
    """The inputs of a loss; models give their own states, tensors are taken as all rows."""
    batch = batch_of(pair, texts)
    return LossInputs(
        batch,
        GivenLogits(student_rows(student, texts) if isinstance(student, ToyModel) else student),
        GivenLogits(teacher_rows(teacher, texts) if isinstance(teacher, ToyModel) else teacher),
        GivenLogits(student_rows(ToyModel(pair.student, 99), texts)),
    )


def student_rows(model: ToyModel, texts: Sequence[AlignedText]) -> Tensor:
    """The student's states over all texts."""
    return torch.cat([model.states(t.student.ids, t.student.ids.size + t.stopped) for t in texts])


def teacher_rows(model: ToyModel, texts: Sequence[AlignedText]) -> Tensor:
    """The teacher's states over all texts."""
    return torch.cat([model.states(t.teacher.ids, t.teacher.ids.size + t.stopped) for t in texts])


def random_texts(pair: VocabularyPair, count: int, seed: int, longest: int = 7) -> list[AlignedText]:
    """Random id sequences of the student, stopped or not, empty ones among them."""
    rng = np.random.default_rng(seed)
    text_ids = [i for i in range(pair.student.size) if pair.student.token_bytes(i)]
    texts = []
    for n in range(count):
        ids = [int(i) for i in rng.choice(text_ids, rng.integers(0, longest))]
        stopped = bool(rng.random() < 0.6) or not ids
        texts.append(
            aligned(pair, [*ids, pair.student.stop_ids[0]] if stopped else ids, advantage=float(n % 3) - 1.0)
        )
    return texts


def counted(inputs: LossInputs, seen: list[int]) -> LossInputs:
    """The inputs with rows that note in ``seen`` how many of them are asked for their logits at once."""

    class Counted(GivenLogits):
        def logits(self) -> Tensor:
            seen.append(len(self))
            return self.logits_NV

    student, teacher = (Counted(rows.logits_NV) for rows in (inputs.student, inputs.teacher_rows))
    return replace(inputs, student=student, teacher=teacher)


def leaf(rows: LazyLogits) -> tuple[Tensor, LazyLogits]:
    """The logits of all rows, to be differentiated by, and the rows that have them."""
    given = isinstance(rows, GivenLogits)
    logits = (rows.logits_NV if given else rows.logits()).detach().requires_grad_(True)
    return logits, replace(rows, logits_NV=logits) if given else GivenLogits(logits)


class BranchStates:
    """The states of a toy model along some ids and behind branches of them; ``row(context)`` are its logits."""

    def __init__(self, row: Callable[[tuple[int, ...]], Tensor], ids: Sequence[int], rows: int) -> None:
        self.row, self.ids, self.rows = row, tuple(int(i) for i in ids), rows
        self.room = 10**6
        self.contexts: list[tuple[int, ...]] = []

    def path(self) -> GivenLogits:
        """The rows along the ids."""
        return GivenLogits(torch.stack([self.row(self.ids[:k]) for k in range(self.rows)]))

    def behind(self, parents: NDArray[np.int64], tokens: NDArray[np.int64]) -> GivenLogits:
        """The rows behind one more token each."""
        for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True):
            before = self.ids[: -1 - parent] if parent < 0 else self.contexts[parent]
            self.contexts.append((*before, token))
        return GivenLogits(torch.stack([self.row(c) for c in self.contexts[-len(parents) :]]))
