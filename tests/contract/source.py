"""One source of text, written by two models in their own tokenizers' tokens: there is nothing to learn between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.exact.divergence import ExactText
from gold.exact.marginals import marginals
from gold.losses import Objective
from gold.tokenize.vocabulary import Vocabulary
from tests.contract.toys import BranchStates, aligned, inputs_of, toy_vocabulary

NEVER = -40.0
"""The logit of what a model never writes."""


@dataclass(frozen=True)
class Side:
    """A toy tokenizer: merges over the letters; ``cut``, a letter that stands alone in any text; or ``fallback``, with
    a token for every byte beside the characters, and characters outside ``letters`` only as bytes."""

    merges: tuple[str, ...] = ()
    cut: str | None = None
    fallback: bool = False
    letters: str = ""

    def vocabulary(self, letters: str) -> Vocabulary:
        """Its vocabulary, over these letters."""
        if self.fallback:
            return _with_fallback(self.merges, self.letters or letters, letters)
        return toy_vocabulary(list(self.merges), letters=letters, cut=self.cut)

    def __str__(self) -> str:
        merges = " ".join(f"`{m.replace('+', '').replace(' ', '·')}`" for m in self.merges)
        parts = [merges or "letters"]
        if self.cut:
            parts.append(f"`{self.cut.replace(' ', '·')}` alone")
        if self.fallback:
            parts.append("bytes beside characters")
        return ", ".join(parts)


@dataclass(frozen=True)
class Pair:
    """Two tokenizers over some letters, and the length of the longest text."""

    student: Side
    teacher: Side
    letters: str = "ab"
    longest: int = 4


_WORDS = Side(("a+b", "b+a", "ab+a"))
PAIRS: Mapping[str, Pair] = {
    "other merges": Pair(_WORDS, Side(("b+a", "a+b", "ab+b"))),
    "merges and letters": Pair(_WORDS, Side()),
    "letters and merges": Pair(Side(), Side(("a+b", "ab+ab", "b+b"))),
    "other order": Pair(Side(("a+b", "b+a")), Side(("b+a", "a+b"))),
    "overlapping": Pair(Side(("a+b", "ab+a", "b+b")), Side(("b+a", "a+ba", "a+a"))),
    "repeated letters": Pair(Side(("a+a", "aa+aa")), Side(("a+a", "aa+a"))),
    "one merge more": Pair(Side(("a+b",)), Side(("a+b", "ab+b"))),
    "three letters": Pair(Side(("a+b", "b+c", "ab+c")), Side(("b+c", "a+bc", "c+a")), "abc", 3),
    "a space cut off": Pair(Side(("a+b", " +a"), cut=" "), Side(("b+ ", " +a", " a+b")), "ab ", 3),
    "spaces before and after": Pair(Side((" +a", " a+b")), Side(("a+ ", "b+ ", "b+a")), "ab ", 3),
    "byte fallback": Pair(Side(("a+b",), fallback=True), Side(("b+a", "a+b")), "ab", 4),
    "characters as bytes": Pair(Side(("a+é",), fallback=True), Side((), fallback=True, letters="a"), "aé", 3),
}
"""Pairs of toy tokenizers that write one text in other tokens."""


def _with_fallback(merges: tuple[str, ...], characters: str, letters: str) -> Vocabulary:
    spelled = sorted({byte for c in letters for byte in c.encode()})
    pairs = [tuple(m.split("+")) for m in merges]
    tokens = [
        "<eos>",
        "<junk>",
        *(f"<0x{b:02X}>" for b in spelled),
        *characters,
        *("".join(p) for p in pairs),
    ]
    model = models.BPE(
        vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, unk_token="<junk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<eos>", "<junk>"])
    return Vocabulary.load(tokenizer, stop_ids=[0])


@cache
def pair_of(name: str) -> VocabularyPair:
    """The vocabularies of a pair."""
    pair = PAIRS[name]
    return VocabularyPair(*(side.vocabulary(pair.letters) for side in (pair.student, pair.teacher)))


def texts_of(name: str, seed: int, longest: int = 10) -> Mapping[str, float]:
    """The texts of a source over the letters of a pair, of its longest length or the given one."""
    return source(seed, min(longest, PAIRS[name].longest), PAIRS[name].letters)


@cache
def source(seed: int, longest: int, letters: str = "ab") -> Mapping[str, float]:
    """Probabilities of all texts of some letters up to a length, each letter drawn given those before."""
    found: dict[str, float] = {}
    draws = np.random.default_rng(seed)

    def grow(text: str, probability: float) -> None:
        logits = draws.normal(size=1 + len(letters)) - [0.7, *([0.0] * len(letters))]
        if len(text) == longest:
            logits[1:] = -np.inf
        share = np.exp(logits - logits.max())
        share /= share.sum()
        found[text] = probability * float(share[0])
        for letter, part in zip(letters, share[1:].tolist(), strict=True):
            if part:
                grow(text + letter, probability * part)

    grow("", 1.0)
    return found


def true_kl(mine: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The KL divergence between two sources of text per byte, stop events counted as one."""
    size = sum(p * (len(x.encode()) + 1) for x, p in mine.items())
    return sum(p * math.log(p / theirs[x]) for x, p in mine.items()) / size


class Canonical:
    """The model that writes a source's texts as its tokenizer would, each as likely as it is."""

    def __init__(self, vocabulary: Vocabulary, texts: Mapping[str, float]) -> None:
        self.vocabulary = vocabulary
        self.ids = {x: (*vocabulary.encode(x).ids.tolist(), vocabulary.stop_ids[0]) for x in texts}
        self.mass: dict[tuple[int, ...], float] = defaultdict(float)
        for x, probability in texts.items():
            for k in range(len(self.ids[x]) + 1):
                self.mass[self.ids[x][:k]] += probability

    def row(self, context: tuple[int, ...]) -> Tensor:
        """Logits after a context."""
        logits = torch.full((self.vocabulary.size,), NEVER, dtype=torch.float64)
        for v in range(self.vocabulary.size):
            if (share := self.mass.get((*context, v), 0.0)) > 0:
                logits[v] = math.log(share / self.mass[context])
        return logits

    def rows(self, ids: tuple[int, ...]) -> Tensor:
        """Logits of the states before each of some ids."""
        return torch.stack([self.row(ids[:k]) for k in range(len(ids))])


def text_of(pair: VocabularyPair, ids: tuple[int, ...]) -> AlignedText:
    """A text that has ended."""
    return aligned(pair, list(ids))


def expected(
    objective: Objective, pair: VocabularyPair, mine: Mapping[str, float], theirs: Mapping[str, float]
) -> tuple[float, float]:
    """Expected loss per unit over all texts that the student writes, and the norm of its expected gradient per unit."""
    student, teacher = Canonical(pair.student, mine), Canonical(pair.teacher, theirs)
    value = count = 0.0
    gradient: dict[tuple[int, ...], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for x, probability in mine.items():
        ids = student.ids[x]
        text = text_of(pair, ids)
        rows = student.rows(ids).requires_grad_(True)
        inputs = inputs_of(
            pair, [text], rows, teacher.rows((*text.teacher.ids.tolist(), pair.teacher.stop_ids[0]))
        )
        loss = objective(inputs).total
        value += probability * float(loss.detach())
        count += probability * objective.count(inputs.batch)
        if loss.requires_grad:
            (grad,) = torch.autograd.grad(loss, rows)
            for k in range(len(ids)):
                gradient[ids[:k]] = gradient[ids[:k]] + probability * grad[k]
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
    return value / count, norm / count


def exact_divergence(
    name: str, mine: Mapping[str, float], theirs: Mapping[str, float], least: float | None
) -> tuple[float, float]:
    """Value and lower bound of KL per byte as evaluations compute them, expected over all texts that the student
    writes; ``least`` as of ``marginals``."""
    pair = pair_of(name)
    models = Canonical(pair.student, mine), Canonical(pair.teacher, theirs)
    value = bound = size = 0.0
    for x, probability in mine.items():
        sides = []
        for model, trie in zip(models, pair.kernel_tries, strict=True):
            text = model.vocabulary.encode(x)
            states = BranchStates(model.row, text.ids.tolist(), text.ids.size + 1)
            sides.append(marginals(model.vocabulary, trie, text, True, states, least))
        found = ExactText.of(*sides)
        value += probability * float(found.value.sum())
        bound += probability * float(found.bound.sum())
        size += probability * found.value.size
    return value / size, bound / size


def drift(objective: Objective, name: str, steps: int, rate: float, longest: int = 3) -> float:
    """The true KL per byte of a student from its teacher's source after some expected steps on policy, if it begins as
    that source: plain gradient descent on its logits, of the loss per unit. What it never writes stays as it is."""
    pair, texts = pair_of(name), texts_of(name, 0, longest)
    student, teacher = Canonical(pair.student, texts), Canonical(pair.teacher, texts)
    states = sorted({ids[:k] for ids in student.ids.values() for k in range(len(ids))})
    number = {context: n for n, context in enumerate(states)}
    logits = torch.stack([student.row(context) for context in states])
    written = logits > NEVER / 2
    known = []
    for x, ids in student.ids.items():
        text = text_of(pair, ids)
        theirs = teacher.rows((*text.teacher.ids.tolist(), pair.teacher.stop_ids[0]))
        known.append((x, ids, [number[ids[:k]] for k in range(len(ids))], text, theirs))

    def probability(logp: Tensor, ids: tuple[int, ...], rows: list[int]) -> float:
        return math.exp(float(logp[rows, list(ids)].sum()))

    for _ in range(steps):
        logp = torch.log_softmax(logits, -1)
        leaf = logits.clone().requires_grad_(True)
        total, count = leaf.new_zeros(()), 0.0
        for _, ids, rows, text, theirs in known:
            share = probability(logp, ids, rows)
            inputs = inputs_of(pair, [text], leaf[rows], theirs)
            total = total + share * objective(inputs).total
            count += share * objective.count(inputs.batch)
        (gradient,) = torch.autograd.grad(total / count, leaf)
        logits = torch.where(written, logits - rate * gradient, logits)
    logp = torch.log_softmax(logits, -1)
    shares = {x: probability(logp, ids, rows) for x, ids, rows, _, _ in known}
    whole = sum(shares.values())
    return true_kl({x: p / whole for x, p in shares.items()}, texts)
