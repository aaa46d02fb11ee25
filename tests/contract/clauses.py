"""The contract, clause by clause: what is asked of an objective, how far it is from that, and how far it may be.

A clause takes an objective, any function from `LossInputs` to a `Loss` with the same declarations, so that losses of
other toolkits can be put to it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.kernels import logits
from gold.kernels.logits import GivenLogits
from gold.losses import OBJECTIVES, DivergenceRow, LossInputs, Objective
from tests.contract import source
from tests.contract.toys import (
    ToyModel,
    aligned,
    inputs_of,
    leaf,
    random_texts,
    student_rows,
    teacher_rows,
    toy_vocabulary,
)
from tests.support import oracle

STUDENT = toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None)
TEACHER = toy_vocabulary(["a+a", "b+a", "ba+a"])
PAIR = VocabularyPair(STUDENT, TEACHER)
SAME = VocabularyPair(STUDENT, STUDENT)


@dataclass(frozen=True)
class Outcome:
    """A measured deviation and the largest that is allowed; for clauses that ask for a difference, ``least`` is."""

    found: float
    allowed: float = math.inf
    least: float = -math.inf

    @property
    def holds(self) -> bool:
        """Whether it is within its bounds; not-a-number is not."""
        return self.least <= self.found <= self.allowed

    def __str__(self) -> str:
        bound = f"at most {self.allowed:.0e}" if self.least == -math.inf else f"at least {self.least:.0e}"
        return f"{self.found:.1e}, {bound}"


@dataclass(frozen=True)
class Clause:
    """One demand: its number in the contract, what it says, and its measure; None where it does not apply."""

    number: str
    says: str
    measure: Callable[[Objective], Outcome | None]


def gradient(objective: Objective, inputs: LossInputs) -> tuple[float, Tensor]:
    """An objective's sum, and its gradient with respect to the student's logits."""
    logits, rows = leaf(inputs.student)
    value = objective(replace(inputs, student=rows)).total
    if not value.requires_grad:
        return float(value), torch.zeros_like(logits)
    (grad,) = torch.autograd.grad(value, logits, allow_unused=True)
    return float(value.detach()), torch.zeros_like(logits) if grad is None else grad


def pair_for(objective: Objective) -> VocabularyPair:
    """Two vocabularies that disagree, or one and the same for an objective that cannot do without."""
    return SAME if needs_one_vocabulary(objective) else PAIR


def needs_one_vocabulary(objective: Objective) -> bool:
    """Whether it only compares models of one vocabulary."""
    row = OBJECTIVES.get(objective.name)
    return bool(row is not None and row.own_vocabulary) or objective.options.get("support") == "tokens"


def is_policy_gradient(objective: Objective) -> bool:
    """Whether its value is no measure, only its gradient, and that on average."""
    row = OBJECTIVES.get(objective.name)
    return row is not None and row.on_policy


def texts_for(objective: Objective, pair: VocabularyPair, count: int = 6, seed: int = 1) -> list[AlignedText]:
    """Texts of the kind that the objective counts."""
    texts = random_texts(pair, count, seed)
    return [replace(t, sampled=objective.name != "sft") for t in texts]


def models_for(pair: VocabularyPair, **known: Any) -> tuple[ToyModel, ToyModel]:
    """A student and a teacher that differ."""
    return ToyModel(pair.student, 3, **known), ToyModel(pair.teacher, 4)


def equal_models(objective: Objective) -> Outcome | None:
    """1. Largest of value and gradient where both sides are one model, on any texts."""
    if objective.needs == "nothing":
        return None
    texts = texts_for(objective, SAME, 8)
    model = ToyModel(STUDENT, 3, extra=2)
    value, grad = gradient(objective, inputs_of(SAME, texts, model, model))
    return Outcome(max(abs(value), float(grad.abs().max())), 1e-10)


def one_vocabulary(objective: Objective) -> Outcome | None:
    """2. Deviation from the plain token-level objective, written out, where both sides have one vocabulary."""
    row = OBJECTIVES.get(objective.name)
    plain = PLAIN.get(objective.name)
    if plain is None or {"clip", "importance_cap", "where", "half_life"} & {
        k for k, v in objective.options.items() if v not in (None, "everywhere")
    }:
        return None
    if isinstance(row, DivergenceRow):
        if objective.options["support"] not in ("shared", "tokens") or objective.options.get("top_k"):
            return None
        objective = row(**row.moved("tokens", objective.options))
    texts = random_texts(SAME, 6, 2)
    student, teacher = models_for(SAME)
    value, _ = gradient(objective, inputs_of(SAME, texts, student, teacher))
    rows, rows_T = student_rows(student, texts), teacher_rows(teacher, texts)
    targets = [int(i) for t in texts for i in t.ids]
    expected = plain(torch.log_softmax(rows, -1), torch.log_softmax(rows_T, -1), targets, objective.options)
    return Outcome(abs(value - expected) / max(1.0, abs(expected)), 1e-12)


def _by_row(value: Callable[[Tensor, Tensor, dict[str, Any]], Tensor]) -> Callable[..., float]:
    def total(logp: Tensor, logq: Tensor, targets: Sequence[int], options: Any) -> float:
        return sum(float(value(p.exp(), q.exp(), options)) for p, q in zip(logp, logq, strict=True))

    return total


def _per_token(logp: Tensor, logq: Tensor, targets: Sequence[int], options: Any) -> float:
    return -sum(
        (float(q[v]) - float(p[v])) * float(p[v]) for p, q, v in zip(logp, logq, targets, strict=True)
    )


def _mixed(p: Tensor, q: Tensor, share: float) -> Tensor:
    return share * q + (1 - share) * p


PLAIN: dict[str, Callable[..., float]] = {
    "reverse_kl": _by_row(lambda p, q, o: oracle.kl(p, q)),
    "forward_kl": _by_row(lambda p, q, o: oracle.kl(q, p)),
    "jsd": _by_row(
        lambda p, q, o: (
            o["beta"] * oracle.kl(q, _mixed(p, q, o["beta"]))
            + (1 - o["beta"]) * oracle.kl(p, _mixed(p, q, o["beta"]))
            + (oracle.kl(q, p) if o["beta"] == 0 else oracle.kl(p, q) if o["beta"] == 1 else 0.0)
        )
    ),
    "skew_kl": _by_row(lambda p, q, o: oracle.kl(q, _mixed(p, q, o["alpha"]))),
    "skew_reverse_kl": _by_row(lambda p, q, o: oracle.kl(p, _mixed(p, q, 1 - o["alpha"]))),
    "entropy_aware_kl": _by_row(
        lambda p, q, o: (
            oracle.kl(p, q) + (float(-(q * q.log()).sum()) > o["threshold"]) * o["forward"] * oracle.kl(q, p)
        )
    ),
    "span_pg": _per_token,
    "opd": _per_token,
}
PLAIN |= {"gkd": PLAIN["jsd"], "gold": PLAIN["jsd"], "x_token": PLAIN["forward_kl"]}
PLAIN |= {"uld": PLAIN["forward_kl"], "alm": PLAIN["forward_kl"]}
"""Token-level objectives by name, from both sides' log-probabilities of every row, one row and token at a time."""


def teacher_matters(objective: Objective) -> Outcome | None:
    """3. How far the gradient moves when the teacher is another one."""
    if objective.needs == "nothing":
        return None
    pair = pair_for(objective)
    texts = [aligned(pair, [*STUDENT.encode(t).ids.tolist(), STUDENT.stop_ids[0]]) for t in ("ab a", "b ab")]
    student = ToyModel(STUDENT, 3)
    inputs_list = (inputs_of(pair, texts, student, ToyModel(pair.teacher, seed)) for seed in (4, 5))
    grads = [gradient(objective, inputs)[1] for inputs in inputs_list]
    return Outcome(float((grads[0] - grads[1]).abs().max()), least=1e-3)


def names_of_ids(objective: Objective) -> Outcome | None:
    """4. Deviation of value and gradient when the ids of both vocabularies are numbered another way."""
    pair = pair_for(objective)
    results = []
    for shuffle in (0, 5):
        student = toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None, shuffle=shuffle)
        teacher = student if pair is SAME else toy_vocabulary(["a+a", "b+a", "ba+a"], shuffle=2 * shuffle)
        renamed = VocabularyPair(student, teacher)
        texts = [
            aligned(
                renamed,
                [_renamed(int(i), STUDENT, student) for i in t.ids],
                sampled=t.sampled,
                advantage=t.advantage,
            )
            for t in texts_for(objective, pair)
        ]
        value, grad = gradient(
            objective, inputs_of(renamed, texts, ToyModel(student, 3), ToyModel(teacher, 4))
        )
        results.append((value, grad[:, [_renamed(i, STUDENT, student) for i in range(STUDENT.size)]]))
    (value, grad), (value_2, grad_2) = results
    return Outcome(max(abs(value - value_2), float((grad - grad_2).abs().max())), 1e-10)


def _renamed(index: int, old: Any, new: Any) -> int:
    return int(new.tokenizer.token_to_id(old.tokenizer.id_to_token(index)))


def order_and_company(objective: Objective) -> Outcome | None:
    """5. Deviation of a batch from the same batch turned round, and from the sum of its texts alone; counts too."""
    pair = pair_for(objective)
    texts = texts_for(objective, pair)
    student, teacher = models_for(pair)

    def of(chosen: Sequence[AlignedText]) -> tuple[float, float]:
        inputs = inputs_of(pair, chosen, student, teacher)
        return float(objective(inputs).total), objective.count(inputs.batch)

    whole, turned = of(texts), of(texts[::-1])
    single = [of([t]) for t in texts]
    apart = (sum(value for value, _ in single), sum(count for _, count in single))
    return Outcome(
        max(abs(a - b) for other in (turned, apart) for a, b in zip(whole, other, strict=True)), 1e-9
    )


def padding(objective: Objective) -> Outcome | None:
    """5. Deviation when both output matrices have further rows without mass, and gradient on those rows."""
    pair = pair_for(objective)
    texts = texts_for(objective, pair)
    student, teacher = models_for(pair)
    rows, rows_T = student_rows(student, texts), teacher_rows(teacher, texts)
    value, grad = gradient(objective, inputs_of(pair, texts, rows, rows_T))
    padded = [torch.nn.functional.pad(x, (0, n), value=-300.0) for x, n in ((rows, 3), (rows_T, 5))]
    inputs = inputs_of(pair, texts, *padded)
    if inputs.reference is not None:
        wider = torch.nn.functional.pad(inputs.reference.logits(), (0, 3), value=-300.0)
        inputs = replace(inputs, reference=GivenLogits(wider))
    value_2, grad_2 = gradient(objective, inputs)
    found = [
        value - value_2,
        *(grad - grad_2[:, : STUDENT.size]).flatten(),
        *grad_2[:, STUDENT.size :].flatten(),
    ]
    return Outcome(max(abs(float(x)) for x in found), 1e-10)


def proper(objective: Objective) -> Outcome | None:
    """6. The least value over random models, of which one side likes a token that the other does not have, and over two
    that differ in tokens that no text has: a divergence's own sum, and so above 0."""
    if objective.needs == "nothing" or is_policy_gradient(objective):
        return None
    pair = pair_for(objective)
    values = []
    for seed in range(12):
        texts = [t for t in random_texts(pair, 4, seed) if t.student.data]
        models = ToyModel(pair.student, seed), ToyModel(pair.teacher, seed + 100)
        rows, rows_T = student_rows(models[0], texts), teacher_rows(models[1], texts)
        own, own_T = (_unshared(pair.student, pair.teacher), _unshared(pair.teacher, pair.student))
        for liked, liked_T in ((0.0, 0.0), (5.0, 0.0), (0.0, 5.0)):
            mine, theirs = rows.clone(), rows_T.clone()
            mine[:, own] += liked
            theirs[:, own_T] += liked_T
            inputs = inputs_of(pair, texts, mine, theirs)
            values.append(float(objective(inputs).total) / max(1.0, objective.count(inputs.batch)))
    texts = [aligned(SAME, STUDENT.encode("a" * n).ids.tolist()) for n in (1, 2, 3, 4)]
    rows = student_rows(ToyModel(STUDENT, 0), texts)
    swapped = list(range(STUDENT.size))
    b, space = (int(STUDENT.encode(t).ids[0]) for t in "b ")
    swapped[b], swapped[space] = space, b
    values.append(float(objective(inputs_of(SAME, texts, rows, rows[:, swapped])).total))
    return Outcome(min(values), least=1e-9)


def _unshared(vocabulary: Any, other: Any) -> list[int]:
    """Text ids of which the other vocabulary has no token of the same bytes."""
    theirs = {other.token_bytes(i) for i in range(other.size)}
    return [i for i in range(vocabulary.size) if vocabulary.token_bytes(i) not in theirs]


def finite_differences(objective: Objective) -> Outcome | None:
    """7. Deviation of the gradient from central differences of the value, in float64."""
    if objective.needs != "nothing" and is_policy_gradient(objective):
        return None  # no gradient goes through an advantage: the expectation is held by enumeration
    pair = pair_for(objective)
    texts = texts_for(objective, pair, 3, seed=7)
    inputs = inputs_of(pair, texts, *models_for(pair, extra=0))
    _, grad = gradient(objective, inputs)
    logits = inputs.student.logits().detach()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(6):
        direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        ends = [
            float(objective(replace(inputs, student=GivenLogits(logits + s * direction))).total)
            for s in (1e-5, -1e-5)
        ]
        slope = float((grad * direction).sum())
        worst = max(worst, abs((ends[0] - ends[1]) / 2e-5 - slope) / max(1.0, abs(slope)))
    return Outcome(worst, 1e-6)


LETTERS = toy_vocabulary([], letters="ab", cut=None)
MERGED = toy_vocabulary(["a+b"], letters="ab", cut=None)


def other_segmentation(objective: Objective) -> Outcome | None:
    """8. The expected value per unit where both sides write one source of text, each in its tokenizer's own tokens, so
    that nothing is left to learn; of a policy gradient the norm of its expectation. By enumeration of the texts."""
    if objective.needs == "nothing" or needs_one_vocabulary(objective):
        return None
    texts = source.source(0, 3)
    value, gradient = source.expected(objective, source.pair_of("other merges"), texts, texts)
    return Outcome(gradient if is_policy_gradient(objective) else abs(value), 1e-9)


def learning(objective: Objective) -> Outcome | None:
    """8. Share of the exact reverse KL between both sides' texts that is left after training on samples."""
    if objective.needs == "nothing":
        return None
    pair = VocabularyPair(MERGED, MERGED if needs_one_vocabulary(objective) else LETTERS)
    student = ToyModel(MERGED, 1, longest=3, requires_grad=True, never=("<junk>",))
    # Long enough for any text of the student.
    longest = 3 if pair.student is pair.teacher else 6
    teacher = ToyModel(pair.teacher, 2, longest=longest, never=("<junk>",), scale=1.5)
    stops = MERGED.stop_ids
    taught: dict[bytes, float] = {}
    for ids, logp in oracle.sequences(teacher.logp, pair.teacher.stop_ids, longest + 1):
        data = b"".join(pair.teacher.token_bytes(i) for i in ids)
        taught[data] = taught.get(data, 0.0) + float(logp.exp())

    def gap() -> float:
        written: dict[bytes, float] = {}
        for ids, logp in oracle.sequences(lambda c: student.logp(c).detach(), stops, 4):
            data = b"".join(MERGED.token_bytes(i) for i in ids)
            written[data] = written.get(data, 0.0) + float(logp.exp())
        return sum(p * math.log(p / taught[data]) for data, p in written.items())

    before = gap()
    rows = list(student.rows.values())
    optimizer = torch.optim.Adam(rows, lr=0.15)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        texts = [aligned(pair, _drawn(student, stops, generator)) for _ in range(16)]
        inputs = inputs_of(pair, texts, student, teacher)
        loss = objective(inputs).total / max(1.0, objective.count(inputs.batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return Outcome(gap() / before, 0.7)


def _drawn(model: ToyModel, stops: Sequence[int], generator: torch.Generator) -> list[int]:
    ids: list[int] = []
    while not ids or ids[-1] not in stops:
        ids.append(int(torch.multinomial(model.logp(ids).detach().exp(), 1, generator=generator)))
    return ids


def blocks_of_rows(objective: Objective) -> Outcome | None:
    """9. Deviation when one row of logits is made at a time instead of all."""
    pair = pair_for(objective)
    texts = texts_for(objective, pair)
    inputs = inputs_of(pair, texts, *models_for(pair))
    value, grad = gradient(objective, inputs)
    before = logits.BLOCK_BYTES
    try:
        logits.BLOCK_BYTES = 1
        value_2, grad_2 = gradient(objective, inputs)
    finally:
        logits.BLOCK_BYTES = before
    return Outcome(max(abs(value - value_2), float((grad - grad_2).abs().max())), 1e-10)


def edges(objective: Objective) -> Outcome | None:
    """9. Values and gradients that are no finite number: −inf rows, probability-1 rows, ties, empty and one-token
    texts, texts cut short, batches of nothing that counts."""
    pair = pair_for(objective)
    student, teacher = models_for(pair)
    junk = {s: s.tokenizer.token_to_id("<junk>") for s in (pair.student, pair.teacher)}
    stop, a = STUDENT.stop_ids[0], STUDENT.encode("a").ids.tolist()
    kind = objective.name != "sft"
    batches = [texts_for(objective, pair, 4, seed=11)]
    batches += [[aligned(pair, ids, sampled=kind, advantage=1.0)] for ids in ([stop], a, [*a, stop])]
    batches += [[replace(t, sampled=not kind) for t in random_texts(pair, 3, 1)]]
    broken = 0
    for texts in batches:
        rows, rows_T = (x.clone() for x in (student_rows(student, texts), teacher_rows(teacher, texts)))
        rows[:, junk[pair.student]] = -torch.inf
        rows_T[:, junk[pair.teacher]] = -torch.inf
        if len(rows) > 2:
            rows[0], rows_T[0] = 0.0, 0.0
            rows[1] = -60.0
            rows[1, int(texts[0].ids[0])] = 60.0
        value, grad = gradient(objective, inputs_of(pair, texts, rows, rows_T))
        broken += (not math.isfinite(value)) + int((~torch.isfinite(grad)).sum())
    return Outcome(float(broken), 0.0)


CLAUSES: tuple[Clause, ...] = (
    Clause("1", "equal models: loss 0, gradient 0", equal_models),
    Clause("2", "one vocabulary: the plain token-level objective", one_vocabulary),
    Clause("3", "the gradient depends on the teacher", teacher_matters),
    Clause("4", "names of ids do not matter", names_of_ids),
    Clause("5a", "order and company in a batch do not matter", order_and_company),
    Clause("5b", "padding rows do not matter", padding),
    Clause("6", "never negative, 0 only at equality", proper),
    Clause("7", "the gradient is that of the value", finite_differences),
    Clause("8a", "one source of text in two tokenizers: 0, else its floor is stated", other_segmentation),
    Clause("8b", "training comes nearer to the teacher", learning),
    Clause("9a", "a block of rows at a time gives the same", blocks_of_rows),
    Clause("9b", "no NaN at the edges", edges),
)


def variants() -> Iterator[tuple[str, Objective]]:
    """Every row of the table, divergences on every support, and options that change what is computed."""
    from gold.losses import SUPPORTS

    for name, row in OBJECTIVES.items():
        if isinstance(row, DivergenceRow):
            yield from (
                (f"{name}/{support}", row(support=support)) for support in SUPPORTS if support != "tokens"
            )
        else:
            yield name, row()
    for label, (name, options) in FURTHER.items():
        yield label, OBJECTIVES[name](**options)


FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "gkd, β = 0.1": ("gkd", {"beta": 0.1}),
    "gold, reverse KL on matched tokens": ("gold", {"beta": 1.0, "matched_share": 1.0}),
    "gold, β = 0.1": ("gold", {"beta": 0.1}),
    "alm, temperature 1": ("alm", {"temperature": 1.0}),
    "x_token, H-KL": ("x_token", {"variant": "h_kl"}),
    "opd, clipped and weighted": ("opd", {"clip": 2.0, "importance_cap": 2.0}),
    "jsd 0.1/bytes": ("jsd", {"beta": 0.1}),
    "reverse_kl/shared, renormalised": ("reverse_kl", {"support": "shared", "unshared": "renormalise"}),
    "forward_kl/shared, renormalised": ("forward_kl", {"support": "shared", "unshared": "renormalise"}),
    "forward_kl/shared, top 2 of the student": (
        "forward_kl",
        {"support": "shared", "top_k": 2, "top_k_of": "student"},
    ),
    "reverse_kl/shared, top 2 of the teacher": ("reverse_kl", {"support": "shared", "top_k": 2}),
    "reverse_kl/bytes, one-to-one chunks": ("reverse_kl", {"where": "one_to_one"}),
    "reverse_kl/bytes, early bytes": ("reverse_kl", {"half_life": 3.0}),
    "token_pg, to the end of a span": ("token_pg", {"horizon": "span"}),
    "span_pg, clipped and weighted": ("span_pg", {"clip": 2.0, "importance_cap": 2.0}),
    "token_pg, clipped and weighted": ("token_pg", {"clip": 2.0, "importance_cap": 2.0}),
    "reverse_kl/prefix, synced states": (
        "reverse_kl",
        {"support": "prefix", "interior": False, "half_life": 3.0},
    ),
    "jsd/prefix, one-to-one chunks": (
        "jsd",
        {"support": "prefix", "where": "one_to_one", "white_space": "mask"},
    ),
}
